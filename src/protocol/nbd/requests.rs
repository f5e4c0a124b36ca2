//! Requests of one connection: their slots, from when they are asked for until they are answered.

use super::ranges::Ranges;
use crate::io::{Errno, IoResult, Segments, Token};
use crate::nbd::CommandFlags;
use crate::nbd::request::{CMD_BLOCK_STATUS, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES};
use std::task::Waker;

/// What is asked for.
#[derive(Clone, Copy)]
pub struct Ask {
    pub command: u16,
    pub flags: CommandFlags,
    /// Bytes.
    pub offset: u64,
    pub len: u64,
    pub memory: Option<Memory>,
}

/// The memory of a request.
#[derive(Clone, Copy)]
pub struct Memory(Segments);

// SAFETY: those who ask keep the list and the memory until the answer, wherever it is used.
unsafe impl Send for Memory {}

impl Memory {
    /// # Safety
    /// The list stays in place, and what it names mapped, until the request has been answered.
    pub unsafe fn new(segments: Segments) -> Memory {
        Memory(segments)
    }

    /// The list.
    pub fn list(&self) -> &[libc::iovec] {
        // SAFETY: the promise of `new`; a request that has its answer has no slot any more.
        unsafe { self.0.as_slice() }
    }
}

impl Ask {
    pub fn is_read(&self) -> bool {
        self.command == CMD_READ
    }

    /// Whether it changes what is stored, not durably.
    pub fn is_owed(&self) -> bool {
        matches!(self.command, CMD_WRITE | CMD_WRITE_ZEROES | CMD_TRIM)
            && !self.flags.contains(CommandFlags::FUA)
    }
}

/// The first extent of block status: its length in bytes, and its flags. Nothing of other requests.
pub type Answer = Option<(u64, u64)>;

/// Tells a task of another worker; of nothing, if the request was not even sent.
pub type RemoteDone = Box<dyn FnOnce(Option<IoResult<Answer>>) + Send>;

/// Whom to tell of the answer.
pub enum Owner {
    /// A queue of the worker.
    Queue(Token),
    /// A task of the worker, which looks for itself.
    Task(Option<Waker>),
    /// A task of another worker.
    Remote(RemoteDone),
    /// Nobody waits any more, and the memory is another's.
    Nobody,
}

/// Where a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Free,
    /// It is to be sent.
    Queued,
    /// A send in flight names its memory.
    Sending,
    /// It is answered before all of it was sent; how is known.
    AnsweredEarly,
    /// It has been sent.
    Sent,
    /// Its task has not seen the answer yet.
    Answered,
}

pub struct Slot {
    generation: u32,
    pub stage: Stage,
    pub ask: Ask,
    pub owner: Owner,
    /// What the first error of its chunks was.
    pub error: Option<Errno>,
    /// Which of its bytes have come, for reads.
    pub filled: Ranges,
    pub answer: Answer,
    /// Chunks that carried no data.
    pub chunks: u32,
}

pub struct Requests {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Reads among those that are not answered.
    reads: usize,
}

/// Room for so many requests before it has to grow.
pub const USUAL: usize = 256;

impl Default for Requests {
    fn default() -> Requests {
        Requests { slots: Vec::with_capacity(USUAL), free: Vec::with_capacity(USUAL), reads: 0 }
    }
}

impl Requests {
    /// Gives a request a slot, to be sent.
    pub fn insert(&mut self, ask: Ask, owner: Owner) -> u32 {
        self.reads += usize::from(ask.is_read());
        let mut new = Slot {
            generation: 0,
            stage: Stage::Queued,
            ask,
            owner,
            error: None,
            filled: Ranges::default(),
            answer: None,
            chunks: 0,
        };
        match self.free.pop() {
            Some(index) => {
                let slot = &mut self.slots[index as usize];
                new.generation = slot.generation.wrapping_add(1);
                *slot = new;
                index
            }
            None => {
                self.slots.push(new);
                self.slots.len() as u32 - 1
            }
        }
    }

    pub fn get(&mut self, index: u32) -> &mut Slot {
        &mut self.slots[index as usize]
    }

    /// What a request of the slot is called on the wire.
    pub fn cookie(&self, index: u32) -> u64 {
        u64::from(self.slots[index as usize].generation) << 32 | u64::from(index)
    }

    /// The slot of a request that waits for its answer, by its cookie.
    pub fn find(&mut self, cookie: u64) -> Option<u32> {
        let index = cookie as u32;
        let slot = self.slots.get(index as usize)?;
        let waits = matches!(slot.stage, Stage::Sending | Stage::Sent);
        (waits && u64::from(slot.generation) == cookie >> 32).then_some(index)
    }

    /// Takes the owner of a request that has its answer. The slot is free, unless a task is to look there.
    pub fn answer(&mut self, index: u32, result: IoResult<Answer>) -> (Ask, Owner) {
        let slot = &mut self.slots[index as usize];
        self.reads -= usize::from(slot.ask.is_read());
        let ask = slot.ask;
        if let Owner::Task(_) = slot.owner {
            slot.stage = Stage::Answered;
            (slot.error, slot.answer) = (result.err(), result.unwrap_or_default());
            return (ask, std::mem::replace(&mut slot.owner, Owner::Task(None)));
        }
        let owner = std::mem::replace(&mut slot.owner, Owner::Nobody);
        self.release(index);
        (ask, owner)
    }

    /// The slot's task has seen the answer, or the request was never sent.
    pub fn release(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.stage = Stage::Free;
        slot.owner = Owner::Nobody;
        slot.ask.memory = None;
        self.free.push(index);
    }

    /// As [`Requests::release`], of one that has no answer.
    pub fn withdraw(&mut self, index: u32) {
        self.reads -= usize::from(self.slots[index as usize].ask.is_read());
        self.release(index);
    }

    /// Reads that have no answer.
    pub fn reads(&self) -> usize {
        self.reads
    }

    /// Whether nothing waits for an answer.
    pub fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
            || self.slots.iter().all(|slot| matches!(slot.stage, Stage::Free | Stage::Answered))
    }

    /// Those that wait, in the order of their slots.
    pub fn waiting(&self) -> Vec<u32> {
        let waits = |slot: &&Slot| !matches!(slot.stage, Stage::Free | Stage::Answered);
        let slots = (0..).zip(&self.slots);
        slots.filter(|(_, slot)| waits(slot)).map(|(index, _)| index).collect()
    }
}

impl Slot {
    /// It is to be sent once more, from the start.
    pub fn begin_again(&mut self) {
        self.stage = Stage::Queued;
        self.error = None;
        self.answer = None;
        self.chunks = 0;
        self.filled = Ranges::default();
    }

    /// How a reply ends that has no more chunks.
    pub fn outcome(&self) -> Result<IoResult<Answer>, &'static str> {
        if let Some(errno) = self.error {
            return Ok(Err(errno));
        }
        if self.ask.is_read() && !self.filled.is_whole(self.ask.len) {
            return Err("a read was answered in part");
        }
        if self.ask.command == CMD_BLOCK_STATUS && self.answer.is_none() {
            return Err("block status was answered without an extent");
        }
        Ok(Ok(self.answer))
    }
}
