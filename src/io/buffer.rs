//! Memory of our own for direct I/O.
//!
//! What requests need again and again is kept by the thread that had it last: fresh memory would have to be zeroed or
//! faulted in, which costs as much as the copy it is used for.

use super::IoVec;
use super::iovec::iovec;
use super::lent::Lent;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::RefCell;
use std::ptr::NonNull;

/// Kept buffers have these lengths, each twice the one before; and are aligned to the shortest.
const SHORTEST: usize = 4096;
const CLASSES: usize = 9;
/// The most that a thread keeps, in bytes.
const MOST_KEPT: usize = 4 << 20;

/// Memory of our own, aligned for direct I/O.
pub struct AlignedBuf {
    base: NonNull<u8>,
    layout: Layout,
    /// At most the layout's size.
    len: usize,
    /// Of its kind may be kept.
    class: Option<usize>,
    /// To operations that fill it, and to those that read it.
    to_fill: Lent,
    to_send: Lent,
}

// SAFETY: the buffer owns its memory alone.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes at a multiple of `align` (a power of two). `None` when memory is short:
    /// a length that comes from outside must cost an error, not the process.
    pub fn new(len: usize, align: usize) -> Option<AlignedBuf> {
        let layout = Layout::from_size_align(len.max(1), align.max(1)).ok()?;
        Some(AlignedBuf::of(zeroed(layout)?, layout, layout.size(), None))
    }

    fn of(base: NonNull<u8>, layout: Layout, len: usize, class: Option<usize>) -> AlignedBuf {
        AlignedBuf { base, layout, len, class, to_fill: Lent::default(), to_send: Lent::default() }
    }

    /// As [`AlignedBuf::new`], but the bytes may be anything, also what another request has left: they
    /// are written before they are shown to anybody.
    pub fn for_overwriting(len: usize, align: usize) -> Option<AlignedBuf> {
        let Some(class) = class_of(len).filter(|_| align <= SHORTEST) else {
            return AlignedBuf::new(len, align);
        };
        let layout = Layout::from_size_align(SHORTEST << class, SHORTEST).ok()?;
        let kept = KEPT.try_with(|kept| kept.borrow_mut().take(class)).ok().flatten();
        let base = kept.map_or_else(|| zeroed(layout), Some)?;
        let mut buffer = AlignedBuf::of(base, layout, len, Some(class));
        if cfg!(debug_assertions) {
            // So that tests see it where somebody shows what he has not written.
            buffer.fill(0xa5);
        }
        Some(buffer)
    }

    /// The whole buffer as a list to fill, or to write from.
    ///
    /// # Panics
    /// An operation on it was forgotten, here and wherever the bytes are looked at.
    pub fn io_vec(&mut self) -> IoVec<'_> {
        self.to_send.check();
        self.list(&self.to_fill)
    }

    /// The whole buffer as a list to write from.
    pub fn source(&self) -> IoVec<'_> {
        self.list(&self.to_send).into_sendable()
    }

    fn list<'m>(&'m self, user: &'m Lent) -> IoVec<'m> {
        self.to_fill.check();
        // SAFETY: the memory is our own, borrowed for the list, and not freed before all operations that
        // `user` counts have completed. If it is to be filled, the caller has borrowed it alone.
        unsafe { IoVec::from_raw(&[iovec(self.base.as_ptr(), self.len)]) }.lent_by(user)
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        self.to_fill.check();
        // SAFETY: base points to at least len initialised bytes of our own, which no operation changes.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for AlignedBuf {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        self.to_fill.check();
        self.to_send.check();
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if !self.to_fill.is_free() || !self.to_send.is_free() {
            // The kernel may have it still.
            return;
        }
        let is_kept = self.class.is_some_and(|class| {
            KEPT.try_with(|kept| kept.borrow_mut().put(class, self.base)).unwrap_or(false)
        });
        if !is_kept {
            // SAFETY: allocated with this layout, and nobody else has it.
            unsafe { dealloc(self.base.as_ptr(), self.layout) }
        }
    }
}

fn zeroed(layout: Layout) -> Option<NonNull<u8>> {
    // SAFETY: no layout here has size zero.
    NonNull::new(unsafe { alloc_zeroed(layout) })
}

/// The class of the shortest kept buffers that have room for `len` bytes.
fn class_of(len: usize) -> Option<usize> {
    let class =
        (len.max(SHORTEST).checked_next_power_of_two()? / SHORTEST).trailing_zeros() as usize;
    (class < CLASSES).then_some(class)
}

thread_local! {
    static KEPT: RefCell<Kept> = const { RefCell::new(Kept::new()) };
}

/// What a thread keeps.
struct Kept {
    buffers: [Vec<NonNull<u8>>; CLASSES],
    bytes: usize,
}

impl Kept {
    const fn new() -> Kept {
        Kept { buffers: [const { Vec::new() }; CLASSES], bytes: 0 }
    }

    fn take(&mut self, class: usize) -> Option<NonNull<u8>> {
        let base = self.buffers[class].pop()?;
        self.bytes -= SHORTEST << class;
        Some(base)
    }

    /// Whether there was room for it.
    fn put(&mut self, class: usize, base: NonNull<u8>) -> bool {
        let bytes = self.bytes + (SHORTEST << class);
        if bytes > MOST_KEPT {
            return false;
        }
        self.bytes = bytes;
        self.buffers[class].push(base);
        true
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        for (class, buffers) in self.buffers.iter_mut().enumerate() {
            let Ok(layout) = Layout::from_size_align(SHORTEST << class, SHORTEST) else { continue };
            for base in buffers.drain(..) {
                // SAFETY: allocated with this layout, and nobody else has it.
                unsafe { dealloc(base.as_ptr(), layout) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gets_its_own_buffers_again_at_the_length_that_it_asks_for() {
        let mut first = AlignedBuf::for_overwriting(60 << 10, 512).unwrap();
        first.fill(7);
        let at = first.as_ptr();
        drop(first);
        let longer = AlignedBuf::for_overwriting(128 << 10, 4096).unwrap();
        assert_ne!(longer.as_ptr(), at);
        let again = AlignedBuf::for_overwriting(64 << 10, 4096).unwrap();
        assert_eq!((again.as_ptr(), again.len()), (at, 64 << 10));
        assert!((at as usize).is_multiple_of(SHORTEST));
        let fresh = AlignedBuf::new(64 << 10, 4096).unwrap();
        assert!(fresh.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn no_more_is_kept_than_the_limit() {
        let all: Vec<_> =
            (0..10).map(|_| AlignedBuf::for_overwriting(1 << 20, 4096).unwrap()).collect();
        drop(all);
        assert_eq!(KEPT.with(|kept| kept.borrow().bytes), MOST_KEPT);
        assert!(AlignedBuf::for_overwriting(2 << 20, 4096).unwrap().class.is_none());
        assert!(AlignedBuf::for_overwriting(usize::MAX, 4096).is_none());
    }
}
