//! null-co and null-aio: disks without storage, for measuring the layers above.
//!
//! Writes are forgotten. Reads leave the memory as it is, or zero it with `read-zeroes`, which keeps
//! what a reader's memory held before from showing. Both names are one driver here: the difference
//! that they make in QEMU (coroutine or callback) is none of ours.

use crate::block::registry::{OpenFn, ReadNameFn};
use crate::block::{
    Abilities, Access, Driver, DriverEntry, Error, Extent, Fence, HandOver, Kind, Leaf,
    LocalFuture, Mapping, NameParts, Naming, Opening, OptionHelp, Perms, Place, Precision, Status,
    Target, Traits, WriteFlags, ZeroFlags,
};
use crate::io::{self, InFlight, IoResult, IoVec, Started};
use crate::options::Map;
use serde::Deserialize;
use std::time::Duration;

pub static CO: DriverEntry = entry(
    "null-co",
    &["null-co"],
    |name| read_name(name, "null-co://"),
    |opening, options| Box::pin(open(&CO, opening, options)),
);

pub static AIO: DriverEntry = entry(
    "null-aio",
    &["null-aio"],
    |name| read_name(name, "null-aio://"),
    |opening, options| Box::pin(open(&AIO, opening, options)),
);

const fn entry(
    name: &'static str,
    prefixes: &'static [&'static str],
    read_name: ReadNameFn,
    open: OpenFn,
) -> DriverEntry {
    let options = &[
        OptionHelp { name: "size", value: "int", help: "length of the disk (1 GiB)" },
        OptionHelp { name: "latency-ns", value: "int", help: "how long each request takes (0)" },
        OptionHelp { name: "read-zeroes", value: "on|off", help: "reads zero the memory (off)" },
    ];
    DriverEntry {
        options,
        prefixes,
        naming: Naming::Own(read_name),
        ..DriverEntry::new(name, Kind::Protocol, open)
    }
}

/// The only name says nothing.
fn read_name(name: &str, only: &str) -> Result<NameParts, Error> {
    match name == only {
        true => Ok(NameParts { options: Map::new(), below: None }),
        false => Err(Error::new(format!("The only allowed filename for this driver is '{only}'"))),
    }
}

async fn open(
    entry: &'static DriverEntry,
    opening: &mut Opening,
    options: Map,
) -> Result<Box<dyn Driver>, Error> {
    let options: NullOptions = opening.parse(options)?;
    if options.size < 0 {
        return Err(Error::new("Parameter 'size' expects a non-negative number below 2^63"));
    }
    Ok(Box::new(Null { entry, options }))
}

/// The driver's own options.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct NullOptions {
    /// The disk's length in bytes. Not negative.
    pub size: i64,
    /// How long each request takes, in nanoseconds.
    pub latency_ns: u64,
    /// Whether reads zero the memory.
    pub read_zeroes: bool,
}

impl Default for NullOptions {
    fn default() -> NullOptions {
        NullOptions { size: 1 << 30, latency_ns: 0, read_zeroes: false }
    }
}

/// See the module's text.
pub struct Null {
    entry: &'static DriverEntry,
    options: NullOptions,
}

impl Null {
    fn done(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async {
            if self.options.latency_ns > 0 {
                io::sleep(Duration::from_nanos(self.options.latency_ns)).await;
            }
            Ok(())
        })
    }
}

impl HandOver for Null {}

impl Driver for Null {
    fn entry(&self) -> &'static DriverEntry {
        self.entry
    }

    fn traits(&self) -> Traits {
        let mut abilities =
            Abilities::ZERO | Abilities::ZERO_UNMAP | Abilities::DISCARD | Abilities::FUA;
        if self.options.read_zeroes {
            abilities |= Abilities::DISCARD_ZEROES;
        }
        Traits { max_zero: u64::MAX, max_discard: u64::MAX, abilities, ..Traits::default() }
    }

    fn own_options(&self) -> Map {
        let usual = NullOptions::default();
        let mut options = Map::new();
        if self.options.size != usual.size {
            options.insert("size", self.options.size as u64);
        }
        if self.options.read_zeroes != usual.read_zeroes {
            options.insert("read-zeroes", self.options.read_zeroes);
        }
        options
    }

    fn name_over(&self, _: Option<&str>) -> Option<String> {
        self.own_options().is_empty().then(|| format!("{}://", self.name()))
    }

    fn len(&self) -> u64 {
        self.options.size as u64
    }

    fn map<'a>(&'a self, _: &'a InFlight, at: u64, want: u64, access: Access) -> Mapping<'a> {
        let target = if self.options.latency_ns > 0 {
            Target::Slow
        } else if access == Access::Read && self.options.read_zeroes {
            Target::Zero
        } else {
            Target::Data { leaf: self, offset: at }
        };
        Mapping { len: want, target }
    }

    fn read<'a>(&'a self, _: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        if self.options.read_zeroes {
            into.zero();
        }
        self.done()
    }

    fn write<'a>(&'a self, _: u64, _: &'a IoVec<'a>, _: WriteFlags) -> LocalFuture<'a, IoResult> {
        self.done()
    }

    fn zero<'a>(&'a self, _: u64, _: u64, _: ZeroFlags) -> LocalFuture<'a, IoResult> {
        self.done()
    }

    fn discard<'a>(&'a self, _: u64, _: u64) -> LocalFuture<'a, IoResult> {
        self.done()
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        self.done()
    }

    fn status(&self, at: u64, len: u64, _: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        let known = if self.options.read_zeroes { Status::ZERO } else { Status::DATA };
        let place = Some(Place { child: None, offset: at });
        let extent = Extent { len, status: known | Status::ALLOCATED, place };
        Box::pin(std::future::ready(Ok(extent)))
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }

    /// Nothing is stored anywhere, and what is in flight ends with the process.
    fn fence(&self, _: Perms) -> Fence {
        Fence::Storage
    }

    fn leaf(&self) -> Option<&dyn Leaf> {
        Some(self)
    }
}

impl Leaf for Null {
    unsafe fn start(&self, _: &io::Io, _: io::Op, _: io::Token) -> Started {
        Started::Done(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::sim::{Disorder, SimRing};
    use crate::options::{from_map, keyval};

    fn parsed(text: &str) -> Null {
        let map = keyval::parse(text, None).unwrap().options;
        Null { entry: &CO, options: from_map(map).unwrap() }
    }

    #[test]
    fn the_defaults_are_a_gibibyte_of_nothing_at_once() {
        let null = parsed("");
        assert_eq!(null.len(), 1 << 30);
        assert_eq!((null.options.latency_ns, null.options.read_zeroes), (0, false));
        assert_eq!(parsed("size=65536").len(), 65536);
    }

    #[test]
    fn latency_is_what_a_request_takes_and_zeroes_are_read_only_when_asked_for() {
        let ring = SimRing::new(Disorder::wild(1)).unwrap();
        io::run_on(Box::new(ring), async {
            let null = parsed("latency-ns=5000000,read-zeroes=on");
            let before = io::current().now();
            let mut bytes = [1; 64];
            null.read(0, &IoVec::from_mut(&mut bytes)).await.unwrap();
            assert_eq!(bytes, [0; 64]);
            null.write(0, &IoVec::from_ref(&bytes), WriteFlags::FUA).await.unwrap();
            assert!(io::current().now() - before >= 10_000_000);

            let mut untouched = [1; 64];
            parsed("").read(0, &IoVec::from_mut(&mut untouched)).await.unwrap();
            assert_eq!(untouched, [1; 64]);
        });
    }
}
