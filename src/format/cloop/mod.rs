//! Compressed loop images (cloop), version 2.0, which are only read: blocks of equal size, each a zlib stream.

mod header;

use super::chunks::Chunks;
use super::deflate;
use super::read_only::{self, Content, ReadOnly, open_file};
use crate::block::registry::{DriverEntry, Kind};
use crate::block::*;
use crate::cow::read_padded;
use crate::io::{AlignedBuf, Errno, IoResult, IoVec};
use crate::options::Map;
use header::Header;

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File],
    options: read_only::HELP,
    growth: Growth::Own(&[]),
    // QEMU's score: less than that of a magic number.
    probe: Some(Probe::Bytes(|head, _| if Header::probe(head) { 2 } else { 0 })),
    ..DriverEntry::new("cloop", Kind::Format, |opening, map| Box::pin(open(opening, map)))
};

/// Memory that unpacking a block takes beside it, in bytes.
const SCRATCH: u64 = 64 << 10;

/// An open image.
struct Cloop {
    header: Header,
    children: [Child; 1],
    /// Where blocks begin in the file, and where the last one ends.
    offsets: Vec<u64>,
    chunks: Chunks,
}

async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let file = open_file(opening, map).await?;
    let node = file.node();
    let mut fields = [0; header::FIELDS_LEN];
    let read = read_padded(&node, header::FIELDS_AT, &IoVec::from_mut(&mut fields)).await;
    read.map_err(|errno| Error::os("Could not read cloop header", errno))?;
    let header = Header::parse(&fields, node.len())?;
    let offsets = read_offsets(&node, &header).await;
    let offsets = offsets.map_err(|errno| Error::os("Could not read the offsets", errno))?;
    Header::check_offsets(&offsets)?;
    let chunks = Chunks::new(opening.blocking());
    Ok(Box::new(ReadOnly(Cloop { header, children: [file], offsets, chunks })))
}

async fn read_offsets(file: &Node, header: &Header) -> IoResult<Vec<u64>> {
    let len = header.offsets_len() as usize;
    let mut bytes = AlignedBuf::new(len, 4096).ok_or(Errno::ENOMEM)?;
    read_padded(file, header::OFFSETS_AT, &bytes.io_vec()).await?;
    let offsets = bytes[..len].chunks_exact(8).filter_map(|offset| offset.first_chunk());
    Ok(offsets.map(|offset| u64::from_be_bytes(*offset)).collect())
}

impl Content for Cloop {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn children(&self) -> &[Child; 1] {
        &self.children
    }

    fn len(&self) -> u64 {
        self.header.size()
    }

    async fn read(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        let file = self.children[0].node();
        let size = u64::from(self.header.block_size);
        let mut done = 0;
        while done < into.len() {
            let (block, inside) = ((at + done) / size, (at + done) % size);
            let [start, end] = [block, block + 1].map(|n| self.offsets[n as usize]);
            let is_last = block + 1 == u64::from(self.header.blocks);
            let unpack = move |stored: &[u8], block: &mut [u8]| {
                // The last block may be shorter than the others, and ends with zeroes then.
                match deflate::unpack_zlib(stored, block)? {
                    len if is_last || len == block.len() => Ok(()),
                    _ => Err(Errno::EIO),
                }
            };
            let chunk =
                self.chunks.get(block, &file, start..end, (size as usize, SCRATCH), unpack).await?;
            let len = (into.len() - done).min(size - inside);
            into.slice(done, len).copy_from(&chunk[inside as usize..]);
            done += len;
        }
        Ok(())
    }
}
