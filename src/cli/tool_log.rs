//! Messages that the block layer logs while an image tool runs, as lines on standard error.
//!
//! They are about errors that no command returns, such as bitmaps that could not be stored when their image was
//! closed.

use crate::tools::output::errln;
use log::{Level, LevelFilter, Log, Metadata, Record};

struct ToolLog {
    /// In front of each line.
    program: String,
}

/// Shows errors as lines of `program` from now on. A program that logs already continues as it does.
pub fn start(program: &str) {
    let log = ToolLog { program: program.to_owned() };
    if log::set_boxed_logger(Box::new(log)).is_ok() {
        log::set_max_level(LevelFilter::Error);
    }
}

impl Log for ToolLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Error
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            errln!("{}: {}", self.program, record.args());
        }
    }

    fn flush(&self) {}
}
