//! The current traits of a node, which follow from its options and from the nodes below it.
//!
//! The rule held here: they change only while nothing is in flight through the node, so readers need no order among
//! the parts.

use super::working_memory::WorkingMemory;
use super::{Abilities, Driver, Node, NodeOptions, Traits};
use crate::io::is_aligned;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Traits that threads share.
#[derive(Default)]
pub(super) struct CurrentTraits {
    request_align: AtomicU32,
    buffer_align: AtomicU32,
    max_transfer: AtomicU32,
    max_segments: AtomicU32,
    zero_align: AtomicU32,
    max_zero: AtomicU64,
    discard_align: AtomicU32,
    max_discard: AtomicU64,
    optimal_io: AtomicU32,
    abilities: AtomicU32,
}

/// Each part by itself, and how a thread reads it.
macro_rules! parts {
    ($($name:ident: $part:ty),* $(,)?) => {
        $(#[inline]
        pub fn $name(&self) -> $part {
            self.$name.load(Ordering::Relaxed)
        })*
    };
}

impl CurrentTraits {
    parts! {
        request_align: u32,
        buffer_align: u32,
        max_transfer: u32,
        max_segments: u32,
        zero_align: u32,
        max_zero: u64,
        discard_align: u32,
        max_discard: u64,
        optimal_io: u32,
    }

    #[inline]
    pub fn abilities(&self) -> Abilities {
        Abilities::from_bits_retain(self.abilities.load(Ordering::Relaxed))
    }

    pub fn get(&self) -> Traits {
        Traits {
            request_align: self.request_align(),
            buffer_align: self.buffer_align(),
            max_transfer: self.max_transfer(),
            max_segments: self.max_segments(),
            zero_align: self.zero_align(),
            max_zero: self.max_zero(),
            discard_align: self.discard_align(),
            max_discard: self.max_discard(),
            optimal_io: self.optimal_io(),
            abilities: self.abilities(),
        }
    }

    fn set(&self, new: Traits) {
        let order = Ordering::Relaxed;
        self.request_align.store(new.request_align, order);
        self.buffer_align.store(new.buffer_align, order);
        self.max_transfer.store(new.max_transfer, order);
        self.max_segments.store(new.max_segments, order);
        self.zero_align.store(new.zero_align, order);
        self.max_zero.store(new.max_zero, order);
        self.discard_align.store(new.discard_align, order);
        self.max_discard.store(new.max_discard, order);
        self.optimal_io.store(new.optimal_io, order);
        self.abilities.store(new.abilities.bits(), order);
    }
}

impl From<Traits> for CurrentTraits {
    fn from(traits: Traits) -> CurrentTraits {
        let current = CurrentTraits::default();
        current.set(traits);
        current
    }
}

/// What a node makes of its driver's traits.
pub(super) fn of_node(driver: &dyn Driver, options: &NodeOptions) -> Traits {
    let mut traits = driver.traits();
    if options.read_only {
        traits.abilities |= Abilities::READ_ONLY;
    }
    if !options.discard {
        traits.abilities -= Abilities::DISCARD;
    }
    traits
}

impl Node {
    /// What requests to this node should look like to be quick; any other shape works too.
    pub fn traits(&self) -> Traits {
        self.traits.get()
    }

    /// Whether a transfer on the fast path can use this memory as it is.
    #[inline]
    pub fn takes_memory(&self, segments: &[libc::iovec]) -> bool {
        let align = self.traits.buffer_align();
        (align <= 1 || is_aligned(segments, align))
            && segments.len() <= self.traits.max_segments() as usize
    }

    /// Works out again what requests should look like, and what they may need, when the nodes below this one have.
    /// Whether that is something new. Nothing is in flight through the node.
    pub(super) fn follow_children(&self) -> bool {
        let traits = of_node(self.driver(), &self.options());
        self.working_memory.set(WorkingMemory::of(self.driver(), &traits));
        let is_new = traits != self.traits();
        self.traits.set(traits);
        is_new
    }
}
