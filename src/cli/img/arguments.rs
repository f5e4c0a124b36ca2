//! Options that several subcommands share: how they are called, and what their values mean.

use super::{Context, Failed, object};
use crate::block::{DriverEntry, Error, SnapshotKey};
use crate::cli::getopt::{Line, Opt, long_switch, long_valued, switch, valued};
use crate::drivers;
use crate::io::Errno;
use crate::options::{Map, qemuopts, size};
use crate::tools::progress::Show;
use crate::tools::{Cache, Opened, Progress, Wanted};

pub const OBJECT: Opt =
    long_valued("object", "OBJECT", "an object that the image needs, such as a secret");
pub const IMAGE_OPTS: Opt =
    long_switch("image-opts", "the image is named by a string of options (driver=raw,…)");
pub const FORMAT: Opt = valued("f", "format", "FORMAT", "the image's format; guessed if not given");
pub const PLAIN_FORMAT: Opt =
    valued("f", "", "FORMAT", "the image's format; guessed if not given").newer(&["format"]);
pub const FORCE_SHARE: Opt =
    switch("U", "force-share", "open the image even while others write to it");
pub const OUTPUT: Opt = long_valued("output", "human|json", "the form of the output (human)");
pub const QUIET: Opt = switch("q", "", "say nothing but errors").newer(&["quiet"]);
pub const PROGRESS: Opt = switch("p", "", "show how far the work has come").newer(&["progress"]);
pub const CACHE: Opt =
    valued("t", "", "CACHE", "cache mode for the image that is written").newer(&["cache"]);
pub const SOURCE_CACHE: Opt = valued("T", "", "CACHE", "cache mode for images that are read");

/// The format of this name, which an option gives.
pub fn format(name: &str) -> Result<&'static DriverEntry, Failed> {
    let registry = drivers::registry();
    registry.get(name).ok_or_else(|| {
        let error = Error::new(format!("Unknown file format '{name}'"));
        error.with_advice(Some(registry.advice(name))).into()
    })
}

/// Reads a size, as an option's value: `what` is what it is the size of.
pub fn number(text: &str, what: &str, min: u64, max: u64) -> Result<u64, Failed> {
    match size::parse(text) {
        Ok(value) if (min..=max).contains(&value) => Ok(value),
        Err(size::BadSize::NotASize) => Err(Failed::from(format!(
            "Invalid {what} specified. You may use k, M, G, T, P or E suffixes for\n\
             kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        ))),
        _ => {
            Err(Failed::from(format!("Invalid {what} specified. Must be between {min} and {max}.")))
        }
    }
}

/// Reads a size of any value.
pub fn any_number(text: &str, what: &str) -> Result<u64, Failed> {
    number(text, what, 0, i64::MAX as u64)
}

/// The cache mode that `key` gives; `what` is what the option is called.
pub fn cache(line: &Line, key: &str, what: &str, default: Cache) -> Result<Cache, Failed> {
    match line.get(key) {
        None => Ok(default),
        Some(text) => {
            Cache::parse(text).ok_or_else(|| Failed::from(format!("Invalid {what} option: {text}")))
        }
    }
}

/// Whether a list of `-o` can be joined with others: it has no empty items at its ends.
pub fn check_option_list(text: &str) -> Result<(), Failed> {
    // A comma at the end may be half of one that is meant.
    let commas = text.bytes().rev().take_while(|&byte| byte == b',').count();
    if text.is_empty() || text.starts_with(',') && !text.starts_with(",,") || commas % 2 == 1 {
        return Err(format!("Invalid option list: {text}").into());
    }
    Ok(())
}

/// Adds the options of one more `-o`: of what is said twice, the last counts.
pub fn add_options(given: &mut Map, more: Map) {
    for (key, value) in more {
        given.insert(&key, value);
    }
}

/// The value of `-l`, the name of an internal snapshot: `snapshot.id=…,snapshot.name=…`, or a name or number
/// alone.
pub struct Snapshot {
    id: Option<String>,
    name: Option<String>,
    /// Either of them.
    any: Option<String>,
}

impl Snapshot {
    pub fn parse(text: &str) -> Result<Snapshot, Failed> {
        if !text.starts_with("snapshot.") {
            return Ok(Snapshot { id: None, name: None, any: Some(text.to_owned()) });
        }
        let failed = |e: crate::options::Error| {
            Failed::from(format!("{e}\nFailed in parsing snapshot param '{text}'"))
        };
        let mut options = qemuopts::parse(text, None).map_err(failed)?.options;
        let id = options.take_str("snapshot.id").map_err(failed)?;
        let name = options.take_str("snapshot.name").map_err(failed)?;
        options.finish_known().map_err(failed)?;
        Ok(Snapshot { id, name, any: None })
    }

    fn key(&self) -> Option<SnapshotKey<'_>> {
        match (&self.any, &self.id, &self.name) {
            (Some(any), ..) => Some(SnapshotKey::IdOrName(any)),
            (None, Some(id), Some(name)) => Some(SnapshotKey::IdAndName(id, name)),
            (None, Some(id), None) => Some(SnapshotKey::Id(id)),
            (None, None, Some(name)) => Some(SnapshotKey::Name(name)),
            (None, None, None) => None,
        }
    }

    /// Turns an image that was opened for reading to it.
    pub async fn load(&self, image: &Opened) -> Result<(), Failed> {
        let failed = |text: String| Failed::from(format!("Failed to load snapshot: {text}"));
        let Some(snapshots) = image.node().driver().image().and_then(|image| image.snapshots())
        else {
            return Err(failed(format!(
                "Block format '{}' used by device '' does not support temporarily loading internal \
                 snapshots",
                image.format()
            )));
        };
        let loaded = match self.key() {
            Some(key) => snapshots.load(key).await,
            None => return Err(failed("snapshot_id and name are both NULL".into())),
        };
        loaded.map_err(|error| match error.errno() {
            Some(Errno(libc::ENOENT)) => failed("Can't find snapshot".into()),
            _ => failed(error.to_string()),
        })
    }
}

/// Whether the output is to be JSON.
pub fn json(line: &Line) -> Result<bool, Failed> {
    match line.get("output") {
        None | Some("human") => Ok(false),
        Some("json") => Ok(true),
        Some(_) => Err("--output must be used with human or json as argument.".into()),
    }
}

/// Makes the objects of `--object`. Whether a list of them was all that was wanted.
pub fn objects(line: &Line) -> Result<bool, Failed> {
    for text in line.all("object") {
        if object::add(text)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What an image's name and the shared options say of it.
///
/// # Errors
/// `-f` and `--image-opts` together, or options that `-U` contradicts.
pub fn wanted<'a>(
    line: &'a Line,
    name: &'a str,
    format_key: &str,
    image_opts_key: &str,
) -> Result<Wanted<'a>, Failed> {
    let (format, image_opts) = (line.get(format_key), line.has(image_opts_key));
    if image_opts && format.is_some() {
        return Err("--image-opts and --format are mutually exclusive".into());
    }
    let force_share = line.has("force-share");
    let unshared = |item: &str| matches!(item, "force-share=off" | "noforce-share");
    if image_opts && force_share && name.split(',').any(unshared) {
        return Err("--force-share/-U conflicts with image options".into());
    }
    Ok(Wanted { name, image_opts, format, force_share, ..Wanted::default() })
}

/// The one image that a subcommand is about.
pub fn one_operand(line: &Line) -> Result<&str, Failed> {
    match &*line.operands {
        [name] => Ok(name),
        _ => Err(Failed::usage("Expecting one image file name")),
    }
}

impl Context {
    /// The progress of long work, shown as the command line wants it.
    pub(super) fn progress(&self, line: &Line) -> Progress {
        Progress::new(match (line.has("q"), line.has("p")) {
            (true, _) => Show::Nothing,
            (false, _) if self.draws_bars => Show::Bar,
            (false, true) => Show::Lines,
            (false, false) => Show::Nothing,
        })
    }
}
