//! Compressed clusters as raw deflate streams with a window of 4 KiB, and as zlib streams.
//!
//! qcow and qcow2 have the former, which every QEMU reads; other formats have the latter.
//!
//! The rule: what is stored is hostile. Unpacking ends when a cluster is full, takes no more memory than a cluster and a
//! bounded window, and a stream that gives less than a cluster is an error.

use crate::io::{Errno, IoResult};
use std::cell::RefCell;

/// QEMU's reader has a window of `1 << 12` bytes, and no larger one.
const WINDOW_BITS: u8 = 12;
/// The least that makes images no more than a hundredth larger than QEMU's, which take zlib's own 6.
const LEVEL: u32 = 6;

/// Packs one cluster; none if that does not make it smaller.
pub fn pack(cluster: &[u8]) -> Option<Vec<u8>> {
    thread_local! {
        /// It takes longer to make one than to pack a small cluster.
        static STREAM: RefCell<flate2::Compress> = RefCell::new(flate2::Compress::new_with_window_bits(
            flate2::Compression::new(LEVEL),
            false,
            WINDOW_BITS,
        ));
    }
    let mut stored = vec![0; cluster.len() - 1];
    let len = STREAM.with_borrow_mut(|stream| {
        stream.reset();
        match stream.compress(cluster, &mut stored, flate2::FlushCompress::Finish) {
            Ok(flate2::Status::StreamEnd) => Some(stream.total_out() as usize),
            _ => None,
        }
    })?;
    stored.truncate(len);
    // They are kept until they are written, many of them.
    stored.shrink_to_fit();
    Some(stored)
}

/// Packs bytes into a zlib stream, which may be longer than they are.
pub fn pack_zlib(bytes: &[u8]) -> Vec<u8> {
    thread_local! {
        static STREAM: RefCell<flate2::Compress> =
            RefCell::new(flate2::Compress::new(flate2::Compression::new(LEVEL), true));
    }
    // Blocks that are stored as they are have a few bytes each, and so has the stream.
    let mut stored = Vec::with_capacity(bytes.len() + bytes.len() / 1000 + 64);
    STREAM.with_borrow_mut(|stream| {
        stream.reset();
        // There is room for all of it.
        let _ = stream.compress_vec(bytes, &mut stored, flate2::FlushCompress::Finish);
    });
    stored.shrink_to_fit();
    stored
}

/// Unpacks one cluster of `len` bytes. `stored` may have other bytes behind the stream.
pub fn unpack(stored: &[u8], len: usize) -> IoResult<Vec<u8>> {
    thread_local! {
        static STREAM: RefCell<flate2::Decompress> = RefCell::new(flate2::Decompress::new(false));
    }
    let mut cluster = vec![0; len];
    STREAM.with_borrow_mut(|stream| {
        stream.reset(false);
        let flush = flate2::FlushDecompress::Finish;
        // That there is no end of the stream does not matter, once the cluster is full.
        let _ = stream.decompress(stored, &mut cluster, flush).map_err(|_| Errno::EIO)?;
        if stream.total_out() == len as u64 { Ok(cluster) } else { Err(Errno::EIO) }
    })
}

/// Unpacks a zlib stream, which may be followed by other bytes; how long it is unpacked.
///
/// # Errors
/// EIO if it is none, does not end, has another checksum, or is longer than the room for it.
pub fn unpack_zlib(stored: &[u8], into: &mut [u8]) -> IoResult<usize> {
    let mut stream = flate2::Decompress::new(true);
    match stream.decompress(stored, into, flate2::FlushDecompress::Finish) {
        Ok(flate2::Status::StreamEnd) => Ok(stream.total_out() as usize),
        _ => Err(Errno::EIO),
    }
}
