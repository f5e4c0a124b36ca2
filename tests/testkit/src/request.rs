//! Block requests, and the ways to cut them into descriptors.
//!
//! A request is two streams of bytes: what the device reads (header, then data) and what it writes (data, then the
//! status byte). A [`Shape`] says where the streams are cut and where the pieces are; virtio 1 (2.7.4) allows any
//! cut.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::memory::{Buffer, Memory};
use crate::spec::{self, request_type, status};

/// One descriptor's worth of memory, before it is a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub addr: u64,
    pub len: u32,
    pub device_writes: bool,
}

/// A range of a DISCARD or WRITE_ZEROES request, in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    pub sector: u64,
    pub sectors: u32,
    pub flags: u32,
}

/// What the device is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    In {
        sector: u64,
        len: usize,
    },
    Out {
        sector: u64,
        data: Vec<u8>,
    },
    Flush,
    GetId,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
    /// Anything: the header's type and sector, the bytes after it, and how many bytes the device
    /// may write before the status.
    Raw {
        request_type: u32,
        sector: u64,
        data: Vec<u8>,
        writable: usize,
    },
}

impl Request {
    /// The bytes the device reads.
    fn readable(&self) -> Vec<u8> {
        let (kind, sector, data): (u32, u64, Vec<u8>) = match self {
            Request::In { sector, .. } => (request_type::IN, *sector, Vec::new()),
            Request::Out { sector, data } => (request_type::OUT, *sector, data.clone()),
            Request::Flush => (request_type::FLUSH, 0, Vec::new()),
            Request::GetId => (request_type::GET_ID, 0, Vec::new()),
            Request::Discard(ranges) => (request_type::DISCARD, 0, encode(ranges)),
            Request::WriteZeroes(ranges) => (request_type::WRITE_ZEROES, 0, encode(ranges)),
            Request::Raw { request_type, sector, data, .. } => {
                (*request_type, *sector, data.clone())
            }
        };
        let mut out = Vec::with_capacity(spec::HEADER_SIZE + data.len());
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&0u32.to_le_bytes());
        out.extend_from_slice(&sector.to_le_bytes());
        out.extend_from_slice(&data);
        out
    }

    /// How many bytes of data the device may write before the status.
    fn writable(&self) -> usize {
        match self {
            Request::In { len, .. } => *len,
            Request::GetId => spec::ID_SIZE,
            Request::Raw { writable, .. } => *writable,
            _ => 0,
        }
    }
}

fn encode(ranges: &[Range]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 * ranges.len());
    for range in ranges {
        out.extend_from_slice(&range.sector.to_le_bytes());
        out.extend_from_slice(&range.sectors.to_le_bytes());
        out.extend_from_slice(&range.flags.to_le_bytes());
    }
    out
}

/// Where a stream is cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// Header, data and status each in a descriptor, as Linux lays them out.
    Natural,
    /// The whole stream in one descriptor: header with data, data with status.
    Joined,
    /// A descriptor for every this many bytes.
    Each(usize),
    /// These sizes, the last piece taking what is left.
    Sizes(Vec<usize>),
}

impl Cut {
    /// Sizes of the pieces of a stream of `len` bytes whose natural border is at `border`.
    fn sizes(&self, len: usize, border: usize) -> Vec<usize> {
        let mut left = len;
        let mut take = |want: usize| {
            let n = want.min(left);
            left -= n;
            n
        };
        let mut sizes: Vec<usize> = match self {
            Cut::Natural => vec![take(border)],
            Cut::Joined => vec![take(len)],
            Cut::Each(n) => (0..len.div_ceil((*n).max(1))).map(|_| take((*n).max(1))).collect(),
            Cut::Sizes(sizes) => sizes.iter().map(|&n| take(n)).collect(),
        };
        sizes.push(left);
        sizes.retain(|&n| n > 0);
        sizes
    }
}

/// Where the pieces are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Wherever there is room.
    Packed,
    /// Each piece in the next memory region, round and round.
    Spread,
    /// The largest piece across the border of two regions that touch.
    Straddling,
}

/// How a request becomes a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    pub readable: Cut,
    pub writable: Cut,
    pub indirect: bool,
    pub placement: Placement,
}

impl Default for Shape {
    fn default() -> Self {
        Shape {
            readable: Cut::Natural,
            writable: Cut::Natural,
            indirect: false,
            placement: Placement::Packed,
        }
    }
}

impl Shape {
    /// Natural cuts in an indirect table.
    pub fn indirect() -> Self {
        Shape { indirect: true, ..Shape::default() }
    }
}

/// A request laid out in shared memory.
pub struct Laid {
    pieces: Vec<(Buffer, bool)>,
}

impl Laid {
    /// Lays `request` out in `memory`; data the device is to read is copied there, and the status
    /// byte is set to [`status::UNTOUCHED`].
    pub fn new(memory: &Arc<Memory>, request: &Request, shape: &Shape) -> Result<Laid> {
        let readable = request.readable();
        let writable = request.writable();
        let mut sizes = Vec::new();
        for size in shape.readable.sizes(readable.len(), spec::HEADER_SIZE) {
            sizes.push((size, false));
        }
        for size in shape.writable.sizes(writable + 1, writable) {
            sizes.push((size, true));
        }
        let largest = (0..sizes.len()).max_by_key(|&i| sizes[i].0);
        let mut pieces = Vec::with_capacity(sizes.len());
        for (i, &(size, device_writes)) in sizes.iter().enumerate() {
            let len = size as u64;
            let buffer = match shape.placement {
                Placement::Spread => {
                    memory.alloc_in(i % memory.regions().len(), len, alignment(len))?
                }
                Placement::Straddling if largest == Some(i) => memory.alloc_straddling(len)?,
                _ => memory.alloc(len, alignment(len))?,
            };
            pieces.push((buffer, device_writes));
        }
        let laid = Laid { pieces };
        laid.fill(&readable);
        Ok(laid)
    }

    fn fill(&self, readable: &[u8]) {
        let mut rest = readable;
        for (buffer, device_writes) in &self.pieces {
            if *device_writes {
                buffer.write(&vec![status::UNTOUCHED; buffer.len() as usize]);
            } else {
                let (now, later) = rest.split_at(buffer.len() as usize);
                buffer.write(now);
                rest = later;
            }
        }
    }

    /// The chain, for [`crate::ring::DriverRing::add`].
    pub fn segments(&self) -> Vec<Segment> {
        let segment = |(buffer, device_writes): &(Buffer, bool)| Segment {
            addr: buffer.addr(),
            len: buffer.len() as u32,
            device_writes: *device_writes,
        };
        self.pieces.iter().map(segment).collect()
    }

    /// What the device wrote: data and status.
    pub fn outcome(&self) -> Result<(Vec<u8>, u8)> {
        let mut bytes = Vec::new();
        for (buffer, _) in self.pieces.iter().filter(|(_, writes)| *writes) {
            bytes.extend(buffer.to_vec());
        }
        let status =
            bytes.pop().ok_or_else(|| Error::Peer("a request without a status byte".into()))?;
        Ok((bytes, status))
    }
}

/// Data is aligned as a guest's page cache would have it: O_DIRECT below needs no bounce.
fn alignment(len: u64) -> u64 {
    if len >= 512 { 4096 } else { 16 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryLayout;

    #[test]
    fn cuts_cover_the_stream_exactly() {
        assert_eq!(Cut::Natural.sizes(16 + 512, 16), [16, 512]);
        assert_eq!(Cut::Natural.sizes(1, 0), [1]);
        assert_eq!(Cut::Joined.sizes(513, 512), [513]);
        assert_eq!(Cut::Each(5).sizes(12, 3), [5, 5, 2]);
        assert_eq!(Cut::Sizes(vec![1, 7]).sizes(16, 16), [1, 7, 8]);
        assert_eq!(Cut::Sizes(vec![99]).sizes(16, 16), [16]);
    }

    #[test]
    fn a_request_is_laid_out_byte_for_byte_whatever_its_shape() {
        let memory = Memory::new(&MemoryLayout::adjacent(3, 1 << 16)).unwrap();
        let data: Vec<u8> = (0..1024u32).map(|i| (i * 7) as u8).collect();
        let request = Request::Out { sector: 9, data };
        for readable in [Cut::Natural, Cut::Joined, Cut::Each(100)] {
            for placement in [Placement::Packed, Placement::Spread, Placement::Straddling] {
                let shape = Shape { readable: readable.clone(), placement, ..Shape::default() };
                let laid = Laid::new(&memory, &request, &shape).unwrap();
                let mut seen = Vec::new();
                for segment in laid.segments().iter().filter(|s| !s.device_writes) {
                    let mut bytes = vec![0; segment.len as usize];
                    memory.read(segment.addr, &mut bytes);
                    seen.extend(bytes);
                }
                assert_eq!(seen, request.readable(), "{shape:?}");
                assert_eq!(laid.outcome().unwrap(), (vec![], status::UNTOUCHED));
            }
        }
    }
}
