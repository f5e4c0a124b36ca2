//! Names that users give to nodes, exports and objects.

/// Whether `name` is made of letters, digits, `-`, `.` and `_`, and begins with a letter.
pub fn is_identifier(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}
