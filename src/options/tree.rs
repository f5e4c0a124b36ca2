//! The option tree: ordered, typed where the source was typed, bounded in depth and width.
//!
//! Guards two rules. A dotted key and a nested object are one thing (`crumple`), and a key is
//! either a plain value, an object or a list, never two of them.

use super::error::{Error, Kind};

/// Deepest nesting any parser accepts; recursion over a parsed tree is bounded by it.
pub const MAX_DEPTH: usize = 64;

/// Most keys any parser accepts in one object. Look-ups are linear; this keeps them cheap.
pub const MAX_KEYS: usize = 1024;

/// Longest text, in bytes, that a parser looks at.
pub const MAX_TEXT: usize = 4 << 20;

/// Most bytes of keys that [`Map::flatten`] may produce.
const MAX_FLAT: usize = 16 << 20;

/// One option value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// JSON `null`, which says "nothing, on purpose" (`"backing": null`).
    Null,
    /// JSON `true` or `false`.
    Bool(bool),
    /// A JSON number without fraction or exponent, exact over the ranges of `i64` and `u64`.
    Int(i128),
    /// Any other JSON number; always finite.
    Num(f64),
    /// Text without a type, from keyval or a file name: the reader says what it means.
    Text(String),
    /// A JSON string: text and nothing else.
    Str(String),
    /// A list.
    List(Vec<Value>),
    /// An object.
    Map(Map),
}

impl Value {
    /// The characters of a [`Value::Text`] or [`Value::Str`].
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Text(s) | Value::Str(s) => Some(s),
            _ => None,
        }
    }

    /// True if the value, or the first plain value inside it, came as text. One tree has one
    /// source, so this tells text's lists and objects (`a.0=`, `a.b=`) from JSON's.
    pub(super) fn is_from_text(&self) -> bool {
        let mut at = self;
        loop {
            at = match at {
                Value::Text(_) => return true,
                Value::Map(m) => match m.entries.first() {
                    Some((_, v)) => v,
                    None => return false,
                },
                Value::List(l) => match l.first() {
                    Some(v) => v,
                    None => return false,
                },
                _ => return false,
            }
        }
    }

    /// The value with all plain values turned to text, `null` excepted. `json:{…}` file names are
    /// read so: they accept `"size": "1M"` as well as `"size": 1048576`.
    #[must_use]
    pub fn into_text(self) -> Value {
        match self {
            Value::Null => Value::Null,
            Value::Bool(b) => Value::Text(if b { "on" } else { "off" }.to_owned()),
            Value::Int(i) => Value::Text(i.to_string()),
            Value::Num(n) => Value::Text(n.to_string()),
            Value::Text(s) | Value::Str(s) => Value::Text(s),
            Value::List(l) => Value::List(l.into_iter().map(Value::into_text).collect()),
            Value::Map(m) => Value::Map(m.into_text()),
        }
    }
}

impl From<&str> for Value {
    fn from(s: &str) -> Self {
        Value::Str(s.to_owned())
    }
}
impl From<String> for Value {
    fn from(s: String) -> Self {
        Value::Str(s)
    }
}
impl From<bool> for Value {
    fn from(b: bool) -> Self {
        Value::Bool(b)
    }
}
impl From<u64> for Value {
    fn from(n: u64) -> Self {
        Value::Int(n.into())
    }
}
impl From<i64> for Value {
    fn from(n: i64) -> Self {
        Value::Int(n.into())
    }
}
impl From<Map> for Value {
    fn from(m: Map) -> Self {
        Value::Map(m)
    }
}
impl<T: Into<Value>> From<Vec<T>> for Value {
    fn from(l: Vec<T>) -> Self {
        Value::List(l.into_iter().map(Into::into).collect())
    }
}

/// An object: unique keys in the order they came.
///
/// Two maps are equal if they hold the same keys and values in the same order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Map {
    entries: Vec<(String, Value)>,
}

impl Map {
    /// An empty object.
    pub fn new() -> Self {
        Map::default()
    }

    /// True without any key.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The value at `key`, taken literally: dots in it are not a path.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    /// The value at `key`, for change.
    pub fn get_mut(&mut self, key: &str) -> Option<&mut Value> {
        self.entries.iter_mut().find(|(k, _)| k == key).map(|(_, v)| v)
    }

    /// True if `key` is present.
    pub fn contains(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// The value at a dotted path through objects and lists: `file.cache.direct`, `children.0`.
    pub fn get_path(&self, path: &str) -> Option<&Value> {
        let mut parts = path.split('.');
        let mut at = self.get(parts.next()?)?;
        for part in parts {
            at = match at {
                Value::Map(m) => m.get(part)?,
                Value::List(l) => l.get(part.parse::<usize>().ok()?)?,
                _ => return None,
            };
        }
        Some(at)
    }

    /// Sets `key`, in its old place if it was there; returns what was there.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) -> Option<Value> {
        let (key, value) = (key.into(), value.into());
        match self.get_mut(&key) {
            Some(slot) => Some(std::mem::replace(slot, value)),
            None => {
                self.entries.push((key, value));
                None
            }
        }
    }

    /// Removes `key` and returns its value. What is left at the end is what nobody asked for.
    pub fn take(&mut self, key: &str) -> Option<Value> {
        let at = self.entries.iter().position(|(k, _)| k == key)?;
        Some(self.entries.remove(at).1)
    }

    /// Removes `key`, which must be a string.
    pub fn take_str(&mut self, key: &str) -> Result<Option<String>, Error> {
        self.take_as(key)
    }

    /// Removes `key`, which must be a boolean (from text: `on`, `off` and their other spellings).
    pub fn take_opt_bool(&mut self, key: &str) -> Result<Option<bool>, Error> {
        self.take_as(key)
    }

    /// Removes `key`, which must be there and a string.
    pub fn take_required_str(&mut self, key: &str) -> Result<String, Error> {
        self.take_str(key)?.ok_or_else(|| Error::new(key, Kind::Missing))
    }

    /// Fails with the first key that is left: the last line of a reader that takes keys by hand.
    pub fn finish(self) -> Result<(), Error> {
        match self.entries.first() {
            Some((key, _)) => Err(Error::new(key, Kind::Unexpected)),
            None => Ok(()),
        }
    }

    /// The keys and values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// Adds everything in `other`. A key in both must be an object in both, which are then merged,
    /// or hold equal values; anything else is refused, for nothing says which one is meant.
    pub fn merge(&mut self, other: Map) -> Result<(), Error> {
        for (key, value) in other.entries {
            match (self.get_mut(&key), value) {
                (None, value) => self.entries.push((key, value)),
                (Some(Value::Map(mine)), Value::Map(other)) => {
                    mine.merge(other).map_err(|e| e.under(&key))?;
                }
                (Some(mine), other) if *mine == other => {}
                (Some(Value::Map(_) | Value::List(_)), _) | (_, Value::Map(_) | Value::List(_)) => {
                    return Err(Error::new(&key, Kind::Inconsistent));
                }
                _ => return Err(Error::new(&key, Kind::Twice)),
            }
        }
        Ok(())
    }

    /// All plain values as text, see [`Value::into_text`].
    #[must_use]
    pub fn into_text(self) -> Map {
        let entries = self.entries.into_iter();
        Map { entries: entries.map(|(k, v)| (k, v.into_text())).collect() }
    }

    /// The tree as one level of dotted keys: `{"a": {"b": [1]}}` is `a.b.0`. Empty objects and
    /// lists stay as values. Fails if the keys would take an unreasonable amount of memory.
    pub fn flatten(self) -> Result<Map, Error> {
        let mut flat = Flat { out: Map::new(), bytes: 0 };
        flat.add_map(String::new(), self)?;
        Ok(flat.out)
    }

    /// Dotted keys, at any level, as nested objects and lists.
    ///
    /// A plain value with keys below it, an object with names and numbers for keys, one value
    /// given twice and a list with a gap are refused.
    pub fn crumple(self) -> Result<Map, Error> {
        let mut root = Map::new();
        for (key, value) in self.entries {
            root.place(&key, value, 0, OnRepeat::Compare)?;
        }
        root.numbers_to_lists()?;
        Ok(root)
    }

    /// Puts `value` where the dotted `key` says, `depth` levels below the root. Lists are kept as
    /// objects with numbers for keys until [`Map::numbers_to_lists`].
    pub(super) fn place(
        &mut self,
        key: &str,
        value: Value,
        depth: usize,
        on_repeat: OnRepeat,
    ) -> Result<(), Error> {
        let (path, last) = match key.rsplit_once('.') {
            Some((path, last)) => (Some(path), last),
            None => (None, key),
        };
        let levels = path.map_or(0, |p| p.split('.').count());
        let depth = depth + levels + 1;
        if depth > MAX_DEPTH {
            return Err(Error::here(TOO_DEEP));
        }
        if key.split('.').any(str::is_empty) {
            return Err(Error::new(key, Kind::BadName));
        }

        let mut at = self;
        let mut done = 0;
        for part in path.into_iter().flat_map(|p| p.split('.')) {
            done += part.len() + 1;
            at = at.object_at(part).map_err(|kind| Error::new(&key[..done - 1], kind))?;
        }

        let within = |e: Error| e.under(key);
        match value {
            Value::Map(inner) => {
                let object = at.object_at(last).map_err(|kind| Error::new(key, kind))?;
                for (k, v) in inner.entries {
                    object.place(&k, v, depth, on_repeat).map_err(within)?;
                }
            }
            Value::List(inner) if !inner.is_empty() => {
                let object = at.object_at(last).map_err(|kind| Error::new(key, kind))?;
                for (i, v) in inner.into_iter().enumerate() {
                    object.place(&i.to_string(), v, depth, on_repeat).map_err(within)?;
                }
            }
            plain => match at.get_mut(last) {
                None => {
                    at.check_room().map_err(Error::here)?;
                    at.entries.push((last.to_owned(), plain));
                }
                Some(Value::Map(_)) => return Err(Error::new(key, Kind::Inconsistent)),
                Some(slot) if on_repeat == OnRepeat::Replace => *slot = plain,
                Some(slot) if *slot == plain => {}
                Some(_) => return Err(Error::new(key, Kind::Twice)),
            },
        }
        Ok(())
    }

    /// The object at `key`, made if there is none.
    fn object_at(&mut self, key: &str) -> Result<&mut Map, Kind> {
        // By index, for a borrow returned from one arm would bar the other.
        let at = match self.entries.iter().position(|(k, _)| k == key) {
            Some(at) => at,
            None => {
                self.check_room()?;
                self.entries.push((key.to_owned(), Value::Map(Map::new())));
                self.entries.len() - 1
            }
        };
        match &mut self.entries[at].1 {
            Value::Map(m) => Ok(m),
            _ => Err(Kind::Inconsistent),
        }
    }

    fn check_room(&self) -> Result<(), Kind> {
        if self.entries.len() >= MAX_KEYS {
            return Err(TOO_MANY);
        }
        Ok(())
    }

    /// Adds a key that the caller knows to be absent; fails if the object is full.
    pub(super) fn push_new(&mut self, key: String, value: Value) -> Result<(), Error> {
        self.check_room().map_err(Error::here)?;
        self.entries.push((key, value));
        Ok(())
    }

    /// Turns every object below the root whose keys are all numbers into a list.
    pub(super) fn numbers_to_lists(&mut self) -> Result<(), Error> {
        for (key, value) in &mut self.entries {
            let Value::Map(inner) = value else { continue };
            inner.numbers_to_lists().map_err(|e| e.under(key))?;
            let numbers = inner.entries.iter().filter(|(k, _)| is_number(k)).count();
            if numbers == 0 {
                continue;
            }
            if numbers != inner.len() {
                return Err(Error::new(key, Kind::Inconsistent));
            }
            let mut list = Vec::with_capacity(numbers);
            for i in 0..numbers {
                let i = i.to_string();
                let element = inner
                    .get_mut(&i)
                    .ok_or_else(|| Error::new(&i, Kind::MissingElement).under(key))?;
                list.push(std::mem::replace(element, Value::Null));
            }
            *value = Value::List(list);
        }
        Ok(())
    }
}

/// What a second plain value for one key means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnRepeat {
    /// The last one counts, as on a command line.
    Replace,
    /// It must be the same value.
    Compare,
}

pub(super) const TOO_DEEP: Kind = Kind::Limit { what: "levels of nesting", limit: MAX_DEPTH };
const TOO_MANY: Kind = Kind::Limit { what: "keys in one object", limit: MAX_KEYS };

/// Refuses text beyond [`MAX_TEXT`]; the first line of every parser.
pub(super) fn check_length(text: &str) -> Result<(), Error> {
    if text.len() > MAX_TEXT {
        return Err(Error::here(Kind::Limit { what: "bytes of text", limit: MAX_TEXT }));
    }
    Ok(())
}

fn is_number(key: &str) -> bool {
    key.bytes().all(|b| b.is_ascii_digit())
}

/// The state of [`Map::flatten`].
struct Flat {
    out: Map,
    bytes: usize,
}

impl Flat {
    fn add_map(&mut self, path: String, map: Map) -> Result<(), Error> {
        for (key, value) in map.entries {
            self.add(join(&path, &key), value)?;
        }
        Ok(())
    }

    fn add(&mut self, path: String, value: Value) -> Result<(), Error> {
        self.bytes += path.len();
        if self.bytes > MAX_FLAT {
            return Err(Error::here(Kind::Limit { what: "bytes of keys", limit: MAX_FLAT }));
        }
        match value {
            Value::Map(m) if !m.is_empty() => self.add_map(path, m),
            Value::List(l) if !l.is_empty() => {
                for (i, v) in l.into_iter().enumerate() {
                    self.add(join(&path, &i.to_string()), v)?;
                }
                Ok(())
            }
            plain => {
                self.out.entries.push((path, plain));
                Ok(())
            }
        }
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

impl IntoIterator for Map {
    type Item = (String, Value);
    type IntoIter = std::vec::IntoIter<(String, Value)>;
    fn into_iter(self) -> Self::IntoIter {
        self.entries.into_iter()
    }
}

impl<K: Into<String>, V: Into<Value>> FromIterator<(K, V)> for Map {
    /// Later keys replace earlier ones.
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        let mut map = Map::new();
        for (k, v) in pairs {
            map.insert(k, v);
        }
        map
    }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
