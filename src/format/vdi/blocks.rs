//! The blocks of a file and the map that names them, read and reconciled as a whole.
//!
//! Programs take the number of allocated blocks in the header for the number of the next new block. So no block below it
//! may be unnamed, and none behind it named. That is so in an image at rest; [`settle`] makes it so when an image is
//! closed, and when one is opened that was not.

use super::header::{self, BLOCK_SIZE, Header};
use super::mapping::{DISCARDED, Entry, UNALLOCATED};
use crate::block::{Error, Node, Precision, Status, WriteFlags, ZeroFlags};
use crate::cow::{cut, read_padded, stored_status};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};

/// Bytes of the map that are read at once.
const PIECE: u64 = 1 << 20;
/// Bytes of an emptied block that may be no hole, side by side.
const EDGE: u64 = 64 << 10;
/// Most blocks that may be unnamed: a crash leaves fewer.
const MOST_GAPS: u32 = 1 << 16;

/// The first bytes of an image, and what they say.
pub type Head = (Header, [u8; header::LEN]);

/// Which blocks of the file the map names.
#[derive(Default)]
pub struct Blocks {
    /// A bit for each, up to the last that is named.
    named: Vec<u64>,
    /// How many entries name a block.
    pub count: u32,
    /// The first block behind all that are named.
    pub end: u32,
}

impl Blocks {
    /// Whether a block is named.
    pub fn has(&self, block: u32) -> bool {
        let word = self.named.get(block as usize / 64).copied().unwrap_or(0);
        word & 1 << (block % 64) != 0
    }

    /// Notes one more name of a block. False if it had one.
    pub fn add(&mut self, block: u32) -> bool {
        let (word, bit) = (block as usize / 64, 1 << (block % 64));
        if word >= self.named.len() {
            self.named.resize(word + 1, 0);
        }
        let is_new = self.named[word] & bit == 0;
        self.named[word] |= bit;
        self.count += 1;
        self.end = self.end.max(block + 1);
        is_new
    }

    /// Blocks below `end` that nothing names.
    pub fn gaps(&self, end: u32) -> impl Iterator<Item = u32> + '_ {
        (0..end).filter(|&block| !self.has(block))
    }
}

/// Shows all entries of the map, in pieces: the index of the first, and the entries.
///
/// # Errors
/// I/O failed.
pub async fn for_each_piece(
    file: &Node,
    header: &Header,
    mut see: impl FnMut(u32, &mut dyn Iterator<Item = Entry>) -> IoResult,
) -> IoResult {
    for at in (0..header.map_len()).step_by(PIECE as usize) {
        let bytes = read_piece(file, header, at).await?;
        see((at / 4) as u32, &mut entries_of(&bytes, header, at))?;
    }
    Ok(())
}

/// A piece of the map from a byte of it on.
async fn read_piece(file: &Node, header: &Header, at: u64) -> IoResult<AlignedBuf> {
    let len = (header.map_len() - at).min(PIECE) as usize;
    let mut bytes = AlignedBuf::new(len, 4096).ok_or(Errno::ENOMEM)?;
    read_padded(file, u64::from(header.map_offset) + at, &bytes.io_vec()).await?;
    Ok(bytes)
}

fn entries_of<'a>(
    bytes: &'a AlignedBuf,
    header: &Header,
    at: u64,
) -> impl Iterator<Item = Entry> + use<'a> {
    let len = (header.map_len() - at).min(PIECE) as usize;
    bytes[..len].chunks_exact(4).map(Entry::parse)
}

/// The blocks that the map of an image names, each once.
///
/// # Errors
/// The map is damaged, or I/O failed.
pub async fn scan(file: &Node, header: &Header) -> Result<Blocks, Error> {
    let mut blocks = Blocks::default();
    let mut damage = None;
    let see = |_, entries: &mut dyn Iterator<Item = Entry>| {
        for block in entries.filter_map(Entry::block) {
            if block >= header.blocks {
                damage.get_or_insert(format!("it names block {block} of {}", header.blocks));
            } else if !blocks.add(block) {
                damage.get_or_insert(format!("block {block} has two names"));
            }
        }
        Ok(())
    };
    let read = for_each_piece(file, header, see).await;
    read.map_err(|errno| Error::os("Could not read the block map", errno))?;
    if damage.is_none() && blocks.end - blocks.count > MOST_GAPS {
        damage = Some(format!("{} blocks have no name", blocks.end - blocks.count));
    }
    match damage {
        Some(damage) => Err(Error::new(format!(
            "The VDI block map is damaged ({damage}): check the image, and open it with read-only=on"
        ))),
        None => Ok(blocks),
    }
}

/// Whether header and map agree.
pub fn agree(header: &Header, blocks: &Blocks) -> bool {
    header.allocated == blocks.count && blocks.end == blocks.count
}

/// What becomes of blocks that the storage has emptied, at the end of a dynamic image.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Emptied {
    Stay,
    /// They are cut off, and their entries say that they were discarded. No reader may know them.
    Go,
}

/// Makes header and map agree, durably, with nothing but reads in flight. Blocks that nothing names go off the end of the
/// file, or to parts of the disk that have none, where they read as zeroes.
///
/// The order: what is named again reads as zeroes, durably; the map names what it is to name, durably; the header says
/// so, durably; the file is cut. A crash in between leaves an image whose header counts no block too few.
///
/// # Errors
/// The map is damaged, or I/O failed.
pub async fn settle(
    file: &Node,
    (header, bytes): &mut Head,
    emptied: Emptied,
) -> Result<(), Error> {
    let blocks = scan(file, header).await?;
    let done = settle_blocks(file, header, &blocks, emptied).await;
    let failed = |errno| Error::os("Could not update the block map", errno);
    let end = done.map_err(failed)?;
    write_allocated(file, (header, bytes), end).await.map_err(failed)?;
    cut(file, header.offset_of(end.into())).await;
    Ok(())
}

/// The map's part of it; returns how many blocks are left.
async fn settle_blocks(
    file: &Node,
    header: &Header,
    blocks: &Blocks,
    emptied: Emptied,
) -> IoResult<u32> {
    let end = match emptied {
        Emptied::Go if !header.is_static => end_of_used(file, header, blocks).await?,
        _ => blocks.end,
    };
    let gaps: Vec<u32> = blocks.gaps(end).collect();
    if end == blocks.end && gaps.is_empty() {
        return Ok(end);
    }
    for &gap in &gaps {
        file.zero(header.offset_of(gap.into()), BLOCK_SIZE, ZeroFlags::UNMAP).await?;
    }
    file.flush().await?;
    let mut gaps = gaps.into_iter();
    for at in (0..header.map_len()).step_by(PIECE as usize) {
        let mut piece = read_piece(file, header, at).await?;
        let mut has_changed = false;
        for entry in piece[..(header.map_len() - at).min(PIECE) as usize].chunks_exact_mut(4) {
            let new = match Entry::parse(entry).block() {
                Some(block) if block >= end => Some(DISCARDED),
                Some(_) => None,
                None => gaps.next(),
            };
            if let Some(new) = new {
                Entry(new).store(entry);
                has_changed = true;
            }
        }
        if has_changed {
            let len = (header.map_len() - at).min(PIECE);
            let place = u64::from(header.map_offset) + at;
            file.write(place, &piece.source().slice(0, len), WriteFlags::empty()).await?;
        }
    }
    file.flush().await?;
    Ok(end)
}

/// The first block behind all that hold something.
async fn end_of_used(file: &Node, header: &Header, blocks: &Blocks) -> IoResult<u32> {
    let mut end = blocks.end;
    while end > 0 {
        let last = end - 1;
        if blocks.has(last) && !is_empty(file, header, last).await? {
            break;
        }
        end = last;
    }
    Ok(end)
}

/// Whether a block has nothing but zeroes, as the storage says. Where blocks are not aligned as the storage's own, it has
/// pages at both ends that are no holes.
async fn is_empty(file: &Node, header: &Header, block: u32) -> IoResult<bool> {
    let mut at = header.offset_of(block.into());
    let end = at + BLOCK_SIZE;
    while at < end {
        let (len, status) = stored_status(file, at, end - at, Precision::Zeroes).await?;
        if !status.contains(Status::ZERO) && (len > EDGE || !is_zero(file, at, len).await?) {
            return Ok(false);
        }
        at += len;
    }
    Ok(true)
}

/// Whether a few bytes of the file are zeroes.
async fn is_zero(file: &Node, at: u64, len: u64) -> IoResult<bool> {
    let mut bytes = AlignedBuf::new(len as usize, 4096).ok_or(Errno::ENOMEM)?;
    read_padded(file, at, &bytes.io_vec()).await?;
    Ok(bytes.iter().all(|&byte| byte == 0))
}

/// Makes the header say how many blocks are allocated, durably, if it says something else.
pub async fn write_allocated(
    file: &Node,
    (header, bytes): (&mut Header, &mut [u8; header::LEN]),
    allocated: u32,
) -> IoResult {
    if header.allocated == allocated {
        return Ok(());
    }
    let mut new = *bytes;
    header::set_allocated(&mut new, allocated);
    file.write(0, &IoVec::from_ref(&new), WriteFlags::empty()).await?;
    file.flush().await?;
    header.allocated = allocated;
    *bytes = new;
    Ok(())
}

/// The map of a new image, from an entry on, in at most a piece; none when it has ended.
pub fn new_piece(header: &Header, from: u32) -> Option<Vec<u8>> {
    let entries = (header.blocks - from).min((PIECE / 4) as u32);
    let entry = |block: u32| if header.is_static { block } else { UNALLOCATED };
    (entries > 0)
        .then(|| (from..from + entries).flat_map(|block| entry(block).to_le_bytes()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_noted_once_and_gaps_are_found() {
        let mut blocks = Blocks::default();
        assert!([3, 0, 200].into_iter().all(|block| blocks.add(block)));
        assert!(!blocks.add(200));
        assert_eq!((blocks.count, blocks.end), (4, 201));
        assert_eq!(blocks.gaps(6).collect::<Vec<_>>(), [1, 2, 4, 5]);
        assert!(!blocks.has(1000));
    }
}
