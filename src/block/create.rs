//! Making new images: the options that a format and the protocol under it take together, and the
//! order in which the two are asked.

use super::registry::Registry;
use super::{Error, LocalFuture};
use crate::options::Map;

/// An image that is being made.
pub struct Creation {
    pub registry: &'static Registry,
    /// As the user gave it.
    pub filename: String,
}

/// How a driver makes a new image.
pub struct CreateEntry {
    /// In the order in which they are shown.
    pub options: &'static [CreateOption],
    pub create: CreateFn,
}

/// Makes an image. The options are those of the entry that were given or have a default, checked
/// and in their types ([`Value`](crate::options::Value): `Bool`, `Int`, `Str`).
pub type CreateFn = for<'a> fn(&'a Creation, Map) -> LocalFuture<'a, Result<(), Error>>;

/// One option of `create -o`.
#[derive(Clone, Copy, Debug)]
pub struct CreateOption {
    pub name: &'static str,
    pub value: ValueType,
    pub help: &'static str,
    /// What is used, and shown, when it is not given; as it would be typed.
    pub default: Option<&'static str>,
}

/// What the value of a [`CreateOption`] looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueType {
    Str,
    /// `on` or `off`.
    Bool,
    /// Bytes, with the usual suffixes.
    Size,
    Number,
}
