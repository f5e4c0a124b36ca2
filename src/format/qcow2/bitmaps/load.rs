//! Reading the bitmaps of an image during opening.

use super::{ImageBitmaps, Stored, StoredBitmap, TableEntry, decode_table_entry, table_len};
use crate::block::bitmap::{BitmapFlags, Bits};
use crate::block::{Bitmap, Bitmaps, Error, Node};
use crate::cow::Lock;
use crate::cow::read_padded;
use crate::format::qcow2::extensions::Extension;
use crate::format::qcow2::header::{Autoclear, Header};
use crate::format::qcow2::layout::Geometry;
use crate::io::sync::Mutex;
use crate::io::{AlignedBuf, Errno, IoResult};
use std::sync::Arc;

impl ImageBitmaps {
    /// Reads all bitmaps of the image in `file`. `name` is the node's, for what is logged.
    ///
    /// # Errors
    /// In QEMU's words, when a directory or a bitmap makes no sense.
    pub async fn load(
        name: &str,
        file: &Node,
        header: &Header,
        is_writable: bool,
    ) -> Result<ImageBitmaps, Error> {
        let stored = read_directory(name, file, header).await?;
        let node = Arc::<Bitmaps>::default();
        let disk = (header.geometry(), header.size);
        for entry in &stored.entries {
            let bitmap = read_bitmap(file, disk, entry, is_writable).await;
            let bitmap = bitmap.map_err(|error| {
                let shown = entry.name().escape_debug().to_string();
                error.at(format!("Could not read bitmap '{shown}' from image"))
            })?;
            node.add(bitmap, &[])?;
        }
        Ok(ImageBitmaps {
            node,
            shown: Mutex::new(stored.entries.clone()),
            stored: Lock::new(stored),
            is_writable,
            is_touched: Default::default(),
        })
    }
}

async fn read_directory(name: &str, file: &Node, header: &Header) -> Result<Stored, Error> {
    let pointer = header.extensions.iter().find_map(|extension| match extension {
        Extension::Bitmaps(pointer) => Some(pointer),
        _ => None,
    });
    let Some(pointer) = pointer else { return Ok(Stored::default()) };
    if !header.autoclear.contains(Autoclear::BITMAPS) {
        log::warn!(
            "{name}: a program lacking bitmap support modified this file, so all bitmaps are now \
             considered inconsistent. Some clusters may be leaked, run 'check -r' on the image \
             file to fix."
        );
        return Ok(Stored::default());
    }
    let failed = |errno| Error::os("Could not read bitmap directory", errno);
    let (offset, len) = (pointer.directory_offset, pointer.directory_size);
    if offset.checked_add(len).is_none_or(|end| end > file.len()) {
        return Err(failed(Errno::EIO));
    }
    let mut bytes = AlignedBuf::new(len as usize, 4096).ok_or_else(|| failed(Errno::ENOMEM))?;
    file.read(offset, &bytes.io_vec()).await.map_err(failed)?;
    let entries = super::parse_directory(&bytes, pointer.nb_bitmaps, &header.geometry())?;
    Ok(Stored { entries, directory: (offset, len) })
}

/// One bitmap of a disk of this length, as it is in memory.
async fn read_bitmap(
    file: &Node,
    (geometry, len): (Geometry, u64),
    entry: &StoredBitmap,
    is_writable: bool,
) -> Result<Bitmap, Error> {
    let inconsistent = entry.flags.contains(super::BitmapFlags::IN_USE);
    let bits = Bits::new(len.next_multiple_of(512), entry.granularity_bits.into())?;
    if !inconsistent {
        let read = read_bits(file, geometry, len, entry, &bits).await;
        read.map_err(|errno| Error::new(errno.to_string()).with_errno(errno))?;
    }
    let flags = BitmapFlags {
        recording: entry.flags.contains(super::BitmapFlags::AUTO) && !inconsistent,
        persistent: true,
        inconsistent,
        read_only: !is_writable,
        busy: false,
    };
    Ok(Bitmap::new(entry.name(), bits, flags))
}

async fn read_bits(
    file: &Node,
    geometry: Geometry,
    len: u64,
    entry: &StoredBitmap,
    bits: &Bits,
) -> IoResult {
    if u64::from(entry.table_size) != table_len(&geometry, entry.granularity_bits, len) {
        return Err(Errno(libc::EINVAL));
    }
    let size = geometry.cluster_size();
    let words = size as usize / 8;
    let mut left = bits.words().len() as u64 * 8;
    let mut data = AlignedBuf::new(size as usize, 4096).ok_or(Errno::ENOMEM)?;
    for (index, entry) in read_table(file, entry).await?.into_iter().enumerate() {
        let there = left.min(size);
        left -= there;
        match decode_table_entry(&geometry, entry).ok_or(Errno(libc::EINVAL))? {
            TableEntry::Zeroes => {}
            TableEntry::Ones => bits.set_words(index * words, std::iter::repeat_n(u64::MAX, words)),
            TableEntry::Data(host) => {
                // What is missing would look as if nothing had been written.
                if host + there > file.len() {
                    return Err(Errno::EIO);
                }
                data.fill(0);
                file.read(host, &data.io_vec().slice(0, there)).await?;
                let word = |bytes: &[u8; 8]| u64::from_le_bytes(*bytes);
                bits.set_words(index * words, data.as_chunks().0.iter().map(word));
            }
        }
    }
    Ok(())
}

/// The table of a bitmap, as numbers.
pub(super) async fn read_table(file: &Node, entry: &StoredBitmap) -> IoResult<Vec<u64>> {
    let len = entry.table_size as usize * 8;
    let end = entry.table_offset.checked_add(len as u64);
    if end.is_none_or(|end| end > file.len()) {
        return Err(Errno::EIO);
    }
    let mut table = AlignedBuf::new(len, 4096).ok_or(Errno::ENOMEM)?;
    read_padded(file, entry.table_offset, &table.io_vec()).await?;
    Ok(table.as_chunks().0.iter().map(|bytes| u64::from_be_bytes(*bytes)).collect())
}
