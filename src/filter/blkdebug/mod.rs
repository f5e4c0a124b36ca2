//! blkdebug, a test filter that makes chosen requests fail or stop, or imposes stricter limits.
//!
//! | file | it holds |
//! |---|---|
//! | `rules` | which request fails, by events and a state; breakpoints |
//! | `config` | rules from a file |
//!
//! All requests take the slow path here. Both `blkdebug:CONFIG:IMAGE` (CONFIG may be empty) and
//! options open it.

mod config;
mod rules;

use crate::block::event::Hearing;
use crate::block::pass_through::{PassThrough, read_inside, status_of, write_inside};
use crate::block::*;
use crate::io::{self, InFlight, IoResult, IoVec};
use crate::options::{Map, NodeRef, Value};
use rules::{InjectError, IoType, Rules, SetState};
use serde::Deserialize;

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::Image],
    options: &[
        OptionHelp { name: "image", value: "node", help: "The node whose requests shall fail" },
        OptionHelp { name: "config", value: "str", help: "A file with rules" },
        OptionHelp {
            name: "inject-error.N.event",
            value: "str",
            help: "Rule: requests fail from this event on (none: from the beginning)",
        },
        OptionHelp { name: "inject-error.N.state", value: "int", help: "only in this state" },
        OptionHelp {
            name: "inject-error.N.iotype",
            value: "read|write|write-zeroes|discard|flush|block-status",
            help: "only this kind (all but block-status)",
        },
        OptionHelp { name: "inject-error.N.errno", value: "int", help: "with this error (EIO)" },
        OptionHelp { name: "inject-error.N.sector", value: "int", help: "only where this is hit" },
        OptionHelp { name: "inject-error.N.once", value: "on|off", help: "only the first (off)" },
        OptionHelp {
            name: "inject-error.N.immediately",
            value: "on|off",
            help: "without letting others run first (off)",
        },
        OptionHelp { name: "set-state.N.event", value: "str", help: "Rule: this event changes" },
        OptionHelp { name: "set-state.N.state", value: "int", help: "this state (any)" },
        OptionHelp {
            name: "set-state.N.new_state",
            value: "int",
            help: "to this (it begins as 1)",
        },
        OptionHelp { name: "align", value: "int", help: "Request alignment, in bytes" },
        OptionHelp { name: "max-transfer", value: "int", help: "Most bytes in one transfer" },
        OptionHelp { name: "opt-write-zero", value: "int", help: "Alignment of zeroing" },
        OptionHelp { name: "max-write-zero", value: "int", help: "Most bytes zeroed at once" },
        OptionHelp { name: "opt-discard", value: "int", help: "Alignment of discards" },
        OptionHelp { name: "max-discard", value: "int", help: "Most bytes discarded at once" },
        OptionHelp {
            name: "take-child-perms.N",
            value: "consistent-read|write|write-unchanged|resize",
            help: "Permissions to hold on the image besides",
        },
        OptionHelp {
            name: "unshare-child-perms.N",
            value: "consistent-read|write|write-unchanged|resize",
            help: "Permissions on the image that others may not hold",
        },
    ],
    prefixes: &["blkdebug"],
    naming: Naming::Own(read_name),
    ..DriverEntry::new("blkdebug", Kind::Filter, |opening, options| {
        Box::pin(open(opening, options))
    })
};

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    image: NodeRef,
    config: Option<String>,
    #[serde(default)]
    inject_error: Vec<InjectError>,
    #[serde(default)]
    set_state: Vec<SetState>,
    align: Option<i64>,
    max_transfer: Option<i64>,
    opt_write_zero: Option<i64>,
    max_write_zero: Option<i64>,
    opt_discard: Option<i64>,
    max_discard: Option<i64>,
    #[serde(default)]
    take_child_perms: Vec<PermName>,
    #[serde(default)]
    unshare_child_perms: Vec<PermName>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum PermName {
    ConsistentRead,
    Write,
    WriteUnchanged,
    Resize,
}

fn perms(names: &[PermName]) -> Perm {
    let each = names.iter().map(|name| match name {
        PermName::ConsistentRead => Perm::CONSISTENT_READ,
        PermName::Write => Perm::WRITE,
        PermName::WriteUnchanged => Perm::WRITE_UNCHANGED,
        PermName::Resize => Perm::RESIZE,
    });
    each.collect()
}

struct Blkdebug {
    image: [Child; 1],
    /// As given, but for the image.
    options: Map,
    limits: Limits,
    rules: Rules,
    taken: Perm,
    unshared: Perm,
    _hearing: Hearing,
}

async fn open(opening: &mut Opening, options: Map) -> Result<Box<dyn Driver>, Error> {
    let mut given = options.clone();
    given.take("image");
    let options: Options = opening.parse(options)?;
    let (mut errors, mut transitions) = (Vec::new(), Vec::new());
    if let Some(filename) = options.config.filter(|name| !name.is_empty()) {
        (errors, transitions) = io::offload(move || config::read(&filename)).await?;
    }
    errors.extend(options.inject_error);
    transitions.extend(options.set_state);
    let image = opening.child(Role::Image, options.image, Perms::NONE).await?;
    let limits = Limits {
        align: Limit::new("align", options.align)?,
        max_transfer: Limit::new("max-transfer", options.max_transfer)?,
        opt_write_zero: Limit::new("opt-write-zero", options.opt_write_zero)?,
        max_write_zero: Limit::new("max-write-zero", options.max_write_zero)?,
        opt_discard: Limit::new("opt-discard", options.opt_discard)?,
        max_discard: Limit::new("max-discard", options.max_discard)?,
    };
    limits.apply(image.node().traits())?;
    Ok(Box::new(Blkdebug {
        image: [image],
        options: given.flatten()?,
        limits,
        rules: Rules::new(errors, transitions),
        taken: perms(&options.take_child_perms),
        unshared: perms(&options.unshare_child_perms),
        _hearing: Hearing::new(),
    }))
}

/// Reads `blkdebug:CONFIG:IMAGE`, or the name of an image.
fn read_name(name: &str) -> Result<NameParts, Error> {
    let Some(rest) = name.strip_prefix("blkdebug:") else {
        return Ok(NameParts { options: Map::new(), below: Some((Role::Image, name.to_owned())) });
    };
    let parts = rest.split_once(':');
    let (config, image) =
        parts.ok_or_else(|| Error::new("blkdebug requires both config file and image path"))?;
    let options = Map::from_iter([("config", config)]);
    Ok(NameParts { options, below: Some((Role::Image, image.to_owned())) })
}

/// One of the options that change how requests have to look: its name and its value, 0 if not given.
#[derive(Clone, Copy)]
struct Limit(&'static str, u64);

impl Limit {
    fn new(name: &'static str, value: Option<i64>) -> Result<Limit, Error> {
        let value = u64::try_from(value.unwrap_or(0)).map_err(|_| {
            Error::new(format!("Parameter '{name}' expects a non-negative number below 2^64"))
        })?;
        Ok(Limit(name, value))
    }

    fn refused(self) -> Error {
        Error::new(format!("Cannot meet constraints with {} {}", self.0, self.1))
    }

    /// The value if it is given; `otherwise` if not. It must be a multiple of `unit`, up to `most`.
    fn or(self, otherwise: u64, unit: u64, most: u64) -> Result<u64, Error> {
        match self.1 {
            0 => Ok(otherwise),
            value if value.is_multiple_of(unit) && value <= most => Ok(value),
            _ => Err(self.refused()),
        }
    }
}

#[derive(Clone, Copy)]
struct Limits {
    align: Limit,
    max_transfer: Limit,
    opt_write_zero: Limit,
    max_write_zero: Limit,
    opt_discard: Limit,
    max_discard: Limit,
}

impl Limits {
    /// The most that QEMU takes for them.
    const MOST: u64 = i32::MAX as u64;

    fn apply(self, image: Traits) -> Result<Traits, Error> {
        let align = self.align.or(image.request_align as u64, 1, 2 << 20)?;
        if !align.is_power_of_two() {
            return Err(self.align.refused());
        }
        let most = Traits::MAX_TRANSFER as u64;
        // What the image does at once, in whole units.
        let within = |limit: u64, unit: u64| (limit - limit % unit).max(unit);
        let transfer = within(image.max_transfer as u64, align);
        let max_transfer = self.max_transfer.or(transfer, align, Self::MOST)?.min(most);
        let zero_align = (image.zero_align as u64).max(align);
        let zero_align = self.opt_write_zero.or(zero_align, align, Self::MOST)?;
        let max_zero = within(image.max_zero, zero_align);
        let max_zero = self.max_write_zero.or(max_zero, zero_align, Self::MOST)?;
        let discard_align = (image.discard_align as u64).max(align);
        let discard_align = self.opt_discard.or(discard_align, align, Self::MOST)?;
        let max_discard = within(image.max_discard, discard_align);
        let max_discard = self.max_discard.or(max_discard, discard_align, Self::MOST)?;
        Ok(Traits {
            request_align: align as u32,
            max_transfer: max_transfer as u32,
            zero_align: zero_align as u32,
            max_zero,
            discard_align: discard_align as u32,
            max_discard,
            // A flush follows such writes, so that rules strike that.
            abilities: image.abilities - Abilities::FUA,
            ..image
        })
    }
}

impl HandOver for Blkdebug {}

impl PassThrough for Blkdebug {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn below(&self) -> &[Child; 1] {
        &self.image
    }

    fn traits(&self) -> Traits {
        let image = self.node().traits();
        // An image that came later may not go with the limits.
        self.limits.apply(image).unwrap_or(image)
    }

    fn map<'a>(&'a self, _: &'a InFlight, _: u64, want: u64, _: Access) -> Mapping<'a> {
        Mapping::slow(want)
    }

    async fn read(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        self.rules.check(IoType::Read, Some(at..at + into.len())).await?;
        read_inside(&self.node(), at, into).await
    }

    async fn write(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        self.rules.check(IoType::Write, Some(at..at + from.len())).await?;
        write_inside(&self.node(), at, from, flags).await
    }

    async fn zero(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        self.rules.check(IoType::WriteZeroes, Some(at..at + len)).await?;
        self.node().zero(at, len, flags).await
    }

    async fn discard(&self, at: u64, len: u64) -> IoResult {
        self.rules.check(IoType::Discard, Some(at..at + len)).await?;
        self.node().discard(at, len).await
    }

    async fn status(&self, at: u64, len: u64, precision: Precision) -> IoResult<Extent> {
        self.rules.check(IoType::BlockStatus, Some(at..at + len)).await?;
        status_of(&self.node(), at, len, precision).await
    }

    fn perms(&self, own: Perms) -> Perms {
        let Perms { held, shared } = Perms::filter(own);
        Perms { held: held | self.taken, shared: shared - self.unshared }
    }

    fn own_options(&self) -> Map {
        self.options.clone()
    }

    fn name_over(&self, child: Option<&str>) -> Option<String> {
        let config = self.options.get("config").and_then(Value::as_str).unwrap_or_default();
        let says_more = self.options.iter().any(|(key, _)| key != "config");
        let child = child.filter(|_| !says_more)?;
        Some(format!("{}:{config}:{child}", ENTRY.name))
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }

    fn debugger(&self) -> Option<&dyn Debugger> {
        Some(&self.rules)
    }
}
