//! Scatter lists: the memory that a request reads into or writes from.
//!
//! The memory may be the guest's. The guest writes to it whenever it likes, so no Rust reference to
//! it is ever made: bytes move by raw copies, and nothing is read twice where a change between the
//! two reads would matter.

use super::lent::Lent;
use super::turn_share::moved;
use smallvec::SmallVec;
use std::marker::PhantomData;
use std::ptr::NonNull;

/// A list of memory segments that stay mapped for `'m`.
///
/// Slicing makes a new list over the same memory; it allocates only beyond four segments.
#[derive(Clone)]
pub struct IoVec<'m> {
    segments: SmallVec<[libc::iovec; 4]>,
    len: u64,
    /// The memory stays until all operations on it have completed, so that the kernel may use it. Otherwise only
    /// for `'m`.
    is_kept: bool,
    is_fillable: bool,
    /// The counters of operations, each for `'m`.
    owners: SmallVec<[NonNull<Lent>; 2]>,
    memory: PhantomData<&'m mut [u8]>,
}

impl<'m> IoVec<'m> {
    /// A list of raw segments, for memory that the guest shares.
    ///
    /// # Safety
    /// Every segment must be mapped readable and writable for `'m`, and until every operation
    /// started on the list has completed, also one whose future was forgotten: [`IoVec::lent_by`] tells of
    /// those. Others may change the bytes meanwhile.
    pub unsafe fn from_raw(segments: &[libc::iovec]) -> IoVec<'m> {
        let segments = SmallVec::from_slice(segments);
        IoVec { is_kept: true, ..IoVec::borrowed(segments) }
    }

    fn borrowed(segments: SmallVec<[libc::iovec; 4]>) -> IoVec<'m> {
        let len = segments.iter().map(|s| s.iov_len as u64).sum();
        let owners = SmallVec::new();
        IoVec { segments, len, is_kept: len == 0, is_fillable: true, owners, memory: PhantomData }
    }

    /// No bytes at all.
    pub fn empty() -> IoVec<'m> {
        IoVec::borrowed(SmallVec::new())
    }

    /// Bytes that nobody else uses meanwhile. Operations go through a buffer of their own: an
    /// [`AlignedBuf`](super::AlignedBuf) spares that copy.
    pub fn from_mut(bytes: &'m mut [u8]) -> IoVec<'m> {
        IoVec::borrowed(SmallVec::from_slice(&[iovec(bytes.as_mut_ptr(), bytes.len())]))
    }

    /// Bytes to write from, by the way of [`IoVec::from_mut`]. The list cannot be filled.
    pub fn from_ref(bytes: &'m [u8]) -> IoVec<'m> {
        let segment = iovec(bytes.as_ptr().cast_mut(), bytes.len());
        let list = IoVec::borrowed(SmallVec::from_slice(&[segment]));
        IoVec { is_fillable: false, ..list }
    }

    /// The list with one more owner, which counts the operations on it.
    pub fn lent_by(mut self, owner: &'m Lent) -> IoVec<'m> {
        self.owners.push(NonNull::from(owner));
        self
    }

    /// A list that is only to be written from.
    pub(super) fn into_sendable(self) -> IoVec<'m> {
        IoVec { is_fillable: false, ..self }
    }

    /// Whether the kernel may use the memory itself.
    pub(super) fn is_kept(&self) -> bool {
        self.is_kept
    }

    /// The counters of operations.
    pub(super) fn owners(&self) -> impl Iterator<Item = &'m Lent> {
        // SAFETY: `lent_by` has borrowed each for 'm.
        self.owners.iter().map(|owner| unsafe { owner.as_ref() })
    }

    /// # Panics
    /// The list was made to write from.
    pub fn check_fillable(&self) {
        assert!(self.is_fillable, "memory that was made to write from is to be filled");
    }

    /// The bytes that all segments hold together.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The segments as the kernel takes them.
    pub fn as_raw(&self) -> &[libc::iovec] {
        &self.segments
    }

    /// Whether every segment starts and ends on a multiple of `align` (a power of two, in bytes).
    pub fn is_aligned(&self, align: u32) -> bool {
        is_aligned(&self.segments, align)
    }

    /// The part from byte `from` on, `len` bytes long.
    ///
    /// # Panics
    /// If the part is not inside the list.
    pub fn slice(&self, from: u64, len: u64) -> IoVec<'m> {
        assert!(from.checked_add(len).is_some_and(|end| end <= self.len), "slice outside the list");
        let mut segments = SmallVec::new();
        let (mut skip, mut left) = (from as usize, len as usize);
        for segment in &self.segments {
            if left == 0 {
                break;
            }
            if skip >= segment.iov_len {
                skip -= segment.iov_len;
                continue;
            }
            let take = left.min(segment.iov_len - skip);
            segments.push(iovec(segment.iov_base.cast::<u8>().wrapping_add(skip), take));
            left -= take;
            skip = 0;
        }
        IoVec { segments, len, owners: self.owners.clone(), ..*self }
    }

    /// Joins lists that lie one after the other in the request.
    pub fn concat(parts: &[&IoVec<'m>]) -> IoVec<'m> {
        IoVec {
            segments: parts.iter().flat_map(|part| part.segments.iter().copied()).collect(),
            len: parts.iter().map(|part| part.len).sum(),
            is_kept: parts.iter().all(|part| part.is_kept),
            is_fillable: parts.iter().all(|part| part.is_fillable || part.is_empty()),
            owners: parts.iter().flat_map(|part| part.owners.iter().copied()).collect(),
            memory: PhantomData,
        }
    }

    /// Copies `from` into the memory, beginning at the list's first byte, up to the shorter of both.
    ///
    /// # Panics
    /// The list was made to write from.
    pub fn copy_from(&self, mut from: &[u8]) {
        self.check_fillable();
        moved(self.len.min(from.len() as u64));
        for segment in &self.segments {
            let n = segment.iov_len.min(from.len());
            // SAFETY: the segment is mapped and writable for 'm; `from` has n bytes.
            unsafe { std::ptr::copy(from.as_ptr(), segment.iov_base.cast(), n) };
            from = &from[n..];
        }
    }

    /// Copies the memory's first bytes to `to`, up to the shorter of both.
    pub fn copy_to(&self, mut to: &mut [u8]) {
        moved(self.len.min(to.len() as u64));
        for segment in &self.segments {
            let n = segment.iov_len.min(to.len());
            // SAFETY: the segment is mapped and readable for 'm; `to` has room for n bytes.
            unsafe { std::ptr::copy(segment.iov_base.cast_const().cast(), to.as_mut_ptr(), n) };
            to = &mut to[n..];
        }
    }

    /// Zeroes all the memory.
    ///
    /// # Panics
    /// The list was made to write from.
    pub fn zero(&self) {
        self.check_fillable();
        moved(self.len);
        // SAFETY: every segment is mapped and writable for 'm.
        unsafe { zero(&self.segments) }
    }
}

/// Zeroes the memory of all `segments`.
///
/// # Safety
/// Every segment must be mapped and writable.
pub unsafe fn zero(segments: &[libc::iovec]) {
    for segment in segments {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::write_bytes(segment.iov_base.cast::<u8>(), 0, segment.iov_len) };
    }
}

/// Reads the first and the last byte of a segment, for what that does where they are not there.
///
/// # Safety
/// The segment must be mapped and readable.
pub unsafe fn probe(segment: &libc::iovec) {
    if segment.iov_len > 0 {
        let first = segment.iov_base.cast::<u8>();
        // SAFETY: the caller's promise.
        unsafe {
            first.read_volatile();
            first.add(segment.iov_len - 1).read_volatile();
        }
    }
}

/// Whether every segment starts and ends on a multiple of `align` (a power of two, in bytes).
pub fn is_aligned(segments: &[libc::iovec], align: u32) -> bool {
    let mask = align as usize - 1;
    segments.iter().all(|s| (s.iov_base as usize | s.iov_len) & mask == 0)
}

/// A segment of `len` bytes at `base`.
pub fn iovec(base: *mut u8, len: usize) -> libc::iovec {
    libc::iovec { iov_base: base.cast(), iov_len: len }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_covers_exactly_the_asked_bytes() {
        let mut bytes: Vec<u8> = (0..100).collect();
        let base = bytes.as_mut_ptr();
        let parts = [(0, 10), (20, 1), (30, 0), (40, 30)];
        let raw: Vec<_> =
            parts.iter().map(|&(at, len)| iovec(base.wrapping_add(at), len)).collect();
        // SAFETY: all inside `bytes`, which outlives the list.
        let list = unsafe { IoVec::from_raw(&raw) };
        let mut whole = vec![0; 41];
        list.copy_to(&mut whole);
        for from in 0..=41u64 {
            for len in 0..=41 - from {
                let mut part = vec![0; len as usize];
                let slice = list.slice(from, len);
                assert_eq!(slice.len(), len);
                slice.copy_to(&mut part);
                assert_eq!(part, whole[from as usize..][..len as usize]);
            }
        }
    }
}
