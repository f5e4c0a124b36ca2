//! Bytes that are nobody else's business: wiped when they go, and left out of core files.

use std::ops::{Deref, DerefMut};
use zeroize::Zeroize;

/// Asks the kernel to leave the pages of a piece of memory out of core files. What shares those pages is left out with
/// it, which does no harm; a kernel that does not know the request is no reason to stop.
pub fn hide(at: *const u8, len: usize) {
    const PAGE: usize = 4096;
    let first = at.addr() & !(PAGE - 1);
    let end = (at.addr() + len).next_multiple_of(PAGE);
    let start = at.map_addr(|_| first).cast_mut();
    // SAFETY: the advice changes neither the mapping nor what is in it.
    unsafe { libc::madvise(start.cast(), end - first, libc::MADV_DONTDUMP) };
}

/// Secret bytes: a passphrase, a key. They are not shown by `Debug`.
#[derive(Default)]
pub struct Hidden(Box<[u8]>);

impl Hidden {
    /// `len` zero bytes, to be filled.
    pub fn zeroed(len: usize) -> Hidden {
        let bytes = vec![0; len].into_boxed_slice();
        if len > 0 {
            hide(bytes.as_ptr(), len);
        }
        Hidden(bytes)
    }

    /// A copy. The original is the caller's to wipe.
    pub fn copied(bytes: &[u8]) -> Hidden {
        let mut copy = Hidden::zeroed(bytes.len());
        copy.copy_from_slice(bytes);
        copy
    }

    /// Takes bytes, and wipes where they were.
    pub fn taken(mut bytes: Vec<u8>) -> Hidden {
        let copy = Hidden::copied(&bytes);
        bytes.zeroize();
        copy
    }
}

impl Clone for Hidden {
    fn clone(&self) -> Hidden {
        Hidden::copied(self)
    }
}

impl Deref for Hidden {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Hidden {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} hidden bytes", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_bytes_are_not_shown_and_lie_in_memory_that_is_not_dumped() {
        let secret = Hidden::copied(b"open sesame");
        assert!(!format!("{secret:?}").contains("sesame"));
        // `dd` among the flags of the mapping: "do not include area into core dump".
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let at = secret.as_ptr().addr();
        let mut inside = false;
        let mut flags = None;
        for line in maps.lines() {
            let range = line.split(' ').next().unwrap_or_default().split_once('-');
            let bounds = range.and_then(|(from, to)| {
                let hex = |text| usize::from_str_radix(text, 16).ok();
                Some(hex(from)?..hex(to)?)
            });
            inside = bounds.map_or(inside, |bounds| bounds.contains(&at));
            if let Some(found) = line.strip_prefix("VmFlags:").filter(|_| inside) {
                flags = Some(found.to_owned());
            }
        }
        let flags = flags.expect("a mapping with the secret");
        assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
    }
}
