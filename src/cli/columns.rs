//! Text in the columns of a terminal: letters of some scripts take two, marks that join a letter none.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// The text, padded with blanks to this many columns.
pub fn pad(text: &str, columns: usize) -> String {
    format!("{text}{}", " ".repeat(columns.saturating_sub(text.width())))
}

/// The longest beginning of the text that fits into this many columns.
pub fn cut(text: &str, columns: usize) -> &str {
    let mut taken = 0;
    let end = text.char_indices().find(|&(_, letter)| {
        taken += letter.width().unwrap_or(0);
        taken > columns
    });
    end.map_or(text, |(at, _)| &text[..at])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_count_by_the_columns_that_they_take() {
        assert_eq!(pad("abc", 5), "abc  ");
        assert_eq!(pad("\u{e4}\u{f6}", 5), "\u{e4}\u{f6}   ");
        assert_eq!(pad("e\u{301}", 5), "e\u{301}    ");
        assert_eq!(pad("\u{65e5}\u{672c}", 5), "\u{65e5}\u{672c} ");
        assert_eq!(pad("longer", 5), "longer");
        assert_eq!(cut("abc", 2), "ab");
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("\u{65e5}\u{672c}", 3), "\u{65e5}");
        assert_eq!(cut("e\u{301}a", 1), "e\u{301}");
    }
}
