//! Unpacking of one chunk.
//!
//! Stored bytes are hostile: they fill the chunk exactly or are an error, and take a bounded amount of memory.

use super::adc;
use crate::format::deflate;
use crate::io::{Errno, IoResult};
use std::io::Read;

/// Memory that unpacking LZMA may take beside the chunk, in KiB: the largest dictionary that xz makes by itself, and
/// the decoder.
const LZMA_LIMIT: u32 = (64 << 10) + (1 << 10);

/// How a chunk is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    Adc,
    Zlib,
    Bzip2,
    Lzfse,
    /// In the container of xz.
    Lzma,
}

impl Packing {
    /// Bytes of memory that unpacking takes beside the chunk and what is stored.
    pub fn scratch(self) -> u64 {
        match self {
            Packing::Adc | Packing::Zlib => 64 << 10,
            Packing::Bzip2 | Packing::Lzfse => 4 << 20,
            Packing::Lzma => u64::from(LZMA_LIMIT) << 10,
        }
    }
}

/// Unpacks a chunk of a known length.
///
/// # Errors
/// EIO if the chunk is not filled exactly.
pub fn unpack(packing: Packing, stored: &[u8], chunk: &mut [u8]) -> IoResult {
    match packing {
        Packing::Adc => adc::unpack(stored, chunk),
        Packing::Zlib => match deflate::unpack_zlib(stored, chunk)? {
            len if len == chunk.len() => Ok(()),
            _ => Err(Errno::EIO),
        },
        Packing::Bzip2 => fill(bzip2::read::BzDecoder::new(stored), chunk),
        Packing::Lzfse => fill(lzfse_rust::LzfseRingDecoder::default().reader_bytes(stored), chunk),
        Packing::Lzma => {
            fill(lzma_rust2::XzReader::new_mem_limit(stored, false, LZMA_LIMIT), chunk)
        }
    }
}

/// Fills the chunk with all that there is to read.
fn fill(mut from: impl Read, chunk: &mut [u8]) -> IoResult {
    from.read_exact(chunk).map_err(|_| Errno::EIO)?;
    // The end is read, too: there may be a checksum.
    match from.read(&mut [0]) {
        Ok(0) => Ok(()),
        _ => Err(Errno::EIO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn packed(packing: Packing, bytes: &[u8]) -> Vec<u8> {
        let mut stored = Vec::new();
        match packing {
            Packing::Adc => {
                for run in bytes.chunks(128) {
                    stored.push(0x7f + run.len() as u8);
                    stored.extend(run);
                }
            }
            Packing::Zlib => {
                let level = flate2::Compression::default();
                let mut to = flate2::write::ZlibEncoder::new(&mut stored, level);
                to.write_all(bytes).unwrap();
                to.finish().unwrap();
            }
            Packing::Bzip2 => {
                let level = bzip2::Compression::default();
                let mut to = bzip2::write::BzEncoder::new(&mut stored, level);
                to.write_all(bytes).unwrap();
                to.finish().unwrap();
            }
            Packing::Lzfse => drop(lzfse_rust::encode_bytes(bytes, &mut stored).unwrap()),
            Packing::Lzma => {
                let options = lzma_rust2::XzOptions::with_preset(6);
                let mut to = lzma_rust2::XzWriter::new(&mut stored, options).unwrap();
                to.write_all(bytes).unwrap();
                to.finish().unwrap();
            }
        }
        stored
    }

    #[test]
    fn each_packing_fills_a_chunk_exactly_or_fails() {
        let mut rng = fastrand::Rng::with_seed(1);
        let bytes: Vec<u8> = (0..70_000).map(|n| (n / 300) as u8 ^ rng.u8(..2)).collect();
        for packing in [Packing::Adc, Packing::Zlib, Packing::Bzip2, Packing::Lzfse, Packing::Lzma]
        {
            let stored = packed(packing, &bytes);
            let unpacked = |stored: &[u8], len: usize| {
                let mut chunk = vec![0; len];
                unpack(packing, stored, &mut chunk).map(|()| chunk)
            };
            assert!(unpacked(&stored, bytes.len()).unwrap() == bytes, "{packing:?}");
            let more = unpacked(&stored, bytes.len() + 1);
            assert_eq!(more, Err(Errno::EIO), "{packing:?}: it has less");
            if packing != Packing::Adc {
                let less = unpacked(&stored, bytes.len() - 1);
                assert_eq!(less, Err(Errno::EIO), "{packing:?}: it has more");
            }
            let cut = unpacked(&stored[..stored.len() / 2], bytes.len());
            assert_eq!(cut, Err(Errno::EIO), "{packing:?}: it is cut off");
            for _ in 0..200 {
                // Nothing but an error, or other bytes.
                let mut wrong = stored.clone();
                (0..rng.usize(1..5)).for_each(|_| wrong[rng.usize(..stored.len())] = rng.u8(..));
                let _ = unpacked(&wrong, bytes.len());
            }
        }
    }
}
