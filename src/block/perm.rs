//! Permissions: the access that each user of a node takes, and the access that it shares.
//!
//! The four permissions and their numbers are QEMU's, because they become lock bytes on image files
//! that QEMU locks too.

bitflags::bitflags! {
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash)]
    pub struct Perm: u8 {
        /// Reads see a consistent disk.
        const CONSISTENT_READ = 1;
        const WRITE = 1 << 1;
        /// Writes that leave the visible contents alone (copying from a backing file).
        const WRITE_UNCHANGED = 1 << 2;
        const RESIZE = 1 << 3;
    }
}

impl Perm {
    /// The names that QEMU's messages use.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        [
            (Perm::CONSISTENT_READ, "consistent read"),
            (Perm::WRITE, "write"),
            (Perm::WRITE_UNCHANGED, "write unchanged"),
            (Perm::RESIZE, "resize"),
        ]
        .into_iter()
        .filter_map(move |(perm, name)| self.contains(perm).then_some(name))
    }
}

/// What a user holds, and what it allows all others to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Perms {
    pub held: Perm,
    pub shared: Perm,
}

impl Perms {
    /// Of a node without users.
    pub const NONE: Perms = Perms { held: Perm::empty(), shared: Perm::all() };

    /// What all of several users hold and allow together.
    pub fn and(self, other: Perms) -> Perms {
        Perms { held: self.held | other.held, shared: self.shared & other.shared }
    }

    /// What a filter asks of its child: the same as its own users.
    pub fn filter(own: Perms) -> Perms {
        own
    }

    /// What a format asks of the file that holds its data and metadata: a writer also resizes, and
    /// nobody else may write or resize.
    pub fn format(own: Perms) -> Perms {
        let writes = own.held.intersects(Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE);
        let mut held = own.held | Perm::CONSISTENT_READ;
        if writes {
            held |= Perm::WRITE | Perm::RESIZE;
        }
        let shared = (own.shared | Perm::WRITE_UNCHANGED) - (Perm::WRITE | Perm::RESIZE);
        Perms { held, shared }
    }

    /// As [`format`](Perms::format), of an image that is written to at its end, when all users are gone, if
    /// `ends_with_writes`.
    pub fn format_with_end(own: Perms, ends_with_writes: bool) -> Perms {
        let mut perms = Perms::format(own);
        if ends_with_writes {
            perms.held |= Perm::WRITE | Perm::RESIZE;
        }
        perms
    }

    /// What an image asks of its backing file: to read it, while others write to it only if the
    /// image's own users can bear a disk that changes.
    pub fn backing(own: Perms) -> Perms {
        let mut shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        if own.shared.contains(Perm::WRITE) {
            shared |= Perm::WRITE | Perm::RESIZE;
        }
        Perms { held: own.held & Perm::CONSISTENT_READ, shared }
    }
}
