//! The command `open`, and the messages of opening an image.

use super::words::Words;
use super::{Said, Session};
use crate::block::Error;
use crate::drivers;
use crate::options::Map;
use crate::tools::output::errln;
use crate::tools::{Cache, Wanted, naming};
use std::rc::Rc;

/// How an image is to be opened.
#[derive(Clone)]
pub struct ToOpen {
    pub name: String,
    pub image_opts: bool,
    pub format: Option<String>,
    pub read_only: bool,
    /// Discards are passed on.
    pub unmap: bool,
    pub force_share: bool,
    /// Writes are kept apart from the image.
    pub snapshot: bool,
    /// What is read from backing files is written to the image.
    pub copy_on_read: bool,
    /// The kernel's older asynchronous I/O was asked for, which goes around the page cache alone.
    pub native: bool,
    pub cache: Cache,
    /// More options of the node.
    pub more: Map,
}

impl Default for ToOpen {
    fn default() -> ToOpen {
        ToOpen {
            name: String::new(),
            image_opts: false,
            format: None,
            read_only: false,
            unmap: true,
            force_share: false,
            snapshot: false,
            copy_on_read: false,
            native: false,
            cache: Cache { write_through: true, ..Cache::WRITEBACK },
            more: Map::new(),
        }
    }
}

/// Reads a discard mode.
pub fn parse_discard(text: &str) -> Result<bool, String> {
    match text {
        "ignore" | "off" => Ok(false),
        "unmap" | "on" => Ok(true),
        _ => Err(format!("Invalid discard option: {text}")),
    }
}

pub fn parse_cache(text: &str) -> Result<Cache, String> {
    Cache::parse(text).ok_or_else(|| format!("Invalid cache option: {text}"))
}

pub fn check_aio(text: &str) -> Result<(), String> {
    match text {
        "threads" | "native" | "io_uring" => Ok(()),
        _ => Err(format!("Invalid aio option: {text}")),
    }
}

impl Session {
    /// Opens an image. Errors are printed on standard error.
    pub(super) async fn open(&mut self, wanted: ToOpen) -> Said {
        if self.image.is_some() {
            self.context.error("file open already, try 'help close'");
            return None;
        }
        match self.try_open(&wanted).await {
            Ok(()) => Some(()),
            Err(error) => {
                let device = match wanted.image_opts {
                    true => String::new(),
                    false => format!(" device {}", wanted.name),
                };
                self.report(&error, &wanted, &format!("can't open{device}: "));
                None
            }
        }
    }

    /// Tells why an image was not opened, without its name.
    pub(super) fn report(&self, error: &Error, wanted: &ToOpen, before: &str) {
        let text = error.to_string();
        let outer = format!("Could not open '{}': ", wanted.name);
        let inner = text.strip_prefix(&outer).unwrap_or(&text);
        self.context.error(&format!("{before}{inner}"));
        if let Some(hint) = error.hint() {
            errln!("{hint}");
        }
    }

    pub(super) async fn try_open(&mut self, wanted: &ToOpen) -> Result<(), Error> {
        if wanted.native && !wanted.cache.direct {
            return Err(Error::new(
                "aio=native was specified, but it requires cache.direct=on, which was not specified.",
            ));
        }
        let image = self
            .images
            .open(&Wanted {
                name: &wanted.name,
                image_opts: wanted.image_opts,
                format: wanted.format.as_deref(),
                writable: !wanted.read_only,
                unmap: wanted.unmap,
                force_share: wanted.force_share,
                snapshot: wanted.snapshot,
                copy_on_read: wanted.copy_on_read,
                cache: wanted.cache,
                more: wanted.more.clone(),
                ..Wanted::default()
            })
            .await?;
        self.image = Some((Rc::new(image), wanted.clone()));
        Ok(())
    }

    /// The command `open`.
    pub(super) async fn open_again(&mut self, words: &Words<'_>) -> Said {
        let wanted = match described(words) {
            Ok(wanted) => wanted,
            Err(text) => {
                self.context.error(&text);
                return None;
            }
        };
        match &*words.operands {
            [] if words.has('o') => self.open(wanted).await,
            [name] => {
                let mut wanted = wanted;
                if wanted.image_opts {
                    // The options go with the name.
                    let registry = drivers::registry();
                    let warn = |text: &str| self.context.warn(text);
                    match naming::option_string(registry, &wanted.name, None, warn) {
                        Ok(options) => wanted.more = options,
                        Err(error) => {
                            self.context.error(&error.to_string());
                            return None;
                        }
                    }
                    wanted.image_opts = false;
                }
                wanted.name = (*name).to_owned();
                self.open(wanted).await
            }
            _ => self.usage(),
        }
    }
}

/// What the options of `open` say.
fn described(words: &Words<'_>) -> Result<ToOpen, String> {
    let mut wanted = ToOpen {
        read_only: words.has('r'),
        snapshot: words.has('s'),
        copy_on_read: words.has('C'),
        native: words.has('k') || words.get('i') == Some("native"),
        force_share: words.has('U'),
        ..ToOpen::default()
    };
    if words.has('n') {
        wanted.cache = Cache { direct: true, ..Cache::WRITEBACK };
    }
    if let Some(text) = words.get('t') {
        wanted.cache = parse_cache(text)?;
    }
    if let Some(text) = words.get('d') {
        wanted.unmap = parse_discard(text)?;
    }
    if let Some(text) = words.get('i') {
        check_aio(text)?;
    }
    if let Some(text) = words.get('o') {
        wanted.name = text.to_owned();
        wanted.image_opts = true;
    }
    Ok(wanted)
}
