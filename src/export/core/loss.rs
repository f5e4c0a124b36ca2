//! The state after a failed fsync, and the operator's commands to clear it.
//!
//! After a failed fsync the kernel forgets the data that did not reach the disk, and the next fsync succeeds.
//! A daemon that starts again would therefore report durable what is lost. The rule, in one place:
//!
//! * **Noted**: when storage reports a failed fsync, the failure is noted in this process, in the memory that the
//!   front end keeps ([`Kept::set_loss`]), and beside each image file that failed ([`flush_record`]), before the
//!   guest is notified of it. An overlay of this image gets a record, too, because the next daemon writes to it.
//! * **Taken up**: an export that finds a record fails the guest's flushes, as the process did that made it. Reads
//!   and writes continue. A clean end, a kill and a reboot of the host make no difference: the lost data does not
//!   come back.
//! * **Accepted**: an operator says that the loss is known (`x-block-export-accept-loss`, or `accept-loss` at a
//!   start). Then all records are removed and flushes reach the storage again.
//!
//! What a guest wrote before a kill and an image that has changed since cannot take up ([`super::journal`]) is lost in the
//! same way: the front end is refused until an operator accepts it.
//!
//! A record is a yes or a no. Any value but zero in the memory, and a file of any kind at the record's place, means yes.

use super::kept::Kept;
use crate::block::{Abilities, Error, Node, flush_record};
use crate::io::{self, Errno, sync::Mutex};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

/// The operator's remedy, for log lines.
const ANSWER: &str = "flushes fail until the loss is accepted (x-block-export-accept-loss, or a start with accept-loss)";

/// The operator's remedy for guests' writes that cannot be taken up after a kill ([`super::journal`]).
pub const GIVE_UP: &str = "to give it up and go on, accept the loss (x-block-export-accept-loss, or a start with accept-loss)";

/// Whether a disk has lost data that its guest may believe to be durable.
#[derive(Default)]
pub struct Losses {
    /// Observers of the export see it, too.
    is_lost: Arc<AtomicBool>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// An operator has accepted what was recorded before.
    accepted: bool,
    /// Of the front end that came last.
    memory: Option<Weak<dyn Kept>>,
}

impl Losses {
    /// None yet; `is_lost` shows it when there are some.
    pub fn new(is_lost: Arc<AtomicBool>) -> Losses {
        Losses { is_lost, state: Mutex::default() }
    }

    /// Whether flushes must fail.
    pub fn any(&self) -> bool {
        self.is_lost.load(Ordering::Acquire)
    }

    /// Whether an operator has accepted what earlier processes have lost.
    pub fn are_accepted(&self) -> bool {
        self.state.lock().accepted
    }

    /// Looks for records beside the images of a disk that is about to be served, or removes them. Blocks.
    ///
    /// # Errors
    /// A record cannot be removed.
    pub fn begin(&self, export: &str, node: &Arc<Node>, accept: bool) -> Result<(), Error> {
        if accept {
            return self.accept(export, node);
        }
        for record in flush_record::find(&written(node)) {
            self.is_lost.store(true, Ordering::Release);
            log::error!(
                export;
                "'{}' says that a flush failed: data written before it may be lost; {ANSWER}",
                record.display()
            );
        }
        Ok(())
    }

    /// A front end has brought memory, or was given some.
    pub fn meet(&self, export: &str, region: &Arc<dyn Kept>) {
        let mut state = self.state.lock();
        state.memory = Some(Arc::downgrade(region));
        if self.any() {
            region.set_loss(true);
        } else if region.has_loss() && state.accepted {
            region.set_loss(false);
        } else if region.has_loss() {
            self.is_lost.store(true, Ordering::Release);
            log::error!(
                export;
                "a flush failed before the daemon was started: data written before it may be lost; {ANSWER}"
            );
        }
    }

    /// The storage has failed a request. Notes it if an fsync is what failed; returns when the record is there.
    pub async fn note(&self, export: &str, node: &Arc<Node>) {
        let Some(files) = self.note_in_memory(export, node) else { return };
        let failures = io::offload(move || write(&files)).await;
        log_failures(export, &failures);
    }

    /// The same, not on a worker. Blocks.
    pub fn note_at_the_end(&self, export: &str, node: &Arc<Node>) {
        if let Some(files) = self.note_in_memory(export, node) {
            log_failures(export, &write(&files));
        }
    }

    /// The disk is on another image now. Blocks.
    pub fn follow(&self, export: &str, node: &Arc<Node>) {
        if self.any() {
            log_failures(export, &write(&written(node)));
        }
    }

    /// The files whose records are to be written, if this is news.
    fn note_in_memory(&self, export: &str, node: &Arc<Node>) -> Option<Vec<PathBuf>> {
        if self.any() || !node.is_poisoned() {
            return None;
        }
        let state = self.state.lock();
        if self.is_lost.swap(true, Ordering::AcqRel) {
            return None;
        }
        if let Some(region) = state.memory.as_ref().and_then(Weak::upgrade) {
            region.set_loss(true);
        }
        drop(state);
        log::error!(export; "an fsync failed: data written before it may be lost; {ANSWER}");
        Some(node.files(|node| is_written(node) && node.driver().is_poisoned()))
    }

    /// An operator accepts the loss: removes all records, and lets flushes reach the storage again. Blocks.
    ///
    /// # Errors
    /// A record cannot be removed. Flushes still fail.
    pub fn accept(&self, export: &str, node: &Arc<Node>) -> Result<(), Error> {
        let mut removed = false;
        for record in flush_record::find(&written(node)) {
            match fs::remove_file(&record) {
                Ok(()) => removed = true,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    let what = format!(
                        "Cannot remove '{}', which records a failed flush",
                        record.display()
                    );
                    return Err(Error::os(what, Errno::from(error)));
                }
            }
        }
        let mut state = self.state.lock();
        state.accepted = true;
        if let Some(region) = state.memory.as_ref().and_then(Weak::upgrade) {
            removed |= region.has_loss();
            region.set_loss(false);
        }
        node.forgive();
        if self.is_lost.swap(false, Ordering::AcqRel) || removed {
            log::warn!(
                export;
                "loss accepted: what was written before the failed flush may be lost, and flushes work again"
            );
        }
        Ok(())
    }
}

fn log_failures(export: &str, failures: &[String]) {
    for failure in failures {
        log::error!(
            export;
            "{failure}: a daemon that is started later does not know of the failed flush unless the front end keeps its memory"
        );
    }
}

/// Makes the records of these files; what went wrong, a line each.
fn write(files: &[PathBuf]) -> Vec<String> {
    let make = |file: &PathBuf| {
        let error = flush_record::make(file).err()?;
        Some(format!("cannot record beside '{}' that a flush failed: {error}", file.display()))
    };
    files.iter().filter_map(make).collect()
}

fn is_written(node: &Node) -> bool {
    !node.traits().abilities.contains(Abilities::READ_ONLY)
}

/// The files and devices that a disk writes to.
fn written(node: &Node) -> Vec<PathBuf> {
    node.files(is_written)
}
