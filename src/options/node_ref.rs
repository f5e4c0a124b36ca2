//! Fields that refer to a child node, by the name of an existing node or by a definition in place.
//!
//! Text or a string is a reference, an object is a definition, nothing else is valid.

use serde::de::{Deserialize, Deserializer};

use super::tree::{Map, Value};

/// A child that must be there (`file`): a reference or an inline definition.
#[derive(Clone, Debug, PartialEq)]
pub enum NodeRef {
    /// The name of an existing node.
    Name(String),
    /// The options of a node to be opened for this parent alone.
    Inline(Map),
}

/// A child that can be switched off (`backing`): `null`, a reference or an inline definition.
#[derive(Clone, Debug, PartialEq)]
pub enum NodeRefOrNull {
    /// `null`, or the empty text that stands for it: no child, even where the image names one.
    Null,
    /// The name of an existing node.
    Name(String),
    /// The options of a node to be opened for this parent alone.
    Inline(Map),
}

/// How [`super::de`] recognises the two types; the name is what QEMU calls them in errors.
pub(super) const NODE_REF: &str = "BlockdevRef";
pub(super) const NODE_REF_OR_NULL: &str = "BlockdevRefOrNull";

impl<'de> Deserialize<'de> for NodeRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match super::any::value_for(NODE_REF, deserializer)? {
            Value::Text(s) | Value::Str(s) => Ok(NodeRef::Name(s)),
            Value::Map(m) => Ok(NodeRef::Inline(m)),
            _ => Err(serde::de::Error::custom("expected a node name or an object")),
        }
    }
}

impl<'de> Deserialize<'de> for NodeRefOrNull {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match super::any::value_for(NODE_REF_OR_NULL, deserializer)? {
            Value::Null => Ok(NodeRefOrNull::Null),
            Value::Text(s) | Value::Str(s) if s.is_empty() => Ok(NodeRefOrNull::Null),
            Value::Text(s) | Value::Str(s) => Ok(NodeRefOrNull::Name(s)),
            Value::Map(m) => Ok(NodeRefOrNull::Inline(m)),
            _ => Err(serde::de::Error::custom("expected null, a node name or an object")),
        }
    }
}
