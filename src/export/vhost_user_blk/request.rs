//! Block requests (virtio 1.2, section 5.2.6): parsing, validation and status.

use super::config::MAX_DISCARD_SECTORS;
use crate::block::{SECTOR, WriteFlags, ZeroFlags};
use crate::export::core::disk::{Disk, Request};
use crate::export::core::failure::{Failure, Operation};
use crate::io::iovec::iovec;
use crate::io::{Errno, IoResult, IoVec};
use virtio_bindings::virtio_blk::*;

/// The byte that ends every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoError = VIRTIO_BLK_S_IOERR as u8,
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

impl From<IoResult> for Status {
    fn from(result: IoResult) -> Status {
        match result {
            Ok(()) => Status::Ok,
            Err(errno) if errno == Errno::ENOTSUP => Status::Unsupported,
            Err(_) => Status::IoError,
        }
    }
}

/// How a request ended that the storage has not failed.
pub struct Ended {
    pub status: Status,
    /// Bytes written to the guest's memory.
    pub written: u32,
    /// Bytes of the disk that it was about.
    pub bytes: u32,
}

impl From<Status> for Ended {
    fn from(status: Status) -> Ended {
        Ended { status, written: 0, bytes: 0 }
    }
}

/// What one request wants, as its header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    In,
    Out,
    Flush,
    Discard,
    WriteZeroes,
    GetId,
}

impl Kind {
    /// What it is to the disk, if it is about the disk's data.
    #[inline]
    pub fn operation(self) -> Option<Operation> {
        Some(match self {
            Kind::In => Operation::Read,
            Kind::Out => Operation::Write,
            Kind::Flush => Operation::Flush,
            Kind::Discard => Operation::Discard,
            Kind::WriteZeroes => Operation::WriteZeroes,
            Kind::GetId => return None,
        })
    }
}

/// The 16 bytes that every request begins with.
#[derive(Clone, Copy)]
pub struct Header {
    kind: u32,
    pub sector: u64,
}

pub const HEADER_LEN: usize = 16;

impl Header {
    /// Copies the header from the front of `out`, which holds that much.
    #[inline]
    pub fn read(out: &[libc::iovec]) -> [u8; HEADER_LEN] {
        match out {
            [first, ..] if first.iov_len >= HEADER_LEN => {
                // SAFETY: the segment is mapped and holds that many bytes; the guest may have put it at
                // any address, and may be writing to it.
                unsafe { first.iov_base.cast_const().cast::<[u8; HEADER_LEN]>().read_volatile() }
            }
            _ => {
                let mut header = [0; HEADER_LEN];
                // SAFETY: the segments are mapped guest memory.
                unsafe { IoVec::from_raw(out) }.copy_to(&mut header);
                header
            }
        }
    }

    pub fn parse(bytes: [u8; HEADER_LEN]) -> Header {
        let [a, b, c, d, _, _, _, _, sector @ ..] = bytes;
        let sector = u64::from_le_bytes(sector);
        Header { kind: u32::from_le_bytes([a, b, c, d]) & !VIRTIO_BLK_T_BARRIER, sector }
    }

    pub fn kind(self) -> Option<Kind> {
        Some(match self.kind {
            VIRTIO_BLK_T_IN => Kind::In,
            VIRTIO_BLK_T_OUT => Kind::Out,
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID => Kind::GetId,
            VIRTIO_BLK_T_DISCARD => Kind::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
            _ => return None,
        })
    }
}

/// Does a request on the slow path. `out` is what follows the header, `into` what comes before
/// the status byte; both hold less than 4 GiB.
///
/// # Errors
/// What the storage has failed.
pub async fn run(
    disk: &Disk,
    serial: &str,
    (kind, sector): (Kind, u64),
    out: IoVec<'_>,
    into: IoVec<'_>,
    durable: bool,
) -> Result<Ended, Failure> {
    let ok = |written, bytes| Ok(Ended { status: Status::Ok, written, bytes });
    match kind {
        Kind::In => {
            let len = into.len() as u32;
            let Some(at) = disk.transfer_range(sector, into.len()) else {
                return Ok(Status::IoError.into());
            };
            disk.run(Request::Read { at, into }).await?;
            ok(len, len)
        }
        Kind::Out => {
            let len = out.len() as u32;
            let at = match disk.transfer_range(sector, out.len()) {
                Some(at) if disk.options.writable => at,
                _ => return Ok(Status::IoError.into()),
            };
            let flags = if durable { WriteFlags::FUA } else { WriteFlags::empty() };
            disk.run(Request::Write { at, from: out, flags }).await?;
            ok(0, len)
        }
        Kind::Flush => {
            disk.run(Request::Flush).await?;
            ok(0, 0)
        }
        Kind::GetId => {
            let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
            let n = serial.len().min(id.len());
            id[..n].copy_from_slice(&serial.as_bytes()[..n]);
            into.copy_from(&id);
            ok(into.len().min(id.len() as u64) as u32, 0)
        }
        Kind::Discard | Kind::WriteZeroes => match range(disk, kind, &out, durable) {
            Ok((request, len)) => {
                disk.run(request).await?;
                ok(0, len)
            }
            Err(status) => Ok(status.into()),
        },
    }
}

/// Reads one segment of section 5.2.6's `virtio_blk_discard_write_zeroes`; the configuration space
/// says that we take no more. Gives the request and its length in bytes.
fn range(
    disk: &Disk,
    kind: Kind,
    out: &IoVec<'_>,
    durable: bool,
) -> Result<(Request<'static>, u32), Status> {
    const SEGMENT: usize = 16;
    if !disk.options.writable {
        return Err(Status::IoError);
    }
    if out.len() > SEGMENT as u64 {
        return Err(Status::Unsupported);
    }
    if out.len() < SEGMENT as u64 {
        return Err(Status::IoError);
    }
    let mut bytes = [0; SEGMENT];
    out.copy_to(&mut bytes);
    let [sector @ .., a, b, c, d, e, f, g, h] = bytes;
    let sector = u64::from_le_bytes(sector);
    let count = u32::from_le_bytes([a, b, c, d]);
    let flags = u32::from_le_bytes([e, f, g, h]);
    let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    let unknown = flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    if count > MAX_DISCARD_SECTORS {
        return Err(Status::IoError);
    }
    let len = count as u64 * SECTOR;
    let at = disk.transfer_range(sector, len).ok_or(Status::IoError)?;
    // After the range, as qemu-storage-daemon does: guests see one order of checks.
    if unknown || unmap && kind == Kind::Discard {
        return Err(Status::Unsupported);
    }
    let request = match kind {
        Kind::Discard => Request::Discard { at, len },
        _ => {
            let mut flags = ZeroFlags::empty();
            flags.set(ZeroFlags::UNMAP, unmap);
            flags.set(ZeroFlags::FUA, durable);
            Request::WriteZeroes { at, len, flags }
        }
    };
    Ok((request, len as u32))
}

/// The part of a list of segments from byte `from` on, `len` bytes long, without allocation where
/// the cut falls between segments or inside the first and last: the list is changed in place.
///
/// Returns the range of segments that remain. `from + len` must be inside the list.
pub fn trim(list: &mut [libc::iovec], from: usize, len: usize) -> std::ops::Range<usize> {
    let mut start = 0;
    let mut skip = from;
    while start < list.len() && skip >= list[start].iov_len {
        skip -= list[start].iov_len;
        start += 1;
    }
    if skip > 0 {
        let segment = list[start];
        list[start] =
            iovec(segment.iov_base.cast::<u8>().wrapping_add(skip), segment.iov_len - skip);
    }
    let mut end = start;
    let mut left = len;
    while left > 0 {
        let n = left.min(list[end].iov_len);
        list[end].iov_len = n;
        left -= n;
        end += 1;
    }
    start..end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trim_keeps_exactly_the_asked_bytes() {
        let bytes: Vec<u8> = (0..60).collect();
        let lens = [16usize, 1, 20, 3, 20];
        for from in 0..=60 {
            for len in 0..=60 - from {
                let mut at = 0;
                let mut list: Vec<_> = lens
                    .iter()
                    .map(|&n| {
                        at += n;
                        iovec(bytes.as_ptr().cast_mut().wrapping_add(at - n), n)
                    })
                    .collect();
                let range = trim(&mut list, from, len);
                let mut got = vec![0; len];
                // SAFETY: all inside `bytes`, and only read.
                let part = unsafe { IoVec::from_raw(&list[range]) };
                assert_eq!(part.len(), len as u64);
                part.copy_to(&mut got);
                assert_eq!(got, bytes[from..from + len]);
            }
        }
    }
}
