//! What an image looks like, said to the user who serves it: before its format is named, and when the
//! name does not fit.
//!
//! The format is never guessed for a guest's disk, because a guest can write any format's header to a
//! raw disk. But a hint that names the wrong format destroys the image of a user who follows it.

use crate::block::Error;
use crate::block::registry::Guess;

/// Why an image is not served whose format was not given. `len` is how many bytes it has.
pub fn unnamed(image: &str, len: u64, looks: Option<Guess>) -> Error {
    let never = "never guessed, because a guest can forge headers";
    let text = match looks {
        _ if len == 0 => format!("{image} is empty: make an image first, with 'vublk create'"),
        Some(Guess::Foreign(name)) => format!(
            "{image} looks like {name}, which vublk does not support: convert it to qcow2 or raw first"
        ),
        Some(Guess::Driver(entry)) if entry.name != "raw" => {
            let name = entry.name;
            format!("{image} looks like {name}: use -f {name} ({never})")
        }
        _ => format!("{image} looks like no format but plain bytes: use -f raw ({never})"),
    };
    Error::new(text)
}

/// What is to be said of an image that is served as raw bytes, if anything.
pub fn served_raw(image: &str, len: u64, looks: Option<Guess>) -> Option<String> {
    let name = match looks {
        _ if len == 0 => {
            return Some(format!("{image} is empty: the guest finds a disk of no bytes"));
        }
        Some(Guess::Driver(entry)) if entry.name == "raw" => return None,
        Some(guess) => guess.name(),
        None => return None,
    };
    Some(format!(
        "{image} looks like {name} but is served as raw: the guest finds the {name} file itself as its \
         disk, and destroys the image if it writes"
    ))
}
