//! Checking an image: states of the block allocation table, and the places of blocks.
//!
//! Each entry has a state that its kind of image can have, and its block is inside the file, apart from metadata and
//! all other blocks.

use super::bytes::MIB;
use super::mapping::{ENTRY_BYTES, Entry, state};
use super::open::{Contents, contents, read};
use crate::block::{CheckReport, Error, Node};
use crate::cow::{References, read_padded};
use crate::io::{AlignedBuf, Errno, IoResult};

/// Bytes of the table that are read at once.
const PIECE: u64 = 1 << 20;

/// Checks the image in `file`, with no other request in flight, telling `say` what is found.
///
/// # Errors
/// Headers, regions or metadata make no sense, or I/O failed.
pub async fn check(file: &Node, say: &mut dyn FnMut(&str)) -> Result<CheckReport, Error> {
    let header = read(file).await?.header;
    let contents = contents(file, &header).await?;
    let checked = check_table(file, &contents, say).await;
    checked.map_err(|errno| Error::os("Check failed", errno))
}

async fn check_table(
    file: &Node,
    contents: &Contents,
    say: &mut dyn FnMut(&str),
) -> IoResult<CheckReport> {
    let Contents { regions, metadata, layout } = contents;
    let geometry = &metadata.geometry;
    let file_len = file.driver().len();
    let mut report = CheckReport::default();
    let mut used = References::default();
    let mut needs_bitmap = false;
    let mut corrupt = |index: u64, text: std::fmt::Arguments<'_>| {
        report.corruptions += 1;
        say(&format!("ERROR: VHDX BAT entry {index} {text}"));
    };
    let len = geometry.entries() * ENTRY_BYTES;
    for at in (0..len).step_by(PIECE as usize) {
        let part = (len - at).min(PIECE) as usize;
        let mut bytes = AlignedBuf::new(part, 4096).ok_or(Errno::ENOMEM)?;
        read_padded(file, regions.bat.offset + at, &bytes.io_vec()).await?;
        for (n, entry) in bytes[..part].chunks_exact(ENTRY_BYTES as usize).enumerate() {
            let index = at / ENTRY_BYTES + n as u64;
            let entry = Entry(super::bytes::u64_at(entry, 0));
            let (found, host) = (entry.state(), entry.host());
            let is_bitmap = geometry.is_bitmap_entry(index);
            let is_bad = match found {
                4 => true,
                state::PARTIAL => is_bitmap || !geometry.has_parent,
                state::NOT_PRESENT => is_bitmap && std::mem::take(&mut needs_bitmap),
                state::PRESENT => is_bitmap && !geometry.has_parent,
                _ => is_bitmap,
            };
            // The entry of a bitmap is behind those of its blocks.
            needs_bitmap = !is_bitmap && (needs_bitmap || found == state::PARTIAL);
            let len = if is_bitmap { MIB } else { geometry.block_size() };
            match found {
                _ if is_bad => corrupt(index, format_args!("has the state {found}")),
                state::PRESENT | state::PARTIAL if layout.has_room(host, len, file_len) => {
                    let (first, count) = (host / MIB, len / MIB);
                    if (first..first + count).any(|mib| used.get(mib) > 0) {
                        corrupt(
                            index,
                            format_args!("start offset {host} is that of another block"),
                        );
                    }
                    used.add(first, count).map_err(|_| Errno::ENOMEM)?;
                }
                state::PRESENT | state::PARTIAL if host >= file_len => corrupt(
                    index,
                    format_args!("start offset {host} points after end of file ({file_len})"),
                ),
                state::PRESENT | state::PARTIAL => {
                    corrupt(index, format_args!("start offset {host} is over metadata"));
                }
                _ => {}
            }
        }
    }
    Ok(report)
}
