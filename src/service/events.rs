//! The events of a service: ended exports, failed requests, and notices of nodes.
//!
//! One descriptor is readable while there is any.

use super::Service;
use crate::block::{Error, Notice, Notices};
use crate::export::core::{IoError, IoErrors};
use crate::io::sync::Mutex;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// The exports that have ended, and how that is noticed.
pub(super) struct Ended {
    ids: Mutex<Vec<String>>,
    event: EventFd,
}

impl Ended {
    pub(super) fn new() -> Result<Arc<Ended>, Error> {
        let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
        let event = event.map_err(|e| Error::os("eventfd", e))?;
        Ok(Arc::new(Ended { ids: Mutex::default(), event }))
    }

    pub(super) fn notify(&self, id: String) {
        self.ids.lock().push(id);
        let _ = self.event.write(1);
    }

    /// What makes a sign that there is something to tell.
    pub(super) fn sign(&self) -> Result<impl Fn() + Send + Sync + 'static, Error> {
        let event = self.event.try_clone().map_err(|e| Error::os("eventfd", e))?;
        Ok(move || {
            let _ = event.write(1);
        })
    }

    /// Makes a sign of it when `notices` has something to give.
    pub(super) fn listen(&self, notices: &Notices) -> Result<(), Error> {
        notices.on_notice(self.sign()?);
        Ok(())
    }

    /// What the storage fails; noticed in the same way.
    pub(super) fn io_errors(&self) -> Result<Arc<IoErrors>, Error> {
        let event = self.event.try_clone().map_err(|e| Error::os("eventfd", e))?;
        Ok(Arc::new(IoErrors::new(event)))
    }
}

impl Service {
    /// The names of the exports that have ended since this was last asked. One whose front end was
    /// the only one that it could have is among them, and is still there.
    pub fn take_ended(&self) -> Vec<String> {
        let Ended { ids, event } = &*self.0.ended;
        let _ = event.read();
        std::mem::take(&mut *ids.lock())
    }

    /// What the storage has failed since this was last asked.
    pub fn take_io_errors(&self) -> Vec<IoError> {
        self.0.io_errors.take()
    }

    /// What nodes have had to tell since this was last asked.
    pub fn take_notices(&self) -> Vec<Notice> {
        self.graph().notices().take()
    }

    /// Readable while [`Service::take_ended`], [`Service::take_io_errors`] or
    /// [`Service::take_notices`] has something to give.
    pub fn events_descriptor(&self) -> RawFd {
        self.0.ended.event.as_raw_fd()
    }
}
