//! Numbers, GUIDs and checksums as the format stores them ([MS-VHDX] 2.1).

use uuid::Uuid;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// Bytes of a GUID.
pub const GUID_LEN: usize = 16;

/// Where a structure with a checksum has it, right behind its signature.
const CHECKSUM: std::ops::Range<usize> = 4..8;

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).copied().unwrap_or([0; N])
}

/// The number at an offset; zero past the end.
pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

/// As [`u16_at`].
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

/// As [`u16_at`].
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

/// The GUID at an offset; none (all zeroes) past the end.
pub fn guid_at(bytes: &[u8], at: usize) -> Uuid {
    Uuid::from_bytes_le(array_at(bytes, at))
}

/// Puts a field at an offset.
pub fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// CRC-32C of a structure, whose own checksum counts as zeroes.
fn checksum(bytes: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&bytes[..CHECKSUM.start]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[CHECKSUM.end..])
}

/// Whether a structure begins with this signature and has the checksum that it says.
pub fn is_sealed(bytes: &[u8], signature: &[u8; 4]) -> bool {
    bytes.len() >= CHECKSUM.end
        && bytes.starts_with(signature)
        && u32_at(bytes, CHECKSUM.start) == checksum(bytes)
}

/// Puts the signature and the checksum into a structure that is whole otherwise.
pub fn seal(bytes: &mut [u8], signature: &[u8; 4]) {
    put(bytes, 0, signature);
    let checksum = checksum(bytes);
    put(bytes, CHECKSUM.start, &checksum.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_that_was_sealed_is_found_whole_until_it_changes() {
        let mut bytes = vec![7; 4096];
        seal(&mut bytes, b"head");
        assert!(is_sealed(&bytes, b"head") && !is_sealed(&bytes, b"regi"));
        bytes[4095] ^= 1;
        assert!(!is_sealed(&bytes, b"head"));
        assert!(!is_sealed(b"head", b"head"));
    }

    #[test]
    fn numbers_past_the_end_are_zero() {
        let bytes = [1, 2, 3, 4];
        assert_eq!((u16_at(&bytes, 2), u32_at(&bytes, 2), u64_at(&bytes, 9)), (0x403, 0, 0));
        assert!(guid_at(&bytes, 0).is_nil());
    }
}
