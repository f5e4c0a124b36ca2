//! The error for an image that is served without a format, with a guess at its format.
//!
//! The format is never guessed for a guest's disk, because a guest can write any format's header to a raw disk. But a
//! hint that names the wrong format destroys the image of a user that follows it.

use crate::block::{DriverEntry, Error};

/// The error for an image whose format was not given. `len` is its length in bytes.
pub fn unnamed(image: &str, len: u64, guess: Option<&'static DriverEntry>) -> Error {
    let never = "never guessed, because a guest can forge headers";
    let text = match guess {
        _ if len == 0 => format!("{image} is empty: make an image first, with 'vublk create'"),
        Some(entry) if !entry.is_raw() => {
            let name = entry.name;
            format!("{image} looks like {name}: use -f {name} ({never})")
        }
        _ => format!("{image} looks like no format but plain bytes: use -f raw ({never})"),
    };
    Error::new(text)
}
