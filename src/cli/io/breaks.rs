//! The commands for breakpoints, at which a debugging filter (blkdebug) stops requests.

use super::words::Words;
use super::{Said, Session};
use crate::block::{Event, Node};
use crate::cli::img::outln;
use crate::io::{Errno, sleep};
use std::sync::Arc;
use std::time::Duration;

impl Session {
    /// The node of the image that breakpoints are set at.
    fn debugged(&self) -> Result<Arc<Node>, Errno> {
        let image = self.image().ok_or(Errno::ENOTSUP)?;
        image.node().debugged().ok_or(Errno::ENOTSUP)
    }

    pub(super) async fn breakpoint(&mut self, name: &str, words: &Words<'_>) -> Said {
        let (first, second) = match *words.operands {
            [first] => (first, ""),
            [first, second] => (first, second),
            _ => return self.usage(),
        };
        let (done, what) = match name {
            "break" => (self.set_break(first, second), "set breakpoint".to_owned()),
            "resume" => (self.resume(first), "resume request".to_owned()),
            "remove_break" => (self.remove_break(first), format!("remove breakpoint {first}")),
            _ => (self.wait_break(first).await, format!("wait for breakpoint {first}")),
        };
        if let Err(errno) = done {
            outln!("Could not {what}: {errno}");
            return None;
        }
        Some(())
    }

    fn set_break(&mut self, event: &str, tag: &str) -> Result<(), Errno> {
        let node = self.debugged()?;
        let debugger = node.driver().debugger().ok_or(Errno::ENOTSUP)?;
        let event = Event::parse(event).ok_or(Errno(libc::ENOENT))?;
        let reported = |tag: &str| outln!("blkdebug: Suspended request '{tag}'");
        debugger.break_at(event, tag, Box::new(reported));
        self.tags.insert(tag.to_owned());
        Ok(())
    }

    fn resume(&self, tag: &str) -> Result<(), Errno> {
        let node = self.debugged()?;
        let debugger = node.driver().debugger().ok_or(Errno::ENOTSUP)?;
        if !debugger.has_stopped(tag) {
            return Err(Errno(libc::ENOENT));
        }
        outln!("blkdebug: Resuming request '{tag}'");
        debugger.resume(tag);
        Ok(())
    }

    fn remove_break(&self, tag: &str) -> Result<(), Errno> {
        let node = self.debugged()?;
        let debugger = node.driver().debugger().ok_or(Errno::ENOTSUP)?;
        if debugger.has_stopped(tag) {
            outln!("blkdebug: Resuming request '{tag}'");
        }
        match debugger.remove_breaks(tag) {
            true => Ok(()),
            false => Err(Errno(libc::ENOENT)),
        }
    }

    /// Waits until a request has stopped. If none is under way, none will.
    async fn wait_break(&self, tag: &str) -> Result<(), Errno> {
        let node = self.debugged()?;
        let debugger = node.driver().debugger().ok_or(Errno::ENOTSUP)?;
        while !debugger.has_stopped(tag) {
            if self.pending.get() == 0 {
                return Err(Errno(libc::ENOENT));
            }
            sleep(Duration::from_micros(50)).await;
        }
        Ok(())
    }

    /// Resumes all stopped requests, and those that would stop: no command is left to do it.
    pub(super) fn forget_breaks(&mut self) {
        let tags = std::mem::take(&mut self.tags);
        let Ok(node) = self.debugged() else { return };
        if let Some(debugger) = node.driver().debugger() {
            for tag in tags {
                debugger.remove_breaks(&tag);
            }
        }
    }
}
