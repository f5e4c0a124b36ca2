//! Lending memory to operations, so that no safe code can take it from one that is in flight.
//!
//! A future can be polled once and then forgotten (`mem::forget`). Its borrows end, and the operation that it has
//! started continues: a borrow alone does not keep memory for the kernel. These rules do:
//!
//! * Memory that the kernel itself reads or fills counts the operations on it ([`Lent`]). An operation that is
//!   forgotten stays in the count forever. An [`AlignedBuf`] that has such a count can neither be looked at nor be
//!   freed: dropping it leaks its memory. A request on a guest's memory checks the count before it ends, and the
//!   process ends rather than the mapping.
//! * All other memory ([`IoVec::from_mut`], [`IoVec::from_ref`]) is never shown to the kernel. The operation has a
//!   buffer of its own, and the future copies from or to it.
//! * The list of the segments, and that buffer, are in the future that waits for the operation ([`Held`]). A future
//!   that has been polled is pinned, so its memory stays until it has been dropped. Its drop waits for the operation;
//!   a future that is forgotten is never freed.
//!
//! Requests of the fast path have no futures. Their memory is kept by the source that starts them.

use super::{AlignedBuf, Errno, IoResult, IoVec, Lent};

/// The memory of one operation that a future waits for. It is a local variable of that future, and
/// stays there until the operation has completed.
pub struct Held<'m> {
    /// What the operation is given.
    list: IoVec<'m>,
    own: Option<Own<'m>>,
}

/// Memory that is used instead of the caller's.
struct Own<'m> {
    bytes: AlignedBuf,
    callers: IoVec<'m>,
}

impl<'m> IoVec<'m> {
    /// Holds the memory for an operation that fills it. [`Held::filled`] says that it has.
    ///
    /// # Errors
    /// ENOMEM
    ///
    /// # Panics
    /// The list was made to write from.
    pub fn hold_to_fill(&self) -> IoResult<Held<'m>> {
        self.check_fillable();
        self.hold(|_| {})
    }

    /// Holds the memory for an operation that only reads it.
    ///
    /// # Errors
    /// ENOMEM
    pub fn hold_to_send(&self) -> IoResult<Held<'m>> {
        self.hold(|own| self.copy_to(own))
    }

    fn hold(&self, prepare: impl FnOnce(&mut AlignedBuf)) -> IoResult<Held<'m>> {
        if self.is_kept() {
            self.owners().for_each(Lent::begin);
            return Ok(Held { list: self.clone(), own: None });
        }
        let len = self.len() as usize;
        let mut bytes = AlignedBuf::for_overwriting(len, 4096).ok_or(Errno::ENOMEM)?;
        prepare(&mut bytes);
        let segments = [super::iovec::iovec(bytes.as_mut_ptr(), len)];
        // SAFETY: `Held` frees the buffer with the list, and stays until the operation has completed.
        let list = unsafe { IoVec::from_raw(&segments) };
        Ok(Held { list, own: Some(Own { bytes, callers: self.clone() }) })
    }
}

impl Held<'_> {
    /// What the operation is to be given.
    pub fn list(&self) -> &IoVec<'_> {
        &self.list
    }

    /// The operation has completed and has filled the first `len` bytes.
    pub fn filled(&self, len: u64) {
        if let Some(own) = &self.own {
            own.callers.copy_from(&own.bytes[..len as usize]);
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.list.owners().for_each(Lent::end);
    }
}

#[cfg(test)]
mod tests {
    use crate::io::sim::{Disorder, SimRing};
    use crate::io::{self, AlignedBuf, Durable, IoVec};
    use std::fs::File;
    use std::future::{Future, poll_fn};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    use std::task::Poll;
    use std::time::Duration;

    const LEN: usize = 4096;

    fn simulated(test: impl Future<Output = ()> + 'static) {
        let disorder = Disorder { short: 0.5, ..Disorder::wild(4) };
        io::run_on(Box::new(SimRing::new(disorder).unwrap()), test);
    }

    fn file_of(byte: u8) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[byte; LEN], 0).unwrap();
        file
    }

    /// Starts what a future waits for, and forgets the future.
    async fn forget(future: impl Future) {
        let mut future = Box::pin(future);
        poll_fn(|cx| {
            assert!(future.as_mut().poll(cx).is_pending());
            Poll::Ready(())
        })
        .await;
        std::mem::forget(future);
    }

    /// Waits until all that was started has ended.
    async fn until_all_is_done() {
        io::sleep(Duration::from_secs(1)).await;
    }

    #[test]
    fn the_buffer_of_a_read_that_was_forgotten_is_not_used_again() {
        simulated(async {
            let file = file_of(7);
            let mut buffer = AlignedBuf::for_overwriting(LEN, 1).unwrap();
            let place = buffer.as_ptr();
            forget(io::read(file.as_raw_fd(), 0, &buffer.io_vec())).await;
            drop(buffer);
            // The thread keeps buffers that were freed, and would give this one out again.
            let mut other = AlignedBuf::for_overwriting(LEN, 1).unwrap();
            other.fill(1);
            until_all_is_done().await;
            assert_ne!(other.as_ptr(), place);
            assert!(other.iter().all(|&byte| byte == 1));
        });
    }

    #[test]
    fn memory_of_the_callers_own_is_not_written_by_a_read_that_was_forgotten() {
        simulated(async {
            let file = file_of(7);
            let mut bytes = [1; LEN];
            forget(io::read(file.as_raw_fd(), 0, &IoVec::from_mut(&mut bytes))).await;
            until_all_is_done().await;
            assert_eq!(bytes, [1; LEN]);
        });
    }

    #[test]
    fn a_write_that_was_forgotten_writes_what_the_memory_held() {
        simulated(async {
            let file = file_of(1);
            let mut bytes = [7; LEN];
            forget(io::write(file.as_raw_fd(), 0, &IoVec::from_ref(&bytes), Durable::No)).await;
            bytes.fill(9);
            until_all_is_done().await;
            let mut written = [0; LEN];
            file.read_exact_at(&mut written, 0).unwrap();
            assert_eq!(written, [7; LEN]);
        });
    }

    #[test]
    #[should_panic(expected = "was forgotten")]
    fn a_buffer_cannot_be_looked_at_after_its_read_was_forgotten() {
        simulated(async {
            let file = file_of(7);
            let mut buffer = AlignedBuf::for_overwriting(LEN, 1).unwrap();
            forget(io::read(file.as_raw_fd(), 0, &buffer.io_vec())).await;
            let _ = buffer[0];
        });
    }

    #[test]
    #[should_panic(expected = "was forgotten")]
    fn a_buffer_cannot_be_changed_after_its_write_was_forgotten() {
        simulated(async {
            let file = file_of(7);
            let mut buffer = AlignedBuf::for_overwriting(LEN, 1).unwrap();
            forget(io::write(file.as_raw_fd(), 0, &buffer.source(), Durable::No)).await;
            assert_eq!(buffer[0], buffer[1], "reading it is no harm");
            buffer.fill(1);
        });
    }

    #[test]
    fn a_buffer_can_be_used_again_when_its_operations_have_ended_or_were_dropped() {
        simulated(async {
            let file = file_of(7);
            let mut buffer = AlignedBuf::for_overwriting(LEN, 1).unwrap();
            io::read(file.as_raw_fd(), 0, &buffer.io_vec()).await.unwrap();
            assert_eq!(buffer[..], [7; LEN]);
            buffer.fill(8);
            io::write(file.as_raw_fd(), 0, &buffer.source(), Durable::No).await.unwrap();
            let list = buffer.io_vec();
            let mut dropped = Box::pin(io::read(file.as_raw_fd(), 0, &list));
            poll_fn(|cx| Poll::Ready(dropped.as_mut().poll(cx).is_pending())).await;
            drop(dropped);
            assert_eq!(buffer[..], [8; LEN]);
        });
    }

    #[test]
    #[should_panic(expected = "made to write from")]
    fn what_is_shared_cannot_be_filled() {
        IoVec::from_ref(&[0; 8]).zero();
    }
}
