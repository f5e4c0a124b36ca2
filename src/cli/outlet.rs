//! Output that a separate thread writes: the log, `serve`'s lines, and messages to the service manager.
//!
//! The rule held here: callers never wait for the reader. The text that a reader has not taken yet is bounded; pieces
//! beyond the bound are dropped and counted, and the output says how many there were. Only a process that ends waits
//! for its readers, for a bounded time ([`Outlet::drain`]).

use crate::io::Errno;
use crate::io::sync::Mutex;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, PoisonError};
use std::time::{Duration, Instant};

/// Pieces, and bytes of them, that wait at most. As many again may be in the thread's hands.
const MOST_PIECES: usize = 4096;
const MOST_BYTES: usize = 1 << 20;

/// How long [`Outlet::drain`] waits for a reader that takes nothing, and in all.
const PATIENCE: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(5);

/// An output. Its thread ends when it is dropped and everything pushed is written.
pub struct Outlet(Arc<Shared>);

#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    /// There is something to write, or the outlet is closed.
    filled: Condvar,
    /// All is written.
    emptied: Condvar,
    /// Pieces that the thread is done with.
    done: AtomicU64,
    dropped: AtomicU64,
}

#[derive(Default)]
struct Waiting {
    pieces: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Pieces dropped since the thread last took `pieces`. They come after all of those: nothing is accepted
    /// again until the thread has taken them.
    refused: u64,
    /// The thread has taken pieces, and is not done with them.
    busy: bool,
    closed: bool,
}

impl Outlet {
    /// Starts the thread, which writes to `file`, each piece in one call. `missing_line` makes the piece that says how
    /// many were dropped. To be called after any fork, and with the signals blocked that end the program.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start<F>(
        name: &str,
        file: F,
        missing_line: impl Fn(u64) -> Vec<u8> + Send + 'static,
    ) -> std::io::Result<Outlet>
    where
        F: Deref<Target = File> + Send + 'static,
    {
        let shared = Arc::new(Shared::default());
        let clone = shared.clone();
        let thread = std::thread::Builder::new().name(name.into()).stack_size(256 << 10);
        thread.spawn(move || clone.write_all(&file, missing_line))?;
        Ok(Outlet(shared))
    }

    /// Takes a piece of text, or drops it where the reader is too far behind.
    pub fn push(&self, piece: impl Into<Vec<u8>>) {
        let piece = piece.into();
        let mut waiting = self.0.waiting.lock();
        let full = waiting.pieces.len() == MOST_PIECES || waiting.bytes + piece.len() > MOST_BYTES;
        if full || waiting.refused > 0 {
            waiting.refused += 1;
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        } else {
            waiting.bytes += piece.len();
            waiting.pieces.push_back(piece);
        }
        drop(waiting);
        self.0.filled.notify_one();
    }

    /// Pieces that were dropped since the start.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// Whether all is written, or dropped.
    pub fn is_empty(&self) -> bool {
        let waiting = self.0.waiting.lock();
        !waiting.busy && !waiting.has_some()
    }

    /// Waits until all is written, as long as the reader takes something now and then. For a process that ends.
    pub fn drain(&self) {
        let end = Instant::now() + LONGEST;
        let mut waiting = self.0.waiting.lock();
        while waiting.busy || waiting.has_some() {
            let done = self.0.done.load(Ordering::Relaxed);
            let time = PATIENCE.min(end.saturating_duration_since(Instant::now()));
            let woken = self.0.emptied.wait_timeout(waiting, time);
            let (guard, timeout) = woken.unwrap_or_else(PoisonError::into_inner);
            waiting = guard;
            let stuck = timeout.timed_out() && self.0.done.load(Ordering::Relaxed) == done;
            if stuck || Instant::now() >= end {
                return;
            }
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.0.waiting.lock().closed = true;
        self.0.filled.notify_one();
    }
}

impl Waiting {
    fn has_some(&self) -> bool {
        !self.pieces.is_empty() || self.refused > 0
    }
}

impl Shared {
    /// The thread.
    fn write_all(&self, file: &File, missing_line: impl Fn(u64) -> Vec<u8>) {
        let mut missing = 0;
        let write_missing = |missing: &mut u64| {
            if *missing > 0 && write(file, &missing_line(*missing)).is_ok() {
                *missing = 0;
            }
        };
        while let Some((pieces, refused)) = self.take() {
            for piece in pieces {
                write_missing(&mut missing);
                if write(file, &piece).is_err() {
                    missing += 1;
                    self.dropped.fetch_add(1, Ordering::Relaxed);
                }
                self.done.fetch_add(1, Ordering::Relaxed);
            }
            missing += refused;
            write_missing(&mut missing);
        }
    }

    /// What is to be written next, waited for, and how many pieces were dropped behind that. None at the end.
    fn take(&self) -> Option<(VecDeque<Vec<u8>>, u64)> {
        let mut waiting = self.waiting.lock();
        waiting.busy = false;
        self.emptied.notify_all();
        while !waiting.has_some() {
            if waiting.closed {
                return None;
            }
            waiting = self.filled.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        waiting.busy = true;
        waiting.bytes = 0;
        Some((std::mem::take(&mut waiting.pieces), std::mem::take(&mut waiting.refused)))
    }
}

/// Writes all of it: in one call if there is room, else as the reader makes room.
fn write(mut file: &File, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Another process that shares the file has set O_NONBLOCK.
            Err(error) if error.kind() == ErrorKind::WouldBlock => wait_for_room(file)?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn wait_for_room(file: &File) -> std::io::Result<()> {
    let mut fd = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one entry, which lives through the call.
    match unsafe { libc::poll(&mut fd, 1, -1) } {
        -1 if Errno::last().0 != libc::EINTR => Err(Errno::last().into()),
        _ => Ok(()),
    }
}

/// Standard output or standard error by its number, so that text follows a later dup2(2). It is never closed.
pub fn standard(fd: RawFd) -> ManuallyDrop<File> {
    // SAFETY: the standard descriptors are open as long as the process runs, and this file is never dropped.
    ManuallyDrop::new(unsafe { File::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::OwnedFd;

    fn missing_line(count: u64) -> Vec<u8> {
        format!("{count} missing\n").into()
    }

    fn outlet() -> (std::io::PipeReader, Outlet) {
        let (reader, writer) = std::io::pipe().unwrap();
        let file = Box::new(File::from(OwnedFd::from(writer)));
        (reader, Outlet::start("test", file, missing_line).unwrap())
    }

    #[test]
    fn all_comes_out_in_its_order_or_is_counted_where_it_is_missing() {
        let (mut reader, outlet) = outlet();
        // More than a pipe, the thread's hands and the queue can hold.
        let pushed = 3 * MOST_PIECES as u64 + (1 << 16);
        (0..pushed).for_each(|number| outlet.push(format!("{number}\n")));
        assert!(outlet.dropped() > 0);
        let all = outlet.0.clone();
        drop(outlet);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        let mut next = 0;
        for line in text.lines() {
            match line.split_once(' ') {
                Some((missing, _)) => next += missing.parse::<u64>().unwrap(),
                None => {
                    assert_eq!(line.parse(), Ok(next));
                    next += 1;
                }
            }
        }
        assert_eq!(next, pushed);
        assert!(all.dropped.load(Ordering::Relaxed) <= pushed - MOST_PIECES as u64);
    }

    #[test]
    fn the_text_that_waits_is_bounded_in_bytes() {
        let (mut reader, outlet) = outlet();
        let piece = "x".repeat(MOST_BYTES / 4);
        (0..100).for_each(|_| outlet.push(&*piece));
        assert!(outlet.0.waiting.lock().bytes <= MOST_BYTES);
        // Nobody reads: this returns all the same.
        outlet.drain();
        assert!(outlet.dropped() >= 100 - 8);
        drop(outlet);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(text.ends_with(" missing\n"));
    }

    #[test]
    fn pieces_that_cannot_be_written_are_counted() {
        let file = File::options().write(true).open("/dev/full").unwrap();
        let outlet = Outlet::start("test", Box::new(file), missing_line).unwrap();
        outlet.push("a");
        outlet.push("b");
        outlet.drain();
        assert_eq!(outlet.dropped(), 2);
    }

    #[test]
    fn a_file_that_does_not_block_is_waited_for() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        // SAFETY: names no memory, and the descriptor is open.
        unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        let file = Box::new(File::from(OwnedFd::from(writer)));
        let outlet = Outlet::start("test", file, missing_line).unwrap();
        let piece = "x".repeat(1 << 18);
        outlet.push(&*piece);
        drop(outlet);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(text == piece);
    }
}
