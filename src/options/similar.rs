//! Suggestions for misspelt words.

/// Longest word that is looked at, in characters.
const LONGEST: usize = 64;

/// The word that is most like `name`, if one is: a letter in three may be wrong.
pub fn similar<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let length = name.chars().count();
    if length > LONGEST {
        return None;
    }
    let most = (length / 3).max(1);
    let distances = known.into_iter().map(|word| (strsim::osa_distance(name, word), word));
    // One wrong letter of one or two is all of it.
    let close = distances.filter(|(distance, _)| *distance <= most && *distance + 1 < length);
    close.min_by_key(|(distance, _)| *distance).map(|(_, word)| word)
}

/// A line of advice on a word that is not known.
pub fn did_you_mean<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    similar(name, known).map(|word| format!("Did you mean '{word}'?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_word_is_found_and_another_word_is_not() {
        let known = ["filename", "locking", "aio", "cache", "read-only"];
        for (name, meant) in [
            ("filenam", Some("filename")),
            ("flename", Some("filename")),
            ("cahce", Some("cache")),
            ("readonly", Some("read-only")),
            ("aoi", Some("aio")),
            ("bogus", None),
            ("x", None),
            ("", None),
        ] {
            assert_eq!(similar(name, known), meant, "{name}");
        }
        assert_eq!(similar(&"filename".repeat(10_000), known), None);
    }
}
