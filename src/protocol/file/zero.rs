//! Zeroing and discarding without writing, by the best system call that the file supports.
//!
//! Files, when space may go: a hole. Else: a zeroed range, or a hole that is allocated again. Past
//! the end of the file a range that is zeroed makes it longer, as a write would.
//! Devices, when space may go: unmapped blocks that read as zeroes. Else: zeroes written by the
//! device or, slower, by the kernel.

use super::FileDriver;
use super::open::Kind;
use super::sys;
use crate::block::ZeroFlags;
use crate::io::{self, Errno, IoResult};
use std::sync::atomic::{AtomicU8, Ordering};

/// A system call that zeroes or discards, which a file may not support.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Method {
    Punch = 1,
    ZeroRange = 1 << 1,
    Allocate = 1 << 2,
    ZeroOut = 1 << 3,
    Discard = 1 << 4,
}

/// The methods that a file was found not to support.
#[derive(Default)]
pub struct Missing(AtomicU8);

impl Missing {
    fn has(&self, method: Method) -> bool {
        self.0.load(Ordering::Relaxed) & method as u8 != 0
    }

    /// Runs `call` unless `method` is known to be missing; remembers it if it is.
    async fn attempt(&self, method: Method, call: impl Future<Output = IoResult>) -> IoResult {
        if self.has(method) {
            return Err(Errno::ENOTSUP);
        }
        let result = call.await;
        if let Err(errno) = result
            && is_missing(errno)
        {
            self.0.fetch_or(method as u8, Ordering::Relaxed);
            return Err(Errno::ENOTSUP);
        }
        result
    }
}

/// Whether this is how the kernel says that a file does not support a method.
fn is_missing(errno: Errno) -> bool {
    errno.is_unsupported() || errno.0 == libc::ENODEV
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

impl FileDriver {
    pub(super) async fn zero_range(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        match self.kind {
            Kind::Regular => self.zero_file(at, len, flags).await,
            Kind::BlockDevice => self.zero_device(at, len, flags).await,
            Kind::CharacterDevice => Err(Errno::ENOTSUP),
        }
    }

    async fn zero_file(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        // A hole does not make the file longer, and setting the length would cut off what others
        // write behind meanwhile.
        let grow = flags.contains(ZeroFlags::GROW);
        if flags.contains(ZeroFlags::UNMAP) && !grow {
            match self.fallocate(Method::Punch, PUNCH, at, len).await {
                Err(Errno::ENOTSUP) => {}
                result => return result,
            }
        }
        match self.fallocate(Method::ZeroRange, libc::FALLOC_FL_ZERO_RANGE, at, len).await {
            Err(Errno::ENOTSUP) => self.punch_and_allocate(at, len).await?,
            result => result?,
        }
        if grow {
            self.len.fetch_max(at + len, Ordering::Relaxed);
            return Ok(());
        }
        self.grown(at + len).await
    }

    async fn punch_and_allocate(&self, at: u64, len: u64) -> IoResult {
        if self.missing.has(Method::Allocate) {
            return Err(Errno::ENOTSUP);
        }
        if at < self.length() {
            self.fallocate(Method::Punch, PUNCH, at, len).await?;
        }
        self.fallocate(Method::Allocate, 0, at, len).await
    }

    async fn fallocate(&self, method: Method, mode: i32, at: u64, len: u64) -> IoResult {
        self.missing.attempt(method, io::fallocate(self.fd, mode, at, len)).await
    }

    async fn zero_device(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        if flags.contains(ZeroFlags::UNMAP) {
            match self.fallocate(Method::Punch, PUNCH, at, len).await {
                Err(Errno::ENOTSUP) => {}
                result => return result,
            }
        }
        if flags.contains(ZeroFlags::NO_FALLBACK) {
            // What is left writes zeroes out where the device cannot.
            return Err(Errno::ENOTSUP);
        }
        let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        match self.fallocate(Method::ZeroRange, mode, at, len).await {
            Err(Errno::ENOTSUP) => {}
            result => return result,
        }
        let file = self.file.clone();
        let call = self.blocking.run(move || sys::zero_out(&file, at, len));
        self.missing.attempt(Method::ZeroOut, call).await
    }

    pub(super) async fn discard_range(&self, at: u64, len: u64) -> IoResult {
        match self.kind {
            Kind::Regular => self.fallocate(Method::Punch, PUNCH, at, len).await,
            Kind::BlockDevice => {
                let file = self.file.clone();
                let call = self.blocking.run(move || sys::discard(&file, at, len));
                self.missing.attempt(Method::Discard, call).await
            }
            Kind::CharacterDevice => Err(Errno::ENOTSUP),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::ready;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    fn now<T>(future: impl Future<Output = T>) -> T {
        match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => value,
            Poll::Pending => panic!("it had nothing to wait for"),
        }
    }

    #[test]
    fn a_missing_way_is_tried_once_and_a_failing_one_again() {
        let missing = Missing::default();
        let attempt = |method, result| now(missing.attempt(method, ready(result)));
        assert_eq!(attempt(Method::Punch, Err(Errno::ENOSPC)), Err(Errno::ENOSPC));
        assert_eq!(attempt(Method::Punch, Ok(())), Ok(()));
        assert_eq!(attempt(Method::Punch, Err(Errno(libc::ENODEV))), Err(Errno::ENOTSUP));
        assert_eq!(attempt(Method::Punch, Ok(())), Err(Errno::ENOTSUP));
        assert_eq!(attempt(Method::ZeroRange, Ok(())), Ok(()));
    }
}
