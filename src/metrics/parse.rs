//! Reading a page of metrics, in the part of the text format that [`super::text`] writes.

/// One line of a page.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: Vec<(String, String)>,
    pub value: f64,
}

impl Sample {
    pub fn label(&self, name: &str) -> Option<&str> {
        let found = self.labels.iter().find(|(label, _)| label == name);
        found.map(|(_, value)| &**value)
    }
}

/// All samples of a page.
///
/// # Errors
/// The first line that is none.
pub fn parse(text: &str) -> Result<Vec<Sample>, String> {
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines.map(|line| sample(line).ok_or_else(|| format!("no metrics: '{line}'"))).collect()
}

fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = Vec::new();
    while let Some(label) = rest.strip_prefix(['{', ',']) {
        let (name, quoted) = label.split_once("=\"")?;
        let (value, after) = unquote(quoted)?;
        labels.push((name.to_owned(), value));
        rest = after.strip_prefix('}').unwrap_or(after);
    }
    let value = rest.strip_prefix(' ')?.parse().ok()?;
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let good = !name.is_empty() && name.chars().all(is_name);
    good.then(|| Sample { name: name.to_owned(), labels, value })
}

/// The text up to the closing quotation mark, and what follows that.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    loop {
        match chars.next()? {
            (at, '"') => return Some((value, &text[at + 1..])),
            (_, '\\') => match chars.next()?.1 {
                'n' => value.push('\n'),
                c => value.push(c),
            },
            (_, c) => value.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_are_no_samples_are_reported() {
        assert_eq!(parse("# HELP a b\n\n").unwrap(), []);
        assert_eq!(parse("a{b=\"c,}\",d=\"\"} 1e3").unwrap()[0].label("b"), Some("c,}"));
        for bad in ["a", "a b", "{} 1", "a{b} 1", "a{b=\"c 1", "a{b=\"c\"}1", "<html>"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
