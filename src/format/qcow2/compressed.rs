//! Compressed clusters: packing and unpacking them.
//!
//! The rule: what is stored is hostile. Unpacking ends when a cluster is full, takes no more memory
//! than a cluster and a bounded window, and a stream that gives less than a cluster is an error.
//!
//! What is packed can be read by every QEMU: a raw deflate stream with a window of 4 KiB, or one zstd
//! frame.

use super::header::Compression;
use crate::format::deflate;
use crate::io::{Errno, IoResult};
use std::cell::RefCell;
use std::io::Read;

/// zstd's default, and QEMU's.
const ZSTD_LEVEL: i32 = 3;

/// The largest window that a zstd frame may ask for, in bytes: what any level of the encoder takes
/// for clusters of up to 2 MiB.
const ZSTD_WINDOW_LIMIT: u64 = 8 << 20;

/// Unpacks one cluster of `len` bytes. `stored` may have other bytes behind the stream.
pub fn unpack(kind: Compression, stored: &[u8], len: usize) -> IoResult<Vec<u8>> {
    match kind {
        Compression::Zlib => deflate::unpack(stored, len),
        Compression::Zstd => {
            let mut cluster = vec![0; len];
            unzstd(stored, &mut cluster)?;
            Ok(cluster)
        }
    }
}

/// Packs one cluster; none if that does not make it smaller.
pub fn pack(kind: Compression, cluster: &[u8]) -> Option<Vec<u8>> {
    match kind {
        Compression::Zlib => deflate::pack(cluster),
        Compression::Zstd => {
            let mut stored = vec![0; cluster.len() - 1];
            let len = zstd(cluster, &mut stored)?;
            stored.truncate(len);
            // They are kept until they are written, many of them.
            stored.shrink_to_fit();
            Some(stored)
        }
    }
}

/// The length of what fits; none if it does not.
fn zstd(cluster: &[u8], stored: &mut [u8]) -> Option<usize> {
    thread_local! {
        static PACKER: RefCell<Option<zstd::bulk::Compressor<'static>>> =
            RefCell::new(zstd::bulk::Compressor::new(ZSTD_LEVEL).ok());
    }
    PACKER.with_borrow_mut(|packer| packer.as_mut()?.compress_to_buffer(cluster, stored).ok())
}

fn unzstd(mut stored: &[u8], mut cluster: &mut [u8]) -> IoResult {
    while !cluster.is_empty() {
        if zstd_window(stored).is_none_or(|window| window > ZSTD_WINDOW_LIMIT) {
            return Err(Errno::EIO);
        }
        let mut stream =
            ruzstd::decoding::StreamingDecoder::new(&mut stored).map_err(|_| Errno::EIO)?;
        let mut frame = 0;
        loop {
            let read = stream.read(cluster).map_err(|_| Errno::EIO)?;
            if read == 0 {
                break;
            }
            frame += read;
            cluster = &mut cluster[read..];
        }
        // Frame after frame of nothing would get nowhere.
        if frame == 0 {
            return Err(Errno::EIO);
        }
    }
    Ok(())
}

/// The window that a frame asks for, in bytes (RFC 8878, section 3.1.1.1); none if this is no frame.
fn zstd_window(frame: &[u8]) -> Option<u64> {
    let descriptor = *frame.strip_prefix(&0xfd2f_b528u32.to_le_bytes())?.first()?;
    let rest = &frame[5..];
    if descriptor & 1 << 5 == 0 {
        let window = *rest.first()?;
        let base = 1u64 << (10 + (window >> 3));
        return Some(base + base / 8 * (window & 7) as u64);
    }
    // A single segment: the window is the content, whose size follows the dictionary's number.
    let dictionary = [0, 1, 2, 4][descriptor as usize & 3];
    let size = rest.get(dictionary..)?;
    let width = [1, 2, 4, 8][descriptor as usize >> 6];
    let number = size.get(..width)?.iter().rev().fold(0u64, |n, &byte| n << 8 | byte as u64);
    Some(if width == 2 { number + 256 } else { number })
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression as Level;
    use std::io::Write;

    fn deflate(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), Level::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn what_is_packed_is_unpacked_and_never_larger() {
        let mut rng = fastrand::Rng::with_seed(1);
        for kind in [Compression::Zlib, Compression::Zstd] {
            for bits in 9..=21 {
                let alphabet = rng.u8(1..=80);
                let cluster: Vec<u8> = (0..1 << bits).map(|_| rng.u8(0..alphabet)).collect();
                let stored = pack(kind, &cluster).expect("it has little in it");
                assert!(stored.len() < cluster.len());
                assert!(
                    unpack(kind, &stored, cluster.len()).unwrap() == cluster,
                    "{kind:?} {bits}"
                );
            }
            let noise: Vec<u8> = (0..65536).map(|_| rng.u8(..)).collect();
            assert_eq!(pack(kind, &noise), None, "{kind:?}");
        }
    }

    #[test]
    fn a_deflated_cluster_is_unpacked_whatever_follows_it() {
        let cluster: Vec<u8> = (0..65536u32).map(|n| (n / 100) as u8).collect();
        let mut stored = deflate(&cluster);
        stored.extend([0xaa; 600]);
        assert!(unpack(Compression::Zlib, &stored, 65536).unwrap() == cluster);
        assert_eq!(unpack(Compression::Zlib, &stored, 65537), Err(Errno::EIO), "too little");
        assert!(unpack(Compression::Zlib, &stored, 4096).unwrap() == cluster[..4096]);
        assert_eq!(unpack(Compression::Zlib, &stored[..100], 65536), Err(Errno::EIO));
        assert_eq!(unpack(Compression::Zlib, &[], 512), Err(Errno::EIO));
        assert_eq!(unpack(Compression::Zlib, &[0xff; 512], 512), Err(Errno::EIO));
    }

    #[test]
    fn a_zstd_cluster_may_be_several_frames_and_asks_for_no_large_window() {
        let cluster: Vec<u8> = (0..65536u32).map(|n| (n / 100) as u8).collect();
        let frame = |bytes: &[u8]| {
            ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
        };
        let mut stored = frame(&cluster[..30000]);
        stored.extend(frame(&cluster[30000..]));
        stored.extend([0; 100]);
        assert!(unpack(Compression::Zstd, &stored, 65536).unwrap() == cluster);
        assert_eq!(unpack(Compression::Zstd, &stored, 65537), Err(Errno::EIO));
        assert_eq!(unpack(Compression::Zstd, &stored[..50], 65536), Err(Errno::EIO));
        // A window of 2^41 bytes.
        let mut large = 0xfd2f_b528u32.to_le_bytes().to_vec();
        large.extend([0, 31 << 3, 1, 0, 0]);
        assert_eq!(unpack(Compression::Zstd, &large, 512), Err(Errno::EIO));
        // An empty frame forever.
        let empty = frame(&[]);
        assert_eq!(unpack(Compression::Zstd, &empty.repeat(3), 512), Err(Errno::EIO));
    }
}
