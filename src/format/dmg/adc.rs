//! Apple Data Compression: literal runs, and copies of earlier output.

use crate::io::{Errno, IoResult};

/// Unpacks what fills `chunk` exactly.
///
/// # Errors
/// EIO if it does not, or a copy begins before the chunk.
pub fn unpack(stored: &[u8], chunk: &mut [u8]) -> IoResult {
    let wrong = Errno::EIO;
    let byte = |at: usize| stored.get(at).copied().map(usize::from).ok_or(wrong);
    let (mut at, mut done) = (0, 0);
    while done < chunk.len() {
        let first = byte(at)?;
        if first & 0x80 != 0 {
            let len = (first & 0x7f) + 1;
            let from = stored.get(at + 1..at + 1 + len).ok_or(wrong)?;
            chunk.get_mut(done..done + len).ok_or(wrong)?.copy_from_slice(from);
            (at, done) = (at + 1 + len, done + len);
            continue;
        }
        let (len, distance, taken) = match first & 0x40 {
            0 => ((first >> 2) + 3, (first & 3) << 8 | byte(at + 1)?, 2),
            _ => ((first & 0x3f) + 4, byte(at + 1)? << 8 | byte(at + 2)?, 3),
        };
        let from = done.checked_sub(distance + 1).ok_or(wrong)?;
        if done + len > chunk.len() {
            return Err(wrong);
        }
        // What is copied may be what was just written.
        (0..len).for_each(|n| chunk[done + n] = chunk[from + n]);
        (at, done) = (at + taken, done + len);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unpacked(stored: &[u8], len: usize) -> IoResult<Vec<u8>> {
        let mut chunk = vec![0; len];
        unpack(stored, &mut chunk).map(|()| chunk)
    }

    #[test]
    fn runs_and_copies_fill_a_chunk() {
        let stored = [0x82, b'a', b'b', b'c', 0x00, 2, 0x41, 0, 0, 0x80, b'z'];
        assert_eq!(unpacked(&stored, 12).unwrap(), b"abcabcccccc\x7a");
        assert_eq!(unpacked(&[], 0).unwrap(), b"");
    }

    #[test]
    fn what_leads_out_of_the_chunk_or_ends_too_early_is_refused() {
        for stored in [
            &[][..],
            &[0x80],
            &[0x81, 1],
            &[0x00, 0],
            &[0x80, 1, 0x00, 1],
            &[0x80, 1, 0x00],
            &[0x80, 1, 0x40, 0],
            &[0x84, 1, 2, 3, 4, 5],
            &[0x80, 1, 0x7f, 0, 0],
        ] {
            assert_eq!(unpacked(stored, 4), Err(Errno::EIO), "{stored:x?}");
        }
    }
}
