//! The region table of an image ([MS-VHDX] 2.2.3), which locates the BAT and the metadata.
//!
//! The file has two copies of it.

use super::bytes::{KIB, MIB, guid_at, is_sealed, put, seal, u32_at, u64_at};
use crate::block::Error;
use uuid::{Uuid, uuid};

/// Where the two copies are, and how many bytes each has.
pub const PLACES: [u64; 2] = [192 * KIB, 256 * KIB];
pub const LEN: usize = 64 << 10;

const SIGNATURE: &[u8; 4] = b"regi";
const MOST_ENTRIES: u32 = 2047;
const ENTRY_LEN: usize = 32;
const HEAD_LEN: usize = 16;

const BAT: Uuid = uuid!("2dc27766-f623-4200-9d64-115e9bfd4a08");
const METADATA: Uuid = uuid!("8b7ca206-4790-4b9a-b8fe-575f050f886e");

/// A part of the file, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    pub offset: u64,
    pub len: u64,
}

impl Region {
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }

    /// Whether `len` bytes from `offset` on have some of it.
    pub fn meets(&self, offset: u64, len: u64) -> bool {
        offset < self.end() && self.offset < offset.saturating_add(len)
    }
}

/// The regions that every image has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regions {
    pub bat: Region,
    pub metadata: Region,
}

impl Regions {
    /// The regions of a file of `file_len` bytes, out of the first copy of the table that is whole. `log` is where the
    /// log is.
    ///
    /// # Errors
    /// Neither copy is whole, or what it says makes no sense or is not supported.
    pub fn parse(copies: [&[u8]; 2], log: Region, file_len: u64) -> Result<Regions, Error> {
        let whole = copies.into_iter().find(|copy| is_sealed(copy, SIGNATURE));
        let Some(table) = whole else {
            return Err(Error::new(
                "No valid VHDX region table found: both have no signature or a wrong checksum",
            ));
        };
        let count = u32_at(table, 8);
        if count > MOST_ENTRIES {
            return Err(invalid(format!("{count} entries, more than {MOST_ENTRIES}")));
        }
        let entries = table[HEAD_LEN..].chunks_exact(ENTRY_LEN).take(count as usize);
        let mut found: Vec<(Uuid, Region)> = Vec::new();
        for entry in entries {
            let (guid, is_required) = (guid_at(entry, 0), u32_at(entry, 28) & 1 != 0);
            let region = Region { offset: u64_at(entry, 16), len: u32_at(entry, 24).into() };
            if ![BAT, METADATA].contains(&guid) {
                match is_required {
                    true => {
                        return Err(invalid(format!("the region {guid} is required and unknown")));
                    }
                    false => continue,
                }
            }
            check_place(guid, region, log, &found)?;
            found.push((guid, region));
        }
        let region = |guid: Uuid, name: &str| {
            let region = found.iter().find(|(found, _)| *found == guid).map(|&(_, region)| region);
            let region = region.ok_or_else(|| invalid(format!("there is no {name}")))?;
            match region.end() > file_len {
                true => Err(invalid(format!(
                    "the {name} ends at {:#x}, past the end of the file ({file_len:#x})",
                    region.end()
                ))),
                false => Ok(region),
            }
        };
        Ok(Regions {
            bat: region(BAT, "block allocation table")?,
            metadata: region(METADATA, "metadata region")?,
        })
    }

    /// The table as it is stored.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN];
        put(&mut bytes, 8, &2u32.to_le_bytes());
        for (n, (guid, region)) in [(BAT, self.bat), (METADATA, self.metadata)].iter().enumerate() {
            let at = HEAD_LEN + n * ENTRY_LEN;
            put(&mut bytes, at, &guid.to_bytes_le());
            put(&mut bytes, at + 16, &region.offset.to_le_bytes());
            put(&mut bytes, at + 24, &(region.len as u32).to_le_bytes());
            put(&mut bytes, at + 28, &1u32.to_le_bytes());
        }
        seal(&mut bytes, SIGNATURE);
        bytes
    }
}

fn invalid(what: String) -> Error {
    Error::new(format!("VHDX region table: {what}"))
}

/// Whether a region may be where it is said to be: behind the header section, and beside all others.
fn check_place(
    guid: Uuid,
    region: Region,
    log: Region,
    others: &[(Uuid, Region)],
) -> Result<(), Error> {
    let Region { offset, len } = region;
    let is_aligned = offset.is_multiple_of(MIB) && len.is_multiple_of(MIB);
    if !is_aligned || offset < MIB || len == 0 {
        return Err(invalid(format!(
            "the region {guid} at {offset:#x} of {len:#x} bytes is not whole MiB behind the first"
        )));
    }
    for &(other, place) in others {
        if other == guid {
            return Err(invalid(format!("the region {guid} is there twice")));
        }
        if place.meets(offset, len) {
            return Err(invalid(format!("the regions {guid} and {other} overlap at {offset:#x}")));
        }
    }
    match log.meets(offset, len) {
        true => Err(invalid(format!("the region {guid} at {offset:#x} overlaps the log"))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: Region = Region { offset: MIB, len: MIB };
    const REGIONS: Regions = Regions {
        bat: Region { offset: 2 * MIB, len: MIB },
        metadata: Region { offset: 3 * MIB, len: MIB },
    };

    fn parse(table: &[u8]) -> Result<Regions, Error> {
        Regions::parse([table, &[0; LEN]], LOG, 4 * MIB)
    }

    #[test]
    fn either_copy_is_enough() {
        let (table, damaged) = (REGIONS.encode(), vec![0; LEN]);
        assert_eq!(parse(&table).unwrap(), REGIONS);
        assert_eq!(Regions::parse([&damaged, &table], LOG, 4 * MIB).unwrap(), REGIONS);
        assert!(Regions::parse([&damaged, &damaged], LOG, 4 * MIB).is_err());
    }

    #[test]
    fn regions_that_make_no_sense_are_named() {
        let at = |entry: usize, field: usize| HEAD_LEN + entry * ENTRY_LEN + field;
        let changes: &[(usize, &[u8], &str)] = &[
            (8, &[0, 8], "2048 entries"),
            (8, &[1], "no metadata region"),
            (at(0, 0), b"abcdefghijklmnop", "required and unknown"),
            (at(0, 18), &[0x30], "overlap"),
            (at(0, 18), &[0x10], "overlaps the log"),
            (at(1, 23), &[0x40], "past the end of the file"),
            (at(1, 17), &[1], "whole MiB"),
            (at(1, 26), &[0], "whole MiB"),
            (at(1, 0), &BAT.to_bytes_le(), "there twice"),
        ];
        for (at, bytes, wanted) in changes {
            let mut table = REGIONS.encode();
            put(&mut table, *at, bytes);
            seal(&mut table, SIGNATURE);
            let error = parse(&table).unwrap_err().to_string();
            assert!(error.contains(wanted) && !error.contains('\n'), "{wanted}: {error}");
        }
        // What is not required may be anything.
        let mut table = REGIONS.encode();
        put(&mut table, 8, &3u32.to_le_bytes());
        put(&mut table, at(2, 0), b"abcdefghijklmnop");
        seal(&mut table, SIGNATURE);
        assert_eq!(parse(&table).unwrap(), REGIONS);
    }
}
