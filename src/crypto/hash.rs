//! Hashes, and keys derived with them.

use super::{HashAlg, library};
use ripemd::{Digest, Ripemd160};
use zeroize::Zeroize;

impl HashAlg {
    /// The hash of `data`: the first [`HashAlg::digest_len`] bytes of what is returned.
    pub fn digest(self, data: &[u8]) -> [u8; 64] {
        let mut out = [0; 64];
        if !library::digest(self, data, &mut out) {
            out[..20].copy_from_slice(&Ripemd160::digest(data));
        }
        out
    }

    /// PBKDF2 with HMAC over this hash (RFC 8018, 5.2), into `out`. Takes long.
    pub fn pbkdf2(self, password: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        if !library::pbkdf2(self, (password, salt), iterations, out) {
            ripemd_pbkdf2(password, salt, iterations, out);
        }
    }
}

/// HMAC (RFC 2104) with the key's part of both hashes done.
#[derive(Clone)]
struct Hmac {
    inner: Ripemd160,
    outer: Ripemd160,
}

impl Hmac {
    fn new(key: &[u8]) -> Hmac {
        let mut block = [0; 64];
        if key.len() > block.len() {
            block[..20].copy_from_slice(&Ripemd160::digest(key));
        } else {
            block[..key.len()].copy_from_slice(key);
        }
        let mut padded = block.map(|byte| byte ^ 0x36);
        let inner = Ripemd160::new().chain_update(padded);
        padded = block.map(|byte| byte ^ 0x5c);
        let outer = Ripemd160::new().chain_update(padded);
        padded.zeroize();
        block.zeroize();
        Hmac { inner, outer }
    }

    fn of(&self, parts: &[&[u8]]) -> [u8; 20] {
        let inner = parts.iter().fold(self.inner.clone(), |hash, part| hash.chain_update(part));
        self.outer.clone().chain_update(inner.finalize()).finalize().into()
    }
}

fn ripemd_pbkdf2(password: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
    let hmac = Hmac::new(password);
    for (n, part) in (1u32..).zip(out.chunks_mut(20)) {
        let mut round = hmac.of(&[salt, &n.to_be_bytes()]);
        let mut sum = round;
        for _ in 1..iterations {
            round = hmac.of(&[&round]);
            sum.iter_mut().zip(round).for_each(|(sum, byte)| *sum ^= byte);
        }
        part.copy_from_slice(&sum[..part.len()]);
        sum.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn hashes_of_abc_are_those_of_their_specifications() {
        // RFC 1321, FIPS 180-4, and the page of RIPEMD-160's authors.
        for (alg, wanted) in [
            (HashAlg::Md5, "900150983cd24fb0d6963f7d28e17f72"),
            (HashAlg::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (HashAlg::Sha224, "23097d223405d8228642a477bda255b32aadbce4bda0b3f7e36c9da7"),
            (HashAlg::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (HashAlg::Ripemd160, "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"),
        ] {
            assert_eq!(hex(&alg.digest(b"abc")[..alg.digest_len()]), wanted, "{}", alg.name());
        }
    }

    #[test]
    fn keys_are_derived_as_rfc_6070_has_them() {
        let mut key = [0; 25];
        HashAlg::Sha1.pbkdf2(
            b"passwordPASSWORDpassword",
            b"saltSALTsaltSALTsaltSALTsaltSALTsalt",
            4096,
            &mut key,
        );
        assert_eq!(hex(&key), "3d2eec4fe41c849b80c8d83662c0e44a8b291a964cf2f07038");
        // RFC 7914, 11.
        let mut key = [0; 64];
        HashAlg::Sha256.pbkdf2(b"passwd", b"salt", 1, &mut key);
        assert_eq!(hex(&key[..16]), "55ac046e56e3089fec1691c22544b605");
    }

    #[test]
    fn ripemds_hmac_is_that_of_rfc_2286() {
        let hmac = Hmac::new(&[0x0b; 20]).of(&[b"Hi There"]);
        assert_eq!(hex(&hmac), "24cb4bd67d20fc1a5d2ed7732dcc39377f0a5668");
        // A key that is longer than a block.
        let long = b"Test Using Larger Than Block-Size Key - Hash Key First";
        let hmac = Hmac::new(&[0xaa; 80]).of(&[long]);
        assert_eq!(hex(&hmac), "6466ca07ac5eac29e1bd523e5ada7605b791fd8b");
    }
}
