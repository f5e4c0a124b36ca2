//! The command `reopen`, which closes the image and opens it with other options.
//!
//! The rule held here: options that decide which disk it is can be given again, but not changed.

use super::images::{ToOpen, parse_cache};
use super::words::Words;
use super::{Said, Session};
use crate::block::{Kind, Node, named};
use crate::drivers;
use crate::options::{self, Map, Value};
use crate::tools::{Opened, naming};

/// Options of all nodes that can be changed.
const OF_ALL: [&str; 5] = ["auto-read-only", "cache", "detect-zeroes", "discard", "read-only"];

impl Session {
    /// The command `reopen`: the image is closed and opened again, in another way.
    pub(super) async fn reopen(&mut self, words: &Words<'_>) -> Said {
        if !words.operands.is_empty() {
            return self.usage();
        }
        if words.has('r') && words.has('w') {
            self.context.error("Only one -r/-w option may be given");
            return None;
        }
        let (image, now) = self.image.clone()?;
        let mut wanted = now.clone();
        if let Err(text) = self.change(&mut wanted, &image, words) {
            self.context.error(&text);
            return None;
        }
        drop(image);
        self.close().await;
        let Err(error) = self.try_open(&wanted).await else { return Some(()) };
        self.report(&error, &wanted, "");
        self.open(now).await?;
        None
    }

    /// What the options of `reopen` change.
    fn change(&self, wanted: &mut ToOpen, image: &Opened, words: &Words<'_>) -> Result<(), String> {
        if words.has('r') {
            wanted.read_only = true;
        }
        if words.has('w') {
            wanted.read_only = false;
        }
        if let Some(text) = words.get('c') {
            wanted.cache = parse_cache(text)?;
        }
        let Some(text) = words.get('o') else { return Ok(()) };
        let registry = drivers::registry();
        let warn = |text: &str| self.context.warn(text);
        let options = naming::option_string(registry, text, None, warn);
        let mut options = options.map_err(|e| e.to_string())?;
        let text = |e: options::Error| e.to_string();
        if words.has('c') && options.contains("cache") {
            return Err("Cannot set both -c and the cache options".into());
        }
        if let Some(value) = options.take_opt_bool("read-only").map_err(text)? {
            if words.has('r') || words.has('w') {
                return Err("Cannot set both -r/-w and 'read-only'".into());
            }
            if value && !wanted.read_only {
                // Only -r gives up writing.
                let name = image.node().name();
                return Err(format!(
                    "Read-only block node '{name}' cannot support read-write users"
                ));
            }
            wanted.read_only = value;
        }
        if let Some(Value::Map(cache)) = options.get_mut("cache") {
            if let Some(value) = cache.take_opt_bool("direct").map_err(text)? {
                wanted.cache.direct = value;
            }
            if let Some(value) = cache.take_opt_bool("no-flush").map_err(text)? {
                wanted.cache.no_flush = value;
            }
            if let Some((key, _)) = cache.iter().next() {
                return Err(format!("Cannot change the option 'cache.{key}'"));
            }
            options.take("cache");
        }
        let given = match wanted.image_opts {
            true => naming::option_string(registry, &wanted.name, Some("file"), |_| ()),
            false => Ok(Map::new()),
        };
        let given = named::overlay(given.map_err(|e| e.to_string())?, wanted.more.clone());
        let more = changed(image.node(), options, &given)?;
        wanted.more = named::overlay(std::mem::take(&mut wanted.more), more);
        Ok(())
    }
}

/// Those of `options` that say something new of the node and of those below it. `given` is what it was opened
/// with.
fn changed(node: &Node, options: Map, given: &Map) -> Result<Map, String> {
    let driver = node.driver();
    let own = driver.own_options();
    let entry = driver.entry();
    // Others do not read their options a second time.
    let known = if entry.kind == Kind::Format { entry.options } else { &[] };
    let is_child = |key: &str| entry.children.iter().any(|role| role.name() == key);
    let can_change = |key: &str| {
        let is_known = known.iter().any(|option| {
            let rest = option.name.strip_prefix(key);
            !is_child(option.name) && rest.is_some_and(|r| r.is_empty() || r.starts_with('.'))
        });
        is_known || OF_ALL.contains(&key)
    };
    let mut changed = Map::new();
    for (key, value) in options {
        let child = driver.children().iter().find(|child| child.role().name() == key);
        let now = given.get(&key).or_else(|| own.get(&key)).cloned().map(Value::into_text);
        match (child, value) {
            (Some(child), Value::Map(options)) => {
                let none = Map::new();
                let given = match given.get(&key) {
                    Some(Value::Map(given)) => given,
                    _ => &none,
                };
                let below = self::changed(&child.node(), options, given)?;
                if !below.is_empty() {
                    changed.insert(key, below);
                }
            }
            (None, Value::Text(name)) if key == "driver" && name == driver.name() => {}
            (None, value) if can_change(&key) => drop(changed.insert(key, value)),
            (None, value) if now.as_ref() == Some(&value) => {}
            _ => return Err(format!("Cannot change the option '{key}'")),
        }
    }
    Ok(changed)
}
