//! The anti-forensic splitter (LUKS1 On-Disk Format, chapter 2.4).
//!
//! It blows a key up to so many stripes that all of them are needed to get it back: overwriting any part destroys it.

use super::{HashAlg, Hidden, library};

/// Stripes of a key, `stripes` times as long as it.
pub fn split(hash: HashAlg, key: &[u8], stripes: usize) -> Hidden {
    let len = key.len();
    let mut all = Hidden::zeroed(len * stripes);
    let (random, last) = all.split_at_mut(len * (stripes - 1));
    library::random(random);
    let mut sum = Hidden::zeroed(len);
    for stripe in random.chunks_exact(len) {
        add(&mut sum, stripe);
        diffuse(hash, &mut sum);
    }
    last.copy_from_slice(key);
    add(last, &sum);
    all
}

/// The key of its stripes.
pub fn merge(hash: HashAlg, all: &[u8], stripes: usize) -> Hidden {
    let len = all.len() / stripes;
    let mut sum = Hidden::zeroed(len);
    for (n, stripe) in all.chunks_exact(len).enumerate() {
        add(&mut sum, stripe);
        if n + 1 < stripes {
            diffuse(hash, &mut sum);
        }
    }
    sum
}

fn add(sum: &mut [u8], stripe: &[u8]) {
    sum.iter_mut().zip(stripe).for_each(|(sum, byte)| *sum ^= byte);
}

/// Each piece as long as the hash becomes the hash of its number and itself.
fn diffuse(hash: HashAlg, block: &mut [u8]) {
    let mut input = zeroize::Zeroizing::new([0u8; 68]);
    for (n, piece) in (0u32..).zip(block.chunks_mut(hash.digest_len())) {
        let len = piece.len();
        input[..4].copy_from_slice(&n.to_be_bytes());
        input[4..][..len].copy_from_slice(piece);
        piece.copy_from_slice(&hash.digest(&input[..4 + len])[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_comes_back_from_all_its_stripes_and_not_from_damaged_ones() {
        for (hash, len) in [(HashAlg::Sha1, 64), (HashAlg::Sha256, 32), (HashAlg::Sha512, 24)] {
            let key: Vec<u8> = (0..len).collect();
            let mut stripes = split(hash, &key, 50);
            assert_eq!(merge(hash, &stripes, 50)[..], key[..]);
            stripes[usize::from(len) * 20 + 3] ^= 1;
            assert_ne!(merge(hash, &stripes, 50)[..], key[..]);
        }
    }

    #[test]
    fn diffusion_hashes_the_number_before_each_piece() {
        let mut block = [7; 30];
        diffuse(HashAlg::Sha1, &mut block);
        let wanted = |n: u8, len: usize| {
            let input = [&[0, 0, 0, n][..], &[7; 20][..len]].concat();
            HashAlg::Sha1.digest(&input)[..len].to_vec()
        };
        assert_eq!(block[..], [wanted(0, 20), wanted(1, 10)].concat());
    }
}
