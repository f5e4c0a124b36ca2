//! The one error of option handling: which parameter, and what is wrong with it, on one line.
//!
//! The sentences are those `qemu-storage-daemon` prints, because scripts match on them.

use super::{similar, size};
use std::fmt;

/// What QEMU prints on the lines after a size that is none.
pub const SIZE_HINT: &str = "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, \
                             tera-, peta-\nand exabytes, respectively.";

/// The error in one parameter, or with the text it came in.
///
/// The parameter is named by its whole path (`file.cache.direct`, `children.0.driver` from text,
/// `children[0].driver` from JSON); [`Error::under`] adds the outer parts on the way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    path: String,
    // Boxed text keeps the error small; errors travel in every `Result` of the parsers.
    kind: Kind,
    advice: Option<Box<str>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The key is not one the driver knows.
    Unexpected,
    /// A plain value is wanted, but the text gave keys below the parameter.
    SubkeysUnexpected,
    /// A parameter that must be given is not.
    Missing,
    /// A list in text lacks this element.
    MissingElement,
    /// A value of another type is wanted: `boolean`, `string`, `object` …
    WrongType(&'static str),
    /// The value does not convert, or is out of range: `integer`, `size`, `uint16_t` …
    Expects(&'static str),
    /// The value is no size in bytes.
    NotASize,
    /// The value is not one of the names allowed.
    BadValue(Box<str>),
    /// The key is no valid parameter name.
    BadName,
    /// A key stands without a value.
    NoEquals,
    /// The key, or one part of it, is too long.
    TooLong { fragment: bool },
    /// The key is used both for a plain value and with keys below it, or for list and object.
    Inconsistent,
    /// Two sources give one parameter different values.
    Twice,
    /// More nesting or more keys than the limits allow.
    Limit { what: &'static str, limit: usize },
    /// A sentence that stands for itself; the path, if any, goes before it.
    Message(Box<str>),
}

impl Error {
    pub(super) fn new(path: &str, kind: Kind) -> Self {
        Error { path: path.to_owned(), kind, advice: None }
    }

    /// An error about the value at hand; the caller adds the path with [`Error::under`].
    pub(super) fn here(kind: Kind) -> Self {
        Error { path: String::new(), kind, advice: None }
    }

    /// An error in words of its own, for checks that only the driver can make.
    pub fn message(text: impl Into<String>) -> Self {
        Error::here(Kind::Message(text.into().into_boxed_str()))
    }

    /// An error about a value that is no size in bytes.
    pub fn not_a_size(key: &str) -> Self {
        Error::new(key, Kind::NotASize)
    }

    /// The same error seen from one level further out: `direct` under `cache` is `cache.direct`.
    ///
    /// Openers use it when they read a child's options: `from_map(child).map_err(|e| e.under("file"))`.
    #[must_use]
    pub fn under(mut self, key: &str) -> Self {
        self.path = if self.path.is_empty() {
            key.to_owned()
        } else if self.path.starts_with('[') {
            format!("{key}{}", self.path)
        } else {
            format!("{key}.{}", self.path)
        };
        self
    }

    /// The whole path of the parameter; empty when the error is about the text as a whole.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Lines of advice that QEMU prints below the error.
    pub fn hint(&self) -> Option<&'static str> {
        (self.kind == Kind::NotASize).then_some(SIZE_HINT)
    }

    /// A line of advice of our own.
    pub fn advice(&self) -> Option<&str> {
        self.advice.as_deref()
    }

    /// The same error with advice, unless it has some already.
    #[must_use]
    pub fn with_advice(mut self, advice: Option<String>) -> Self {
        self.advice = self.advice.or(advice.map(String::into_boxed_str));
        self
    }

    /// The same error with the parameter that may have been meant, if it is of one that is not among `known`.
    #[must_use]
    pub fn meant<'a>(self, known: impl IntoIterator<Item = &'a str>) -> Self {
        let advice = match self.kind {
            Kind::Unexpected | Kind::BadName => {
                let name = self.path.rsplit(['.', ']']).next().unwrap_or_default();
                similar::did_you_mean(name, known)
            }
            _ => None,
        };
        self.with_advice(advice)
    }

    /// The same error with the parameter of `given` that may stand for the one that is missing.
    #[must_use]
    pub fn misspelt<'a>(self, given: impl IntoIterator<Item = &'a str>) -> Self {
        let advice = match self.kind {
            Kind::Missing => similar::similar(&self.path, given)
                .map(|found| format!("Did you mean '{}' by '{found}'?", self.path)),
            _ => None,
        };
        self.with_advice(advice)
    }

    /// True when the parameter was left out.
    pub fn is_missing(&self) -> bool {
        self.kind == Kind::Missing
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = Line(&self.path);
        match &self.kind {
            Kind::Unexpected => write!(f, "Parameter '{path}' is unexpected"),
            Kind::SubkeysUnexpected => write!(f, "Parameters '{path}.*' are unexpected"),
            Kind::Missing => write!(f, "Parameter '{path}' is missing"),
            Kind::MissingElement => write!(f, "Parameter '{path}' missing"),
            Kind::WrongType(wanted) => {
                write!(f, "Invalid parameter type for '{path}', expected: {wanted}")
            }
            Kind::Expects(wanted) => write!(f, "Parameter '{path}' expects {wanted}"),
            Kind::NotASize => {
                write!(f, "Parameter '{path}' {}", size::BadSize::NotASize)
            }
            Kind::BadValue(value) => {
                // QEMU names only the last part of the path in this one sentence.
                let name = Line(self.path.rsplit('.').next().unwrap_or_default());
                write!(f, "Parameter '{name}' does not accept value '{}'", Line(value))
            }
            Kind::BadName => write!(f, "Invalid parameter '{path}'"),
            Kind::NoEquals => write!(f, "Expected '=' after parameter '{path}'"),
            Kind::TooLong { fragment: true } => {
                write!(f, "Parameter fragment '{path}' is too long")
            }
            Kind::TooLong { fragment: false } => write!(f, "Parameter '{path}' is too long"),
            Kind::Inconsistent => write!(f, "Parameters '{path}.*' used inconsistently"),
            Kind::Twice => write!(f, "Parameter '{path}' is given twice with different values"),
            Kind::Limit { what, limit } if path.0.is_empty() => {
                write!(f, "Options exceed the limit of {limit} {what}")
            }
            Kind::Limit { what, limit } => {
                write!(f, "Parameter '{path}' exceeds the limit of {limit} {what}")
            }
            Kind::Message(text) if path.0.is_empty() => write!(f, "{}", Line(text)),
            Kind::Message(text) => write!(f, "Parameter '{path}': {}", Line(text)),
        }
    }
}

impl std::error::Error for Error {}

impl serde::de::Error for Error {
    fn custom<T: fmt::Display>(msg: T) -> Self {
        Error::message(msg.to_string())
    }
    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Error::new(field, Kind::Unexpected).meant(expected.iter().copied())
    }
    fn missing_field(field: &'static str) -> Self {
        Error::new(field, Kind::Missing)
    }
    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let advice = similar::did_you_mean(variant, expected.iter().copied());
        Error::here(Kind::BadValue(variant.into())).with_advice(advice)
    }
}

/// Text from outside, made fit for one line of an error: control characters escaped, and cut
/// after [`Line::LONGEST`] characters.
struct Line<'a>(&'a str);

impl Line<'_> {
    const LONGEST: usize = 2048;
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write;
        for (n, c) in self.0.chars().enumerate() {
            if n == Self::LONGEST {
                return f.write_str("…");
            }
            if c.is_control() {
                write!(f, "{}", c.escape_default())?;
            } else {
                f.write_char(c)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_grows_outwards_and_list_indexes_attach_without_a_dot() {
        let e = Error::new("filename", Kind::Missing).under("[1]");
        assert_eq!(e.under("children").path(), "children[1].filename");
        let e = Error::here(Kind::Missing).under("direct").under("cache");
        assert_eq!(e.to_string(), "Parameter 'cache.direct' is missing");
    }

    #[test]
    fn an_error_is_one_bounded_line_whatever_the_text_was() {
        let e = Error::new(&"a\nb".repeat(100_000), Kind::Unexpected).to_string();
        assert!(!e.contains('\n') && e.len() < 10_000, "{}", e.len());
    }
}
