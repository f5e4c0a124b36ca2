//! The contents of a dirty bitmap: one bit for each piece of the disk.
//!
//! Any worker sets bits without a lock.

use crate::block::Error;
use crate::io::Errno;
use std::sync::atomic::{AtomicU64, Ordering};

/// The most bits of one bitmap: 512 MiB of memory. What QEMU stores in an image is no longer.
pub const MOST_BITS: u64 = 1 << 32;

/// A bit for each piece of a disk. Bit `n` is bit `n % 64` of word `n / 64`.
#[derive(Debug)]
pub struct Bits {
    granularity_bits: u32,
    /// Of the disk, in bytes; what is behind it has no bits.
    len: AtomicU64,
    /// Room for that, or more.
    words: Box<[AtomicU64]>,
}

impl Bits {
    /// Bits for a disk of `len` bytes, none of which is set.
    ///
    /// # Errors
    /// They would be too many ([`MOST_BITS`]), or there is no memory for them.
    pub fn new(len: u64, granularity_bits: u32) -> Result<Bits, Error> {
        Bits::with_room(len, granularity_bits, 0)
    }

    fn with_room(len: u64, granularity_bits: u32, room: usize) -> Result<Bits, Error> {
        let bits = len.div_ceil(1 << granularity_bits);
        if bits > MOST_BITS {
            let size = 1u64 << granularity_bits;
            let text = format!(
                "A bitmap of granularity {size} for a disk of {len} bytes has {bits} bits, more \
                 than {MOST_BITS}"
            );
            return Err(Error::new(text).with_errno(Errno(libc::EFBIG)));
        }
        let count = (bits.div_ceil(64) as usize).max(room);
        let mut words = Vec::new();
        let failed = |_| Error::os("Could not allocate a bitmap", Errno::ENOMEM);
        words.try_reserve_exact(count).map_err(failed)?;
        words.resize_with(count, AtomicU64::default);
        Ok(Bits { granularity_bits, len: len.into(), words: words.into() })
    }

    pub fn granularity_bits(&self) -> u32 {
        self.granularity_bits
    }

    /// Of the disk, in bytes.
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many bits there are.
    fn bits(&self) -> u64 {
        self.len().div_ceil(1 << self.granularity_bits)
    }

    /// The words that are in use.
    fn used(&self) -> &[AtomicU64] {
        &self.words[..self.bits().div_ceil(64) as usize]
    }

    /// Sets the bits of a range of bytes. What is set already is only read, so that memory that
    /// workers share is written once for each piece.
    pub fn mark(&self, at: u64, len: u64) {
        let end = at.saturating_add(len).min(self.len());
        if at >= end {
            return;
        }
        let (first, last) = (at >> self.granularity_bits, (end - 1) >> self.granularity_bits);
        for word in first / 64..=last / 64 {
            let from = first.max(word * 64) % 64;
            let to = last.min(word * 64 + 63) % 64;
            let mask = u64::MAX >> (63 - (to - from)) << from;
            let word = &self.words[word as usize];
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    pub fn clear(&self) {
        self.words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// How many are set.
    pub fn count(&self) -> u64 {
        self.used().iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// The words as they are now.
    pub fn words(&self) -> impl ExactSizeIterator<Item = u64> {
        self.words_from(0)
    }

    /// The words from `first` on, as they are now.
    pub fn words_from(&self, first: usize) -> impl ExactSizeIterator<Item = u64> {
        let words = self.used().get(first..).unwrap_or_default();
        words.iter().map(|word| word.load(Ordering::Relaxed))
    }

    /// Sets what is set in `words`, from word `first` on; bits that there are not are left out.
    pub fn set_words(&self, first: usize, words: impl Iterator<Item = u64>) {
        let bits = self.bits();
        for (index, word) in (first..self.used().len()).zip(words) {
            let there = bits - index as u64 * 64;
            let mask = if there >= 64 { u64::MAX } else { (1 << there) - 1 };
            if word & mask != 0 {
                self.words[index].fetch_or(word & mask, Ordering::Relaxed);
            }
        }
    }

    /// Sets all that `other` has set, whose pieces may be of another size.
    pub fn merge(&self, other: &Bits) {
        if self.granularity_bits == other.granularity_bits {
            return self.set_words(0, other.words());
        }
        let size = other.granularity_bits;
        for (index, mut word) in other.words().enumerate() {
            while word != 0 {
                let first = word.trailing_zeros();
                let run = (!(word >> first)).trailing_zeros();
                let at = (index as u64 * 64 + u64::from(first)) << size;
                self.mark(at, u64::from(run) << size);
                let end = first + run;
                word = if end == 64 { 0 } else { word >> end << end };
            }
        }
    }

    /// Makes these bits those of a disk of `len` bytes, if there is room: new ones are not set. Nobody
    /// marks what is being cut off.
    pub(super) fn resize_in_place(&self, len: u64) -> bool {
        let bits = len.div_ceil(1 << self.granularity_bits);
        if bits.div_ceil(64) > self.words.len() as u64 {
            return false;
        }
        // What is behind the end is clear at all times.
        let first = bits / 64;
        for (index, word) in self.words.iter().enumerate().skip(first as usize) {
            let keep = if index as u64 == first { (1u64 << (bits % 64)) - 1 } else { 0 };
            if word.load(Ordering::Relaxed) & !keep != 0 {
                word.fetch_and(keep, Ordering::Relaxed);
            }
        }
        self.len.store(len, Ordering::Release);
        true
    }

    /// The same bits for a longer disk, with room for more growth.
    ///
    /// # Errors
    /// As [`Bits::new`].
    pub(super) fn grown(&self, len: u64) -> Result<Bits, Error> {
        let room = self.words.len() + self.words.len() / 2;
        let new = Bits::with_room(len, self.granularity_bits, room)?;
        new.set_words(0, self.words());
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces that are set.
    fn set(bits: &Bits) -> Vec<u64> {
        let bit = |(index, word): (usize, u64)| {
            (0..64).filter(move |n| word >> n & 1 == 1).map(move |n| index as u64 * 64 + n)
        };
        bits.words().enumerate().flat_map(bit).collect()
    }

    #[test]
    fn a_mark_sets_the_pieces_that_it_touches() {
        let bits = Bits::new(300 * 512, 9).unwrap();
        for (at, len, wanted) in [
            (0, 1, vec![0]),
            (511, 2, vec![0, 1]),
            (63 * 512, 1024, vec![63, 64]),
            (60 * 512, 70 * 512, (60..130).collect()),
            (299 * 512, 5000, vec![299]),
            (300 * 512, 512, vec![]),
            (512, 0, vec![]),
            (u64::MAX, u64::MAX, vec![]),
            (0, u64::MAX, (0..300).collect()),
        ] {
            bits.clear();
            bits.mark(at, len);
            assert_eq!(set(&bits), wanted, "{at} {len}");
            assert_eq!(bits.count(), wanted.len() as u64);
        }
    }

    #[test]
    fn merging_pieces_of_any_size_covers_what_the_other_covers() {
        let seed = std::env::var("VUBLK_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or(1u64);
        println!("VUBLK_SEED={seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..200 {
            let len = rng.u64(1..1 << 20);
            let (a, b) = (rng.u32(9..14), rng.u32(9..14));
            let (into, from) = (Bits::new(len, a).unwrap(), Bits::new(len, b).unwrap());
            let mut wanted = vec![false; len.div_ceil(1 << a) as usize];
            for _ in 0..rng.u32(0..12) {
                let (at, n) = (rng.u64(0..len), rng.u64(1..20000));
                from.mark(at, n);
                let (first, last) =
                    (at >> b << b, ((at + n - 1).min(len - 1) >> b << b) + (1 << b));
                for piece in (first >> a)..=((last.min(len) - 1) >> a) {
                    wanted[piece as usize] = true;
                }
            }
            into.merge(&from);
            let wanted: Vec<u64> =
                (0..).zip(&wanted).filter(|(_, w)| **w).map(|(n, _)| n).collect();
            assert_eq!(set(&into), wanted, "{len} {a} {b}");
        }
    }

    #[test]
    fn what_was_cut_off_is_clear_when_the_disk_grows_again() {
        let bits = Bits::new(200 * 512, 9).unwrap();
        bits.mark(0, u64::MAX);
        assert!(bits.resize_in_place(70 * 512));
        assert_eq!(bits.count(), 70);
        assert!(bits.resize_in_place(200 * 512));
        assert_eq!(set(&bits), (0..70).collect::<Vec<_>>());
        assert!(!bits.resize_in_place(300 * 512));
        let grown = bits.grown(300 * 512).unwrap();
        assert_eq!(set(&grown), (0..70).collect::<Vec<_>>());
        grown.mark(0, u64::MAX);
        assert_eq!(grown.count(), 300);
    }

    #[test]
    fn more_bits_than_memory_is_given_for_are_refused() {
        let error = Bits::new(1 << 62, 9).unwrap_err();
        assert_eq!(error.errno(), Some(Errno(libc::EFBIG)));
    }
}
