//! Checking an image, with the messages and counts of `qemu-img check`.
//!
//! Each block of the file has one entry of the map, and the header has the number of allocated blocks.

use super::blocks::{Blocks, for_each_piece};
use super::header::Header;
use super::mapping::Entry;
use super::open::read_header;
use crate::block::{CheckReport, Error, Node};

/// Checks the image in `file`, with no other request in flight, telling `say` what is found.
///
/// # Errors
/// The header makes no sense, or I/O failed.
pub async fn check(file: &Node, say: &mut dyn FnMut(&str)) -> Result<CheckReport, Error> {
    let (header, _) = read_header(file).await?;
    let mut report = CheckReport::default();
    let mut corrupt = |text: String| {
        report.corruptions += 1;
        say(&format!("ERROR: {text}"));
    };
    let blocks = check_map(file, &header, &mut corrupt).await?;
    if blocks.count != header.allocated {
        let (found, wanted) = (blocks.count, header.allocated);
        corrupt(format!("allocated blocks mismatch, is {found}, should be {wanted}"));
    }
    Ok(report)
}

async fn check_map(
    file: &Node,
    header: &Header,
    corrupt: &mut dyn FnMut(String),
) -> Result<Blocks, Error> {
    let mut blocks = Blocks::default();
    let see = |first: u32, entries: &mut dyn Iterator<Item = Entry>| {
        for (index, entry) in entries.enumerate() {
            let Some(block) = entry.block() else { continue };
            if block >= header.blocks {
                let index = first + index as u32;
                corrupt(format!("block index {index} too large, is {block}"));
            } else if !blocks.add(block) {
                corrupt(format!("block index {block} also used by {block}"));
            }
        }
        Ok(())
    };
    let read = for_each_piece(file, header, see).await;
    read.map_err(|errno| Error::os("Check failed", errno))?;
    Ok(blocks)
}
