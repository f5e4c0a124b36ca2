//! A controller's health, asked for now or cached for callers that may not wait.

#![forbid(unsafe_code)]

use super::{Controller, Inner, lock};
use crate::Error;
use crate::spec::{ErrorEntry, Health, log_page};
use std::time::{Duration, Instant};

/// How old what was said last may be before the controller is asked again.
const FRESH: Duration = Duration::from_secs(5);
/// Bytes of a log page that are read at a time.
const MOST: usize = 4096;

/// What the controller has said last.
#[derive(Default)]
pub(super) struct Sample {
    health: Option<Health>,
    /// When it was asked, whether or not it has answered.
    asked: Option<Instant>,
}

impl Controller {
    /// SMART and health information. Blocks.
    pub fn health(&self) -> Result<Health, Error> {
        let page = self.0.log_page(log_page::HEALTH, Health::LEN);
        page.map(|page| Health::parse(&page))
            .map_err(|failure| failure.error("reading its health").at(&self.0.name))
    }

    /// The newest entries of the error log. Blocks.
    pub fn errors(&self) -> Result<Vec<ErrorEntry>, Error> {
        let entries = self.identity().error_entries as usize;
        let page = self.0.log_page(log_page::ERRORS, (entries * ErrorEntry::LEN).min(MOST));
        page.map(|page| ErrorEntry::parse_all(&page))
            .map_err(|failure| failure.error("reading its error log").at(&self.0.name))
    }

    /// The last health report, if there is one; has the controller asked again if that was some time ago. Never
    /// blocks: the controller's own thread asks.
    pub fn last_health(&self) -> Option<Health> {
        let mut sample = lock(&self.0.sample);
        if self.0.is_running() && sample.asked.is_none_or(|asked| asked.elapsed() > FRESH) {
            sample.asked = Some(Instant::now());
            lock(&self.0.wants).health = true;
            let _ = self.0.wake.write(1);
        }
        sample.health
    }
}

impl Inner {
    /// Asks for what [`Controller::last_health`] tells.
    pub(super) fn sample_health(&self) {
        match self.log_page(log_page::HEALTH, Health::LEN) {
            Ok(page) => lock(&self.sample).health = Some(Health::parse(&page)),
            Err(failure) => {
                lock(&self.sample).health = None;
                log::warn!("{}: {}", self.name, failure.error("reading its health"));
            }
        }
    }
}
