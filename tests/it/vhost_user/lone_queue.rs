//! A queue without a front end: the test is its guest, and attaches it to a worker itself.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vublk::block::Node;
use vublk::export::core::{Disk, DiskOptions};
use vublk::export::vhost_user_blk::memory::{Memory, Region};
use vublk::export::vhost_user_blk::queue::QueueStart;
use vublk::export::vhost_user_blk::ring::{Addresses, Ring, SplitRing};
use vublk_testkit::MemoryLayout;
use vublk_testkit::ring::RingLayout;

/// A guest's memory with one ring at its start.
pub struct Lone {
    pub guest: Arc<vublk_testkit::Memory>,
    pub memory: Arc<Memory>,
    pub ring: RingLayout,
}

impl Lone {
    /// `bytes` of memory, and a ring of `size` entries, up to 1024, in its first 64 KiB.
    pub fn new(bytes: u64, size: u16) -> Lone {
        let guest = vublk_testkit::Memory::new(&MemoryLayout::single(bytes as usize)).unwrap();
        // SAFETY: the region keeps its descriptor open through the call.
        let file = unsafe { BorrowedFd::borrow_raw(guest.regions()[0].fd()) }.try_clone_to_owned();
        let shared = VhostUserMemoryRegion {
            guest_phys_addr: 0,
            memory_size: bytes,
            user_addr: 0,
            mmap_offset: 0,
        };
        let region = Region::map(&shared, file.unwrap().into()).unwrap();
        let memory = Arc::new(Memory::new(vec![Arc::new(region)]).unwrap());
        let ring = RingLayout { size, desc: 0, avail: 16 << 10, used: 32 << 10 };
        Lone { guest, memory, ring }
    }

    /// What the queue is started with, on a disk that is only read.
    pub fn start(&self, node: Arc<Node>) -> QueueStart {
        let RingLayout { size, desc, avail, used } = self.ring;
        let at = Addresses { descriptors: desc, available: avail, used };
        let options =
            DiskOptions { writable: false, write_through: false, failures: Default::default() };
        QueueStart {
            index: 0,
            recorder: None,
            disk: Arc::new(Disk::new("", node, options, 512, None)),
            serial: String::new(),
            ring: SplitRing::new(&self.memory, size, at, 0, true).unwrap(),
            inflight: None,
            log: Default::default(),
            memory: self.memory.clone(),
            size,
            call: None,
            err: None,
            held: Vec::new(),
            paused: 0,
        }
    }
}
