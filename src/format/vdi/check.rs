//! Checking an image: each block of the file has one entry of the map, and the header says how many have. Texts
//! and counts are those of `qemu-img check`.

use super::header::Header;
use super::mapping::Entry;
use super::open::read_header;
use crate::block::{CheckReport, Error, Node};
use crate::cow::{Format, References, read_padded};
use crate::io::{AlignedBuf, Errno, IoResult};

/// Bytes of the map that are read at once.
const PIECE: u64 = 1 << 20;

/// Checks the image in `file`, with no other request in flight, telling `say` what is found.
///
/// # Errors
/// The header makes no sense, or I/O failed.
pub async fn check(file: &Node, say: &mut dyn FnMut(&str)) -> Result<CheckReport, Error> {
    let header = read_header(file).await?;
    let checked = check_map(file, &header, say).await;
    checked.map_err(|errno| Error::os("Check failed", errno))
}

async fn check_map(
    file: &Node,
    header: &Header,
    say: &mut dyn FnMut(&str),
) -> IoResult<CheckReport> {
    let mut report = CheckReport::default();
    let (mut used, mut allocated) = (References::default(), 0u32);
    let mut corrupt = |text: String| {
        report.corruptions += 1;
        say(&format!("ERROR: {text}"));
    };
    let len = u64::from(header.blocks) * 4;
    for at in (0..len).step_by(PIECE as usize) {
        let part = (len - at).min(PIECE) as usize;
        let mut bytes = AlignedBuf::new(part, 4096).ok_or(Errno::ENOMEM)?;
        read_padded(file, u64::from(header.map_offset) + at, &bytes.io_vec()).await?;
        for (index, entry) in bytes[..part].chunks_exact(4).enumerate() {
            let Entry(number) = super::Vdi::parse(entry);
            let Some(block) = Entry(number).block() else { continue };
            if block >= header.blocks {
                let index = at / 4 + index as u64;
                corrupt(format!("block index {index} too large, is {block}"));
                continue;
            }
            allocated += 1;
            if used.get(block.into()) > 0 {
                corrupt(format!("block index {block} also used by {block}"));
            }
            used.add(block.into(), 1).map_err(|_| Errno::ENOMEM)?;
        }
    }
    if allocated != header.allocated {
        let wanted = header.allocated;
        corrupt(format!("allocated blocks mismatch, is {allocated}, should be {wanted}"));
    }
    Ok(report)
}
