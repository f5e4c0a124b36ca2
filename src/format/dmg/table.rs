//! The chunks of an image, merged from its tables ("mish") into one ordered list without overlaps.

use super::unpack::Packing;
use crate::block::{Error, SECTOR};

/// Bytes of a table before its entries, and of an entry.
const HEAD: usize = 204;
const ENTRY: usize = 40;

/// Sectors that a packed chunk has at most, and bytes that it is stored in.
pub const MAX_SECTORS: u64 = MAX_STORED / SECTOR;
const MAX_STORED: u64 = 64 << 20;

/// Entries that are no chunks.
const COMMENT: u32 = 0x7fff_fffe;
const TERMINATOR: u32 = 0xffff_ffff;

/// A part of the disk. Numbers are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// In the disk.
    pub start: u64,
    pub len: u64,
    pub kind: Kind,
    /// In the file.
    pub offset: u64,
    pub stored: u64,
}

/// How a chunk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Zero,
    Raw,
    Packed(Packing),
    /// In a way that we do not know: its number.
    Unknown(u32),
}

impl Kind {
    fn of(number: u32) -> Kind {
        match number {
            // What is not used reads as zeroes, too.
            0 | 2 => Kind::Zero,
            1 => Kind::Raw,
            0x8000_0004 => Kind::Packed(Packing::Adc),
            0x8000_0005 => Kind::Packed(Packing::Zlib),
            0x8000_0006 => Kind::Packed(Packing::Bzip2),
            0x8000_0007 => Kind::Packed(Packing::Lzfse),
            0x8000_0008 => Kind::Packed(Packing::Lzma),
            other => Kind::Unknown(other),
        }
    }
}

/// The chunks of all tables. `data_fork`: what their offsets count from.
///
/// # Errors
/// In QEMU's words, where it has them: a table or a chunk makes no sense, or two chunks overlap.
pub fn chunks_of(tables: &[Vec<u8>], data_fork: u64) -> Result<Vec<Chunk>, Error> {
    let mut chunks = Vec::new();
    for table in tables {
        add_table(&mut chunks, table, data_fork)?;
    }
    chunks.sort_unstable_by_key(|chunk| chunk.start);
    for pair in chunks.windows(2) {
        if pair[0].start + pair[0].len > pair[1].start {
            return Err(Error::new(format!(
                "The chunks of sectors {} and {} overlap",
                pair[0].start / SECTOR,
                pair[1].start / SECTOR
            )));
        }
    }
    Ok(chunks)
}

fn add_table(chunks: &mut Vec<Chunk>, table: &[u8], data_fork: u64) -> Result<(), Error> {
    let u32_at = |at: usize| u32::from_be_bytes(*table[at..].first_chunk().unwrap_or(&[0; 4]));
    let u64_at = |at: usize| u64::from_be_bytes(*table[at..].first_chunk().unwrap_or(&[0; 8]));
    let len = table.len();
    if len < HEAD {
        return Err(Error::new(format!("A table of chunks has {len} bytes, less than {HEAD}")));
    }
    let (count, room) = (u32_at(200), (len - HEAD) / ENTRY);
    if count as usize > room {
        return Err(Error::new(format!(
            "A table of {len} bytes is said to have {count} chunks, but has room for {room}"
        )));
    }
    let (first_sector, data_offset) = (u64_at(8), u64_at(24));
    for index in 0..count as usize {
        let at = HEAD + index * ENTRY;
        let kind = u32_at(at);
        let [sector, sectors, offset, stored] = [8, 16, 24, 32].map(|field| u64_at(at + field));
        if matches!(kind, COMMENT | TERMINATOR) || sectors == 0 {
            continue;
        }
        let kind = Kind::of(kind);
        let is_bounded = matches!(kind, Kind::Packed(_) | Kind::Unknown(_));
        let number = chunks.len();
        for (what, value, most) in
            [("sector count", sectors, MAX_SECTORS), ("length", stored, MAX_STORED)]
        {
            if is_bounded && value > most {
                return Err(Error::new(format!(
                    "{what} {value} for chunk {number} is larger than max ({most})"
                )));
            }
        }
        let far = || Error::new(format!("chunk {number} is too far off"));
        let sum = |a: u64, b: u64| a.checked_add(b).filter(|&sum| i64::try_from(sum).is_ok());
        let bytes = |sectors: u64| sectors.checked_mul(SECTOR);
        let start = sum(first_sector, sector).and_then(bytes).ok_or_else(far)?;
        let len = bytes(sectors).filter(|&len| sum(start, len).is_some()).ok_or_else(far)?;
        let base = sum(data_fork, data_offset).and_then(|base| sum(base, offset));
        let offset = base.filter(|&base| sum(base, stored).is_some()).ok_or_else(far)?;
        chunks.push(Chunk { start, len, kind, offset, stored });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(first: u64, entries: &[(u32, u64, u64, u64, u64)]) -> Vec<u8> {
        let mut table = [b"mish\0\0\0\x01".to_vec(), first.to_be_bytes().to_vec()].concat();
        table.resize(HEAD - 4, 0);
        table.extend((entries.len() as u32).to_be_bytes());
        for &(kind, sector, sectors, offset, len) in entries {
            table.extend(u64::from(kind).rotate_left(32).to_be_bytes());
            table.extend([sector, sectors, offset, len].map(u64::to_be_bytes).concat());
        }
        table
    }

    #[test]
    fn chunks_of_several_tables_come_in_the_order_of_the_disk() {
        let tables = [
            table(
                100,
                &[(1, 8, 8, 0, 4096), (0x8000_0005, 0, 8, 4096, 100), (TERMINATOR, 16, 0, 0, 0)],
            ),
            table(0, &[(2, 0, 50, 0, 0), (COMMENT, 50, 9, 0, 0), (0, 50, 50, 0, 0)]),
        ];
        let chunks = chunks_of(&tables, 1000).unwrap();
        let seen: Vec<_> = chunks.iter().map(|c| (c.start / 512, c.len / 512, c.offset)).collect();
        assert_eq!(seen, [(0, 50, 1000), (50, 50, 1000), (100, 8, 5096), (108, 8, 1000)]);
        assert_eq!(chunks[2].kind, Kind::Packed(Packing::Zlib));
    }

    #[test]
    fn tables_that_make_no_sense_are_refused() {
        for (entry, wanted) in [
            ((1, 0, 9, 0, 1), "The chunks of sectors 0 and 8 overlap"),
            (
                (0x8000_0005, 0, 131_073, 0, 1),
                "sector count 131073 for chunk 0 is larger than max (131072)",
            ),
            (
                (0x8000_0006, 0, 1, 0, 1 << 27),
                "length 134217728 for chunk 0 is larger than max (67108864)",
            ),
            ((1, u64::MAX, 1, 0, 1), "chunk 0 is too far off"),
            ((1, 0, u64::MAX, 0, 1), "chunk 0 is too far off"),
            ((1, 0, 1, u64::MAX, 1), "chunk 0 is too far off"),
            ((1, 0, 1, 0, u64::MAX), "chunk 0 is too far off"),
        ] {
            let error = chunks_of(&[table(0, &[entry, (1, 8, 1, 0, 512)])], 0).unwrap_err();
            assert_eq!(error.to_string(), wanted);
        }
        let whole = table(0, &[(1, 0, 1, 0, 512)]);
        for cut in [10, HEAD - 1, HEAD, whole.len() - 1] {
            assert!(chunks_of(&[whole[..cut].to_vec()], 0).is_err(), "{cut} bytes");
        }
    }
}
