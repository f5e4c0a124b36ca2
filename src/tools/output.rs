//! Standard output and standard error, printed to without failures or panics.
//!
//! Work that changes an image continues when nobody reads what is printed about it.
//!
//! Standard output is written as the C library writes it: to a terminal line by line, elsewhere in blocks and
//! at the end. So errors, which are not buffered, stand in front of results where scripts join both,
//! as scripts written for QEMU's tools expect.

use crate::io::sync::Mutex;
use crate::options::bytes;
use std::fmt::{self, Write as _};
use std::io::{IsTerminal, Write as _};

/// Bytes that are written at once, to what is no terminal.
const BLOCK: usize = 4096;

static BUFFER: Mutex<String> = Mutex::new(String::new());

/// Writes to standard output; see the module's text.
pub fn write(text: fmt::Arguments<'_>) {
    let mut buffer = BUFFER.lock();
    // A string is a `Vec` of bytes: writing to it cannot fail.
    let _ = buffer.write_fmt(text);
    let lines = std::io::stdout().is_terminal();
    if (lines && buffer.contains('\n')) || buffer.len() >= BLOCK {
        hand_over(&mut buffer);
    }
}

/// Writes out what is buffered.
pub fn flush() {
    hand_over(&mut BUFFER.lock());
}

/// Writes to standard error, in one piece, names in it as their bytes are.
pub fn write_error(text: fmt::Arguments<'_>) {
    // Nobody may be reading any more, or the disk may be full.
    let _ = std::io::stderr().lock().write_all(&bytes::bytes_of(&text.to_string()));
}

fn hand_over(buffer: &mut String) {
    let mut stdout = std::io::stdout().lock();
    // Nobody may be reading any more.
    let _ = stdout.write_all(&bytes::bytes_of(buffer)).and_then(|()| stdout.flush());
    buffer.clear();
}

/// Writes to standard error, as `eprint!` does, which panics where that fails.
macro_rules! err {
    ($($text:tt)*) => { $crate::tools::output::write_error(format_args!($($text)*)) };
}
/// Writes a line to standard error.
macro_rules! errln {
    ($($text:tt)*) => {
        $crate::tools::output::write_error(format_args!("{}\n", format_args!($($text)*)))
    };
}
pub(crate) use {err, errln};
