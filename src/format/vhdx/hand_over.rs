//! The image goes over to another process, and comes from one.

use super::log::append::LogEnd;
use super::open::{Contents, Read, contents, needs_replay, read, replay_log};
use super::{State, Vhdx, space};
use crate::block::{Error, HandOver, LocalFuture};
use crate::cow::file;
use crate::io::IoResult;
use std::sync::atomic::Ordering;

impl HandOver for Vhdx {
    fn activate(&self) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.reload())
    }

    fn inactivate(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(self.close_image())
    }
}

impl Vhdx {
    /// Reads again what another process may have changed.
    async fn reload(&self) -> Result<(), Error> {
        let file = file(self);
        let mut found = read(&file).await?;
        if let Some(active) = found.active.take() {
            if !self.is_writable {
                return Err(needs_replay(&file));
            }
            replay_log(&file, &mut found, &active).await?;
        }
        let Contents { regions, metadata, .. } = contents(&file, &found.header).await?;
        let Read { header, place, .. } = found;
        let mut state = self.header.lock().await;
        let is_same = regions == self.regions
            && metadata.geometry == self.metadata.geometry
            && metadata.disk_id == self.metadata.disk_id
            && header.log == state.header.log;
        if !is_same {
            return Err(Error::new("the image has another layout than when it was opened"));
        }
        let log = LogEnd::new(header.log);
        *state = State { header, place };
        drop(state);
        *self.log.lock().await = log;
        let len = file.driver().len();
        self.file_len.store(len, Ordering::Release);
        self.space_start.store(space::start(len), Ordering::Release);
        self.space.replace(space::extent(self.geometry()));
        self.mapping.cache.forget(|_| true);
        self.is_prepared.store(false, Ordering::SeqCst);
        Ok(())
    }
}
