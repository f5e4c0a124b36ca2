//! Numbers and checksums as the format stores them: big-endian, and a sum of bytes.

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).copied().unwrap_or([0; N])
}

/// The number at an offset; zero past the end.
pub fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array_at(bytes, at))
}

/// As [`u16_at`].
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array_at(bytes, at))
}

/// As [`u16_at`].
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array_at(bytes, at))
}

/// The 16 bytes of an identifier at an offset.
pub fn id_at(bytes: &[u8], at: usize) -> [u8; 16] {
    array_at(bytes, at)
}

/// Puts a field at an offset.
pub fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

/// The complement of the sum of all bytes of a structure, in which its own checksum at `place` counts as zeroes.
fn checksum(bytes: &[u8], place: usize) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u32::from(byte)).sum::<u32>();
    !(sum(&bytes[..place]) + sum(&bytes[place + 4..]))
}

/// Whether a structure has the checksum that it states at `place`.
pub fn is_sealed(bytes: &[u8], place: usize) -> bool {
    u32_at(bytes, place) == checksum(bytes, place)
}

/// Puts the checksum at `place` into a structure that is whole otherwise.
pub fn seal(bytes: &mut [u8], place: usize) {
    let sum = checksum(bytes, place);
    put(bytes, place, &sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_that_was_sealed_is_found_whole_until_it_changes() {
        let mut bytes = vec![200; 1024];
        seal(&mut bytes, 36);
        assert!(is_sealed(&bytes, 36));
        bytes[1023] ^= 1;
        assert!(!is_sealed(&bytes, 36));
        assert_eq!((u16_at(&bytes, 0), u32_at(&bytes, 1022), u64_at(&bytes, 2000)), (0xc8c8, 0, 0));
    }
}
