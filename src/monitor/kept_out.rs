//! Errors caused by the sandbox, extended by the option that permits the access.

use std::borrow::Cow;
use std::path::Path;

use crate::block::Error;
use crate::io::Errno;
use crate::options::{Map, Value, bytes};
use crate::sandbox::files;

/// Says of what was refused for want of permission that it was the sandbox, if it was.
pub(super) fn explained(result: Result<(), Error>, arguments: &Map) -> Result<(), Error> {
    let Err(error) = &result else { return result };
    if error.errno() != Some(Errno(libc::EACCES)) {
        return result;
    }
    let mut paths = Vec::new();
    paths_in(arguments, &mut paths);
    let kept_out = paths.into_iter().find(|(path, is_socket)| {
        let place = if *is_socket { path.parent().unwrap_or(path) } else { &**path };
        files::keeps_out(place, true, *is_socket)
    });
    let Some((path, _)) = kept_out else { return result };
    let place = path.parent().unwrap_or(&path).display();
    Err(Error::new(format!(
        "{error}: the sandbox keeps it out, unless --sandbox-path {place} is given"
    )))
}

/// The files that arguments name, and whether each is a socket.
fn paths_in<'a>(arguments: &'a Map, found: &mut Vec<(Cow<'a, Path>, bool)>) {
    for (key, value) in arguments.iter() {
        match value {
            Value::Map(map) => paths_in(map, found),
            Value::List(list) => {
                let maps = list.iter().filter_map(|one| match one {
                    Value::Map(map) => Some(map),
                    _ => None,
                });
                maps.for_each(|map| paths_in(map, found));
            }
            Value::Str(path) | Value::Text(path)
                if ["filename", "snapshot-file", "path"].contains(&key) =>
            {
                found.push((bytes::path_of(path), key == "path"));
            }
            _ => {}
        }
    }
}
