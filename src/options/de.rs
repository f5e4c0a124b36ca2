//! A serde `Deserializer` over the option tree: the only way drivers read options.
//!
//! A driver declares what it takes and never looks at the tree:
//!
//! ```
//! use serde::Deserialize;
//! use vublk::options::{self, NodeRef, Size, keyval};
//!
//! #[derive(Deserialize)]
//! #[serde(rename_all = "kebab-case", deny_unknown_fields)]
//! struct RawOptions {
//!     file: NodeRef,
//!     offset: Option<Size>,
//! }
//!
//! let parsed = keyval::parse("file=disk0,offset=64k", None)?;
//! let raw: RawOptions = options::from_map(parsed.options)?;
//! assert_eq!(raw.offset, Some(Size(65536)));
//! # Ok::<(), options::Error>(())
//! ```
//!
//! The rules:
//!
//! * Text converts (`on`, `0x10`, `64k` where the field is a [`Size`]); JSON keeps its type.
//! * Unknown keys are refused in every struct, after everything else was found right.
//! * `null` is a value, not an absence: an `Option` field does not take it.
//! * An enum of unit variants is chosen by name. An enum whose container is renamed to a key, in
//!   lower case (`#[serde(rename = "type")]`), is a union: that key of the object names the
//!   variant, and the other keys are the variant's own struct.
//! * A field of type [`Value`] takes anything, for what can be of several types; read it further
//!   with [`from_value`].
//! * `#[serde(flatten)]`, `tag` and `untagged` do not work: serde reads ahead for them and loses
//!   which text may convert.

use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, IntoDeserializer, MapAccess,
    SeqAccess, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;

use super::any::VALUE;
use super::error::{Error, Kind};
use super::node_ref::{NODE_REF, NODE_REF_OR_NULL};
use super::similar;
use super::size::{self, Size};
use super::tree::{Map, Value};

/// Reads a whole object, usually a driver's option struct.
pub fn from_map<T: DeserializeOwned>(map: Map) -> Result<T, Error> {
    from_value(Value::Map(map))
}

/// Reads the keys of a struct out of an object, and gives the rest.
pub fn split_map<T: DeserializeOwned>(mut map: Map) -> Result<(T, Map), Error> {
    let value = T::deserialize(Part(&mut map));
    let value = value.map_err(|e| e.misspelt(map.iter().map(|(key, _)| key)))?;
    Ok((value, map))
}

/// Reads any value.
pub fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, Error> {
    T::deserialize(Reader(value))
}

impl Map {
    /// Removes `key` and reads it as a `T`; `None` if it is absent.
    pub fn take_as<T: DeserializeOwned>(&mut self, key: &str) -> Result<Option<T>, Error> {
        self.take(key).map(|value| from_value(value).map_err(|e| e.under(key))).transpose()
    }
}

/// A deserializer of structs, which takes their keys and leaves the others.
struct Part<'a>(&'a mut Map);

impl<'de> Deserializer<'de> for Part<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, Error> {
        Err(Error::here(Kind::WrongType("object")))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let taken = fields.iter().filter_map(|f| Some(((*f).to_owned(), self.0.take(f)?)));
        visitor.visit_map(Entries::all(taken.collect()))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

struct Reader(Value);

impl Reader {
    /// The error of a value that is not of the type `wanted`.
    fn wrong(&self, wanted: &'static str) -> Error {
        let has_keys = matches!(self.0, Value::Map(_) | Value::List(_));
        let plain_wanted = !matches!(wanted, "object" | "array");
        Error::here(if plain_wanted && has_keys && self.0.is_from_text() {
            Kind::SubkeysUnexpected
        } else {
            Kind::WrongType(wanted)
        })
    }

    fn boolean(self) -> Result<bool, Error> {
        match &self.0 {
            Value::Bool(b) => Ok(*b),
            Value::Text(s) => match s.as_str() {
                "on" | "yes" | "true" | "y" => Ok(true),
                "off" | "no" | "false" | "n" => Ok(false),
                _ => Err(Error::here(Kind::Expects("'on' or 'off'"))),
            },
            _ => Err(self.wrong("boolean")),
        }
    }

    fn signed(self, min: i64, max: i64, c_type: &'static str) -> Result<i64, Error> {
        let n = match &self.0 {
            Value::Int(n) => *n,
            Value::Text(s) => integer(s)?,
            _ => return Err(self.wrong("integer")),
        };
        i64::try_from(n)
            .ok()
            .filter(|n| (min..=max).contains(n))
            .ok_or_else(|| Error::here(Kind::Expects(c_type)))
    }

    fn unsigned(self, max: u64, c_type: &'static str) -> Result<u64, Error> {
        let n = match &self.0 {
            Value::Int(n) => *n,
            Value::Text(s) => integer(s)?,
            Value::Map(_) | Value::List(_) => return Err(self.wrong("integer")),
            _ => return Err(Error::here(Kind::Expects("uint64"))),
        };
        u64::try_from(n)
            .ok()
            .filter(|n| *n <= max)
            .ok_or_else(|| Error::here(Kind::Expects(c_type)))
    }

    fn bytes(self) -> Result<u64, Error> {
        match &self.0 {
            Value::Text(s) => size::parse(s).map_err(|_| Error::here(Kind::Expects("size"))),
            _ => self.unsigned(u64::MAX, "uint64"),
        }
    }

    fn number(self) -> Result<f64, Error> {
        match &self.0 {
            Value::Num(n) => Ok(*n),
            Value::Int(n) => Ok(*n as f64),
            Value::Text(s) => s
                .parse()
                .ok()
                .filter(|n: &f64| n.is_finite())
                .ok_or_else(|| Error::here(Kind::Expects("number"))),
            _ => Err(self.wrong("number")),
        }
    }

    fn string(self) -> Result<String, Error> {
        match self.0 {
            Value::Text(s) | Value::Str(s) => Ok(s),
            _ => Err(self.wrong("string")),
        }
    }

    fn object(self) -> Result<Map, Error> {
        match self.0 {
            Value::Map(m) => Ok(m),
            _ => Err(self.wrong("object")),
        }
    }

    /// Hands the value over without conversion. Text goes as a newtype, which nothing else is.
    fn hand_over<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Text(s) => visitor.visit_newtype_struct(s.into_deserializer()),
            _ => self.deserialize_any(visitor),
        }
    }
}

/// An integer in text: decimal, `0x` hexadecimal or `0` octal, within what 64 bits can hold.
fn integer(text: &str) -> Result<i128, Error> {
    let not_one = || Error::here(Kind::Expects("integer"));
    let text = text.trim_ascii_start();
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (radix, digits) = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, &digits[2..]),
        [b'0', _, ..] => (8, &digits[1..]),
        _ => (10, digits),
    };
    // `from_str_radix` would take a second sign.
    if !digits.starts_with(|c: char| c.is_digit(radix)) {
        return Err(not_one());
    }
    let magnitude = u64::from_str_radix(digits, radix).map_err(|_| not_one())?;
    let n = i128::from(magnitude);
    if negative && n > -i128::from(i64::MIN) {
        return Err(not_one());
    }
    Ok(if negative { -n } else { n })
}

macro_rules! integers {
    ($($method:ident $visit:ident $type:ident $read:ident($($bound:expr),*) $c_type:literal,)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
            visitor.$visit(self.$read($($bound.into(),)* $c_type)? as $type)
        }
    )*};
}

impl<'de> Deserializer<'de> for Reader {
    type Error = Error;

    integers! {
        deserialize_i8 visit_i8 i8 signed(i8::MIN, i8::MAX) "int8_t",
        deserialize_i16 visit_i16 i16 signed(i16::MIN, i16::MAX) "int16_t",
        deserialize_i32 visit_i32 i32 signed(i32::MIN, i32::MAX) "int32_t",
        deserialize_i64 visit_i64 i64 signed(i64::MIN, i64::MAX) "integer",
        deserialize_u8 visit_u8 u8 unsigned(u8::MAX) "uint8_t",
        deserialize_u16 visit_u16 u16 unsigned(u16::MAX) "uint16_t",
        deserialize_u32 visit_u32 u32 unsigned(u32::MAX) "uint32_t",
        deserialize_u64 visit_u64 u64 unsigned(u64::MAX) "uint64",
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(b) => visitor.visit_bool(b),
            Value::Int(n) => match (u64::try_from(n), i64::try_from(n)) {
                (Ok(n), _) => visitor.visit_u64(n),
                (_, Ok(n)) => visitor.visit_i64(n),
                _ => visitor.visit_i128(n),
            },
            Value::Num(n) => visitor.visit_f64(n),
            Value::Text(s) | Value::Str(s) => visitor.visit_string(s),
            Value::List(_) => self.deserialize_seq(visitor),
            Value::Map(m) => visitor.visit_map(Entries::all(m)),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(self.boolean()?)
    }

    fn deserialize_f32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_f64(visitor)
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_f64(self.number()?)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_string(visitor)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_string(self.string()?)
    }

    fn deserialize_char<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_string(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            _ => Err(self.wrong("null")),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        use Value::{Map, Null, Str, Text};
        match (name, &self.0) {
            (Size::TOKEN, _) => visitor.visit_u64(self.bytes()?),
            (VALUE, _)
            | (NODE_REF | NODE_REF_OR_NULL, Text(_) | Str(_) | Map(_))
            | (NODE_REF_OR_NULL, Null) => self.hand_over(visitor),
            (NODE_REF | NODE_REF_OR_NULL, _) => Err(Error::here(Kind::WrongType(name))),
            _ => visitor.visit_newtype_struct(self),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let from_text = self.0.is_from_text();
        match self.0 {
            Value::List(l) => {
                visitor.visit_seq(Elements { left: l.into_iter(), next: 0, from_text })
            }
            _ => Err(self.wrong("array")),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Entries::all(self.object()?))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        // Declared order for the fields, unknown keys last: the error does not depend on how the
        // user ordered the keys, and a missing driver option comes before a superfluous one.
        let mut object = self.object()?;
        let value = Part(&mut object).deserialize_struct(name, fields, visitor);
        let value = value.map_err(|e| e.misspelt(object.iter().map(|(key, _)| key)))?;
        object.finish().map_err(|e| e.meant(fields.iter().copied()))?;
        Ok(value)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        // Rust's own names begin with a capital; a lower-case one is the key of a union.
        let union = name.starts_with(|c: char| c.is_ascii_lowercase());
        if !union {
            let variant = known_variant(self.string()?, variants)?;
            return visitor.visit_enum(Variant { name: variant, rest: None });
        }
        let mut object = self.object()?;
        let tag = object.take(name).ok_or_else(|| Error::new(name, Kind::Missing))?;
        let variant = Reader(tag)
            .string()
            .and_then(|tag| known_variant(tag, variants))
            .map_err(|e| e.under(name))?;
        visitor.visit_enum(Variant { name: variant, rest: Some(object) })
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_unit()
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        self,
        _len: usize,
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.deserialize_seq(visitor)
    }

    forward_to_deserialize_any! { i128 u128 bytes byte_buf unit_struct tuple_struct identifier }
}

fn known_variant(name: String, variants: &[&str]) -> Result<String, Error> {
    if variants.contains(&name.as_str()) {
        Ok(name)
    } else {
        let advice = similar::did_you_mean(&name, variants.iter().copied());
        Err(Error::here(Kind::BadValue(name.into())).with_advice(advice))
    }
}

/// The entries of an object, one after another.
struct Entries {
    left: std::vec::IntoIter<(String, Value)>,
    /// The key that was handed out, and its value, which comes next.
    current: Option<(String, Value)>,
}

impl Entries {
    fn all(map: Map) -> Self {
        Entries { left: map.into_iter(), current: None }
    }
}

impl<'de> MapAccess<'de> for Entries {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some((key, value)) = self.left.next() else {
            return Ok(None);
        };
        let found = seed.deserialize(key.as_str().into_deserializer())?;
        self.current = Some((key, value));
        Ok(Some(found))
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Error> {
        let (key, value) = self.current.take().expect("serde asks for a value after its key");
        seed.deserialize(Reader(value)).map_err(|e| e.under(&key))
    }
}

/// The elements of a list.
struct Elements {
    left: std::vec::IntoIter<Value>,
    next: usize,
    /// Whether errors name elements `a.0` or `a[0]`.
    from_text: bool,
}

impl<'de> SeqAccess<'de> for Elements {
    type Error = Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, Error> {
        let Some(value) = self.left.next() else {
            return Ok(None);
        };
        let at = self.next;
        self.next += 1;
        let element = seed.deserialize(Reader(value)).map_err(|e| {
            e.under(&if self.from_text { at.to_string() } else { format!("[{at}]") })
        })?;
        Ok(Some(element))
    }
}

/// A chosen variant, and for a union the keys beside the one that chose it.
struct Variant {
    name: String,
    rest: Option<Map>,
}

impl<'de> EnumAccess<'de> for Variant {
    type Error = Error;
    type Variant = Variant;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Self), Error> {
        let chosen = seed.deserialize(self.name.as_str().into_deserializer())?;
        Ok((chosen, self))
    }
}

impl<'de> VariantAccess<'de> for Variant {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        self.rest.map_or(Ok(()), Map::finish)
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Error> {
        match self.rest {
            Some(rest) => seed.deserialize(Reader(Value::Map(rest))),
            None => Err(Error::here(Kind::WrongType("object"))),
        }
    }

    fn tuple_variant<V: Visitor<'de>>(self, _len: usize, _visitor: V) -> Result<V::Value, Error> {
        Err(Error::here(Kind::WrongType("object")))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.rest {
            Some(rest) => Reader(Value::Map(rest)).deserialize_struct("", fields, visitor),
            None => Err(Error::here(Kind::WrongType("object"))),
        }
    }
}

#[cfg(test)]
#[path = "de_tests.rs"]
mod tests;
