//! Taking numbers and strings off bytes that the other side has sent.

use super::{MAX_STRING, Malformed};

/// What is left of a message.
pub(super) struct Fields<'a> {
    rest: &'a [u8],
    /// What the message is, for errors.
    what: &'static str,
}

impl<'a> Fields<'a> {
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Fields<'a> {
        Fields { rest: bytes, what }
    }

    /// The next `len` bytes.
    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let Some((bytes, rest)) = self.rest.split_at_checked(len) else {
            let (what, left) = (self.what, self.rest.len());
            return Err(Malformed(format!("{what} ends {left} bytes into a field of {len}")));
        };
        self.rest = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string of `len` bytes.
    pub(super) fn string(&mut self, len: usize) -> Result<&'a str, Malformed> {
        if len > MAX_STRING {
            let what = self.what;
            return Err(Malformed(format!(
                "{what} has a string of {len} bytes, and {MAX_STRING} are allowed"
            )));
        }
        let bytes = self.bytes(len)?;
        str::from_utf8(bytes)
            .map_err(|_| Malformed(format!("{} has a string that is no UTF-8", self.what)))
    }

    /// A string behind its length of 32 bits.
    pub(super) fn counted_string(&mut self) -> Result<&'a str, Malformed> {
        let len = self.u32()?;
        self.string(len as usize)
    }

    /// The string up to the end.
    pub(super) fn last_string(mut self) -> Result<&'a str, Malformed> {
        self.string(self.rest.len())
    }

    pub(super) fn len(&self) -> usize {
        self.rest.len()
    }

    /// There must be nothing left.
    pub(super) fn end(self) -> Result<(), Malformed> {
        match self.rest.len() {
            0 => Ok(()),
            more => Err(Malformed(format!("{} is {more} bytes too long", self.what))),
        }
    }
}

/// Puts fields into a message of a known length.
pub(super) struct Put<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Put<N> {
    pub(super) fn new() -> Put<N> {
        Put { bytes: [0; N], at: 0 }
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Put<N> {
        self.bytes[self.at..][..bytes.len()].copy_from_slice(bytes);
        self.at += bytes.len();
        self
    }

    pub(super) fn u16(self, value: u16) -> Put<N> {
        self.bytes(&value.to_be_bytes())
    }

    pub(super) fn u32(self, value: u32) -> Put<N> {
        self.bytes(&value.to_be_bytes())
    }

    pub(super) fn u64(self, value: u64) -> Put<N> {
        self.bytes(&value.to_be_bytes())
    }

    pub(super) fn done(self) -> [u8; N] {
        debug_assert_eq!(self.at, N);
        self.bytes
    }
}
