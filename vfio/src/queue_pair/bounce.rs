//! Bounce buffers, for data that the device cannot address where it is.
//!
//! They are a bounded pool of pages; a request takes as many as it needs or waits.

#![forbid(unsafe_code)]

use crate::Error;
use crate::dma::Segments;
use crate::space::{Memory, Space};
use std::sync::Arc;

/// Bytes of a queue pair's bounce buffers. More than the longest transfer ([`super::super::controller`]).
const POOL: usize = 4 << 20;
const END: u32 = u32::MAX;

pub struct Bounce {
    memory: Memory,
    page: usize,
    /// The page that follows, in its chain or among the free ones.
    next: Vec<u32>,
    first_free: u32,
    free: usize,
}

/// The pages that one request has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Chain {
    first: u32,
}

impl Chain {
    pub const NONE: Chain = Chain { first: END };

    pub fn is_none(self) -> bool {
        self == Chain::NONE
    }
}

impl Bounce {
    pub fn new(space: &Arc<Space>, page: usize) -> Result<Bounce, Error> {
        let memory = space.memory(POOL, page)?;
        let pages = POOL / page;
        let next = (1..pages as u32).chain([END]).collect();
        Ok(Bounce { memory, page, next, first_free: 0, free: pages })
    }

    /// Pages for `len` bytes, not zero.
    pub fn take(&mut self, len: usize) -> Option<Chain> {
        let pages = len.div_ceil(self.page);
        if pages > self.free || pages == 0 {
            return None;
        }
        let first = self.first_free;
        let mut last = first;
        for _ in 1..pages {
            last = self.next[last as usize];
        }
        self.first_free = std::mem::replace(&mut self.next[last as usize], END);
        self.free -= pages;
        Some(Chain { first })
    }

    pub fn give_back(&mut self, chain: Chain) {
        let mut last = chain.first;
        if last == END {
            return;
        }
        self.free += 1;
        while self.next[last as usize] != END {
            last = self.next[last as usize];
            self.free += 1;
        }
        self.next[last as usize] = std::mem::replace(&mut self.first_free, chain.first);
    }

    fn pages(&self, chain: Chain) -> impl Iterator<Item = usize> + '_ {
        let mut at = chain.first;
        std::iter::from_fn(move || {
            let page = (at != END).then_some(at as usize)?;
            at = self.next[page];
            Some(page)
        })
    }

    /// The data pointer of a command with `len` bytes in `chain`.
    pub fn pieces(
        &self,
        chain: Chain,
        len: usize,
    ) -> impl Iterator<Item = Option<(u64, usize)>> + '_ {
        let (base, size) = (self.memory.iova(), self.page);
        self.pages(chain).enumerate().map(move |(n, page)| {
            Some((base + (page * size) as u64, size.min(len.saturating_sub(n * size))))
        })
    }

    /// Copies the data of `segments` to `chain`.
    pub fn fill(&self, chain: Chain, segments: Segments) {
        self.copy(chain, segments, true);
    }

    /// Copies what the device has written to `chain` to `segments`.
    pub fn empty(&self, chain: Chain, segments: Segments) {
        self.copy(chain, segments, false);
    }

    fn copy(&self, chain: Chain, segments: Segments, to_chain: bool) {
        let (mut pages, mut inside) = (self.pages(chain), self.page);
        let mut page = 0;
        for segment in segments.iter() {
            let mut done = 0;
            while done < segment.len() {
                if inside == self.page {
                    let Some(next) = pages.next() else { return };
                    (page, inside) = (next * self.page, 0);
                }
                let n = (segment.len() - done).min(self.page - inside);
                let here = self.memory.host().part(page + inside, n);
                let (Some(here), Some(there)) = (here, segment.part(done, n)) else { return };
                if to_chain {
                    there.copy_to(&here, 0)
                } else {
                    here.copy_to(&there, 0)
                };
                done += n;
                inside += n;
            }
        }
    }

    /// Never gives the memory back.
    pub fn leak(&mut self) {
        self.memory.leak();
    }
}
