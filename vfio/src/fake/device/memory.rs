//! The memory of the host as the device reaches it: mappings, and the two kinds of lists that name pieces of it.

use super::*;

impl Device {
    pub fn map(&mut self, iova: u64, memory: HostRange) -> Result<(), Error> {
        let end = iova + memory.len() as u64;
        let overlaps = |(at, range): &(u64, HostRange)| *at < end && iova < at + range.len() as u64;
        let all = iova | memory.len() as u64 | memory.address() as u64;
        if !all.is_multiple_of(4096) || memory.is_empty() {
            return Err(Error::new(format!("mapping at {iova:#x} is not aligned")));
        }
        if self.mappings.iter().any(overlaps) {
            return Err(Error::new(format!("mapping at {iova:#x} overlaps another")));
        }
        self.counts.maps += 1;
        self.mappings.push((iova, memory));
        Ok(())
    }

    pub fn unmap(&mut self, iova: u64, len: usize) -> Result<(), Error> {
        let mut mappings = self.mappings.iter();
        let found = mappings.position(|(at, range)| (*at, range.len()) == (iova, len));
        let found = found.ok_or_else(|| Error::new(format!("nothing is mapped at {iova:#x}")))?;
        self.counts.unmaps += 1;
        self.mappings.swap_remove(found);
        self.events.push(Event::Unmapped(iova));
        Ok(())
    }

    /// The memory at an address, if all of it is mapped as one.
    pub(super) fn reach(&mut self, iova: u64, len: usize) -> Option<HostRange> {
        if !self.bus_master {
            self.complain(format!("access to {iova:#x} without bus mastering"));
            return None;
        }
        let part = self
            .mappings
            .iter()
            .find_map(|(at, range)| range.part(usize::try_from(iova.checked_sub(*at)?).ok()?, len));
        if part.is_none() {
            self.complain(format!("access to {len} bytes at {iova:#x}, which are not mapped"));
        }
        part
    }

    fn long(&mut self, iova: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.reach(iova, 8)?.read(0, &mut bytes);
        Some(u64::from_le_bytes(bytes))
    }

    fn page(&self) -> u64 {
        4096 << (self.configuration >> 7 & 0xf)
    }

    /// The pieces of memory that a command names, `len` bytes in all.
    pub fn pieces(&mut self, command: &Command, len: usize) -> Result<Vec<HostRange>, Status> {
        match (command.sgl_kind(), self.config.sgls & 3) {
            (0, _) => self.prps(command, len),
            (1, 1 | 2) => self.sgl(command, len),
            (kind, _) => {
                self.complain(format!("a command with a list of kind {kind}"));
                Err(Status::INVALID_FIELD)
            }
        }
    }

    /// The same of a scatter gather list (section 4.1.2).
    fn sgl(&mut self, command: &Command, len: usize) -> Result<Vec<HostRange>, Status> {
        let first = [command.0[3], command.0[4]];
        let mut blocks = Vec::new();
        if (first[1] >> 56) as u8 == sgl::LAST_SEGMENT {
            let (at, bytes) = (first[0], first[1] & 0xffff_ffff);
            if at % 8 != 0 || bytes == 0 || bytes % sgl::DESCRIPTOR != 0 {
                return Err(Status::INVALID_SEGMENT);
            }
            for at in (at..at + bytes).step_by(sgl::DESCRIPTOR as usize) {
                let longs = (self.long(at), self.long(at + 8));
                let (Some(address), Some(rest)) = longs else { return Err(Status::TRANSFER_ERROR) };
                blocks.push([address, rest]);
            }
        } else {
            blocks.push(first);
        }
        let (mut pieces, mut all) = (Vec::new(), 0);
        for [at, rest] in blocks {
            let bytes = (rest & 0xffff_ffff) as usize;
            let aligned = self.config.sgls & 3 == 1 || (at | rest) % 4 == 0;
            if (rest >> 32) as u32 != u32::from(sgl::DATA_BLOCK) << 24 || !aligned || bytes == 0 {
                self.complain(format!("a descriptor {at:#x} {rest:#x}"));
                return Err(Status::INVALID_DESCRIPTOR);
            }
            all += bytes;
            pieces.push(self.reach(at, bytes).ok_or(Status::TRANSFER_ERROR)?);
        }
        if all != len {
            self.complain(format!("a list of {all} bytes for {len}"));
            return Err(Status::INVALID_DATA_LENGTH);
        }
        Ok(pieces)
    }

    /// The same of PRPs (section 4.1.1).
    fn prps(&mut self, command: &Command, len: usize) -> Result<Vec<HostRange>, Status> {
        let page = self.page();
        let (first, second) = (command.0[3], command.0[4]);
        if first % 4 != 0 {
            return Err(Status::INVALID_PRP);
        }
        let mut pieces = Vec::new();
        let mut left = len;
        let mut add = |device: &mut Device, at: u64| {
            let n = left.min((page - at % page) as usize);
            left -= n;
            let piece = device.reach(at, n).ok_or(Status::TRANSFER_ERROR)?;
            pieces.push(piece);
            Ok(left)
        };
        let mut rest = add(self, first)?;
        if rest > 0 && rest <= page as usize {
            if second % page != 0 {
                return Err(Status::INVALID_PRP);
            }
            rest = add(self, second)?;
        }
        let mut list = second;
        while rest > 0 {
            let at = self.long(list).ok_or(Status::TRANSFER_ERROR)?;
            let last_of_page = (list + 8) % page == 0;
            if at % page != 0 {
                return Err(Status::INVALID_PRP);
            }
            if last_of_page && rest > page as usize {
                list = at;
                continue;
            }
            rest = add(self, at)?;
            list += 8;
        }
        Ok(pieces)
    }

    /// Copies `bytes` to where a command wants them.
    pub fn give(&mut self, command: &Command, bytes: &[u8]) -> Status {
        match self.pieces(command, bytes.len()) {
            Ok(pieces) => {
                let mut done = 0;
                for piece in pieces {
                    piece.write(0, &bytes[done..done + piece.len()]);
                    done += piece.len();
                }
                Status::SUCCESS
            }
            Err(status) => status,
        }
    }
}
