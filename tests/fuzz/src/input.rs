//! A fuzzer's bytes, consumed from the front: decisions first, then contents.
//!
//! Zeroes follow the end, so that every prefix of an input is an input.

/// See the module's text.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(data: &'a [u8]) -> Input<'a> {
        Input(data)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn starts_with(&self, what: &[u8]) -> bool {
        self.0.starts_with(what)
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let taken = self.bytes(N);
        out[..taken.len()].copy_from_slice(taken);
        out
    }

    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// Once in `n` times, for inputs without a plan.
    pub fn one_in(&mut self, n: u8) -> bool {
        self.u8() % n == n - 1
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        match n {
            0 | 1 => 0,
            2..=256 => u64::from(self.u8()) % n,
            257..=0x1_0000 => u64::from(self.u16()) % n,
            _ => self.u64() % n,
        }
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// A number near the edges that matter to lengths and addresses.
    pub fn edgy(&mut self) -> u64 {
        match self.u8() % 8 {
            0 => u64::from(self.u8()),
            1 => u64::from(self.u16()),
            2 => u64::from(self.u32()),
            3 => self.u64(),
            4 => 0u64.wrapping_sub(u64::from(self.u8())),
            5 => u64::from(u32::MAX).wrapping_sub(u64::from(self.u8())),
            6 => 1 << (self.u8() % 64),
            _ => u64::from(self.u8()) * 512,
        }
    }

    /// Up to `n` bytes; fewer at the end.
    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }
}
