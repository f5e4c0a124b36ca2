//! Detection of zero sectors in data that was read.

use crate::block::SECTOR;

/// The length of the longest prefix of `bytes` whose sectors are all zero or all not, and which of
/// both it is. `bytes` is not empty; a last sector may be cut short.
pub fn zero_prefix(bytes: &[u8]) -> (bool, usize) {
    let mut sectors = bytes.chunks(SECTOR as usize);
    let first = sectors.next().is_some_and(is_zero);
    let alike = sectors.take_while(|sector| is_zero(sector) == first).count();
    (first, bytes.len().min((alike + 1) * SECTOR as usize))
}

/// Whether all bytes are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // By words of eight, eight at a time, so that the compiler has something to make wide.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| {
        let words = chunk.as_chunks::<8>().0.iter();
        words.fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0
    }) && rest.iter().all(|&byte| byte == 0)
}
