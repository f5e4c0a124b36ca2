//! The guest's requests: memory, descriptors, chains, whole or damaged.

use super::*;

impl Guest {
    /// Any address: likelier those where something is, or ends.
    pub(super) fn address(&self, input: &mut Input<'_>) -> u64 {
        let place = input.pick(&self.memory.places);
        match input.u8() % 8 {
            0 => input.edgy(),
            1 => place.guest.wrapping_add(input.edgy()),
            2 => place.guest + place.len.saturating_sub(u64::from(input.u8())),
            3 => self.descriptors + input.below(u64::from(self.size) * 26 + 12),
            _ => place.guest + input.below(place.len),
        }
    }

    /// A descriptor as it comes, anywhere in the ring's table or where an indirect one might be.
    pub(super) fn descriptor(&mut self, input: &mut Input<'_>) {
        let index = u64::from(input.u16() % self.size);
        let at = if input.one_in(4) { self.address(input) } else { self.descriptors + index * 16 };
        let addr = self.address(input);
        let len = if input.one_in(2) { input.edgy() as u32 } else { input.below(64) as u32 * 16 };
        let flags = if input.one_in(8) { input.u16() } else { input.u16() % 8 };
        let next = input.below(u64::from(self.size) + 2) as u16;
        self.memory.put(at, &encode(addr, len, flags, next));
    }

    /// Room of the honest guest's, if there is some left.
    pub(super) fn room(&mut self, len: u64) -> Option<u64> {
        let base = self.memory.places[0];
        let at = self.free;
        self.free += len;
        (self.free <= base.guest + base.len).then_some(at)
    }

    /// Whether what was used of the table and of the memory must come back before the next request.
    pub(super) fn table_is_full(&self) -> bool {
        let base = self.memory.places[0];
        // A small ring's chains are indirect.
        let wanted = if self.size < 9 { 1 } else { 9 };
        base.guest + base.len < self.free + 0x4000 || self.next_descriptor + wanted > self.size
    }

    /// A request that keeps to the rules as far as its shape goes.
    pub(super) async fn request(&mut self, input: &mut Input<'_>) {
        if self.table_is_full() {
            // All of the table and of the memory is used again once nothing is in flight.
            self.settle().await;
            self.next_descriptor = 0;
            self.free = self.used + 6 + u64::from(self.size) * 8;
        }
        if self.memory.places.len() > MANY + 1 && input.starts_with(LONG_FLUSH) {
            return self.flush_of_many_segments();
        }
        let kind = input.pick(&[0u32, 1, 0, 1, 4, 8, 11, 13, 2, 0x8000_0000]);
        let sectors = disk::LEN / 512;
        let sector = match input.u8() % 8 {
            0 => input.edgy(),
            1 => sectors.wrapping_sub(input.below(4)),
            _ => input.below(sectors),
        };
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let reads = matches!(kind, 0 | 8);
        let mut chain: Vec<(u64, u32, u16)> = Vec::new();
        let cut = if input.one_in(4) { input.below(17) as u32 } else { 16 };
        let Some(at) = self.room(16) else { return };
        self.memory.put(at, &header);
        chain.push((at, cut, 0));
        chain.push((at + u64::from(cut), 16 - cut, 0));
        for _ in 0..input.below(4) {
            let len = input.pick(&[512u32, 4096, 16, 20, 0, 1, 511, 1024]);
            let data = match self.room(u64::from(len)) {
                Some(at) => at,
                None => return,
            };
            if matches!(kind, 11 | 13) {
                let mut segment = [0; 16];
                segment[..8].copy_from_slice(&sector.to_le_bytes());
                segment[8..12].copy_from_slice(&(input.edgy() as u32).to_le_bytes());
                segment[12..].copy_from_slice(&u32::from(input.u8() % 3).to_le_bytes());
                self.memory.put(data, &segment[..len.min(16) as usize]);
            }
            chain.push((data, len, if reads { WRITE } else { 0 }));
        }
        let Some(status) = self.room(1) else { return };
        self.memory.put(status, &[0xff]);
        chain.push((status, 1, WRITE));
        if !self.honest && input.one_in(4) {
            // All of it somewhere else.
            let (place, addr) = (input.below(chain.len() as u64) as usize, self.address(input));
            chain[place].0 = addr;
            chain[place].1 = if input.one_in(2) { input.edgy() as u32 } else { chain[place].1 };
        }
        let indirect = self.size < 9 || input.one_in(2);
        if let Some(head) = self.lay(&chain, indirect) {
            self.offer(head, status);
        }
        if !input.one_in(3) {
            self.notify();
        }
    }

    /// A flush whose readable part falls into exactly 2^16 segments, because each descriptor continues over many
    /// regions. What follows the header of a flush means nothing.
    pub(super) fn flush_of_many_segments(&mut self) {
        let places = &self.memory.places[1..=MANY];
        let lens = |count: usize| places[..count].iter().map(|place| place.len).sum::<u64>();
        let adjacent = places[0].guest + lens(MANY - 1) == places[MANY - 1].guest;
        let (all, less) = (lens(MANY) as u32, lens(MANY - 1) as u32);
        let data = places[0].guest;
        let (Some(header), Some(status)) = (self.room(16), self.room(1)) else { return };
        if !adjacent {
            return;
        }
        let mut bytes = [0; 16];
        bytes[0] = 4;
        self.memory.put(header, &bytes);
        self.memory.put(status, &[0xff]);
        let mut chain = vec![(data, all, 0); 0x1_0000 / MANY - 1];
        chain.splice(0..0, [(header, 16, 0), (data, less, 0)]);
        chain.push((status, 1, WRITE));
        if let Some(head) = self.lay(&chain, true) {
            self.offer(head, status);
            self.must_succeed = Some(head);
        }
        self.notify();
    }

    /// Puts a chain into the available ring; `notify` shows it.
    pub(super) fn offer(&mut self, head: u16, status: u64) {
        self.flying.insert(head, status);
        self.offered.push(head);
        if self.bitmap.is_some() {
            self.logged.insert(head);
        }
        let entry = self.available + 4 + u64::from(self.index & (self.size - 1)) * 2;
        self.memory.put(entry, &head.to_le_bytes());
        self.index = self.index.wrapping_add(1);
    }

    /// Writes a chain's descriptors and gives its head.
    pub(super) fn lay(&mut self, chain: &[(u64, u32, u16)], indirect: bool) -> Option<u16> {
        let head = self.next_descriptor;
        let (table, first) = if indirect {
            if self.flying.len() >= usize::from(self.size) || head >= self.size {
                return None;
            }
            self.next_descriptor += 1;
            let table = self.room(16 * chain.len() as u64)?;
            let len = 16 * chain.len() as u32;
            let at = self.descriptors + u64::from(head) * 16;
            self.memory.put(at, &encode(table, len, INDIRECT, 0));
            (table, 0)
        } else {
            self.next_descriptor += chain.len() as u16;
            (self.descriptors, head)
        };
        for (i, &(addr, len, flags)) in chain.iter().enumerate() {
            let last = i + 1 == chain.len();
            let index = first + i as u16;
            let (flags, next) = if last { (flags, 0) } else { (flags | NEXT, index + 1) };
            self.memory.put(table + u64::from(index) * 16, &encode(addr, len, flags, next));
        }
        Some(head)
    }
}
