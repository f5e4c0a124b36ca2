//! The objects that a front end owns and sends: events and memory.

use super::*;

/// The files that every front end has. A thread keeps them, because making them takes longer than many connections.
pub(super) struct Belongings {
    pub(super) memory: File,
    bytes: RefCell<Mapped>,
    kick: File,
    call: File,
    error: File,
}

thread_local! {
    pub(super) static BELONGINGS: Rc<Belongings> = Rc::new(Belongings::new());
}

impl Belongings {
    pub(super) fn new() -> Belongings {
        let memory = memory_file(MEMORY);
        let bytes = RefCell::new(Mapped::of(&memory, MEMORY as usize));
        let event = || file(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        Belongings { memory, bytes, kick: event(), call: event(), error: event() }
    }

    /// Memory of zeroes but for a ring at the beginning, with one read of one sector made available.
    pub(super) fn renew(&self) {
        let desc = |addr: u64, len: u32, flags: u16, next: u16| {
            let parts = [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes()];
            [parts.concat(), next.to_le_bytes().to_vec()].concat()
        };
        let table =
            [desc(0x2000, 16, 1, 1), desc(0x3000, 512, 3, 2), desc(0x2100, 1, 2, 0)].concat();
        let mut bytes = self.bytes.borrow_mut();
        bytes.alone().fill(0);
        for (at, part) in [(0, &table[..]), (0x1000, &[0, 0, 1, 0, 0, 0])] {
            bytes.put(at, part);
        }
        // It may have been given for an eventfd, and written to.
        (&self.memory).rewind().expect("a file");
    }

    pub(super) fn event(&self, code: u32) -> &File {
        match code {
            code::SET_VRING_KICK => &self.kick,
            code::SET_VRING_CALL => &self.call,
            _ => &self.error,
        }
    }
}
