//! Names of exports: `nbd:HOST:PORT`, `nbd:unix:PATH`, `nbd://HOST/EXPORT`, `nbd+unix:///EXPORT?socket=PATH`.

use super::options::{NbdOptions, Server};
use crate::block::Error;
use crate::options::{Map, Value};

/// The prefixes of all names.
pub const PREFIXES: &[&str] =
    &["nbd", "nbd+tcp", "nbd+unix", "nbd+vsock", "nbds", "nbds+tcp", "nbds+unix", "nbds+vsock"];

/// The options that a name stands for.
///
/// # Errors
/// It is no such name.
pub fn read(name: &str) -> Result<Map, Error> {
    let (server, export) = match name.split_once("://") {
        Some((scheme, rest)) if PREFIXES.contains(&scheme) => uri(name, scheme, rest)?,
        _ => plain(name)?,
    };
    let mut map = Map::new();
    let mut put = Map::new();
    for (key, value) in server {
        put.insert(key, value);
    }
    map.insert("server", put);
    if !export.is_empty() {
        map.insert("export", export);
    }
    Ok(map)
}

type Parts = (Vec<(&'static str, String)>, String);

fn tcp(host: &str, port: &str) -> Vec<(&'static str, String)> {
    vec![("type", "inet".into()), ("host", host.into()), ("port", port.into())]
}

fn unix(path: &str) -> Vec<(&'static str, String)> {
    vec![("type", "unix".into()), ("path", path.into())]
}

/// `nbd:HOST:PORT[:exportname=EXPORT]` and `nbd:unix:PATH[:exportname=EXPORT]`.
fn plain(name: &str) -> Result<Parts, Error> {
    const EXPORT: &str = ":exportname=";
    let rest = name.strip_prefix("nbd:");
    let rest = rest.ok_or_else(|| Error::new("File name string for NBD must start with 'nbd:'"))?;
    let (place, export) = match rest.find(EXPORT) {
        Some(at) => (&rest[..at], &rest[at + EXPORT.len()..]),
        None => (rest, ""),
    };
    if place.is_empty() {
        return Err(Error::new(format!("'{name}' names no server")));
    }
    if let Some(path) = place.strip_prefix("unix:") {
        return Ok((unix(path), export.to_owned()));
    }
    let (host, port) = host_and_port(place)
        .filter(|(_, port)| port.is_some())
        .ok_or_else(|| Error::new(format!("address '{place}' is not HOST:PORT")))?;
    Ok((tcp(host, port.unwrap_or_default()), export.to_owned()))
}

/// `HOST[:PORT]`, the host of IPv6 in brackets.
fn host_and_port(place: &str) -> Option<(&str, Option<&str>)> {
    let (host, rest) = match place.strip_prefix('[') {
        Some(inner) => inner.split_once(']')?,
        None => place.find(':').map_or((place, ""), |at| place.split_at(at)),
    };
    match rest {
        "" => Some((host, None)),
        rest => Some((host, Some(rest.strip_prefix(':').filter(|port| !port.is_empty())?))),
    }
}

fn uri(name: &str, scheme: &str, rest: &str) -> Result<Parts, Error> {
    if scheme.starts_with("nbds") {
        return Err(Error::new("TLS for NBD is not supported yet"));
    }
    let wrong = || Error::new(format!("'{name}' is not a name of an NBD export"));
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, q)| (rest, Some(q)));
    let (authority, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    // Slashes before the name are no part of it.
    let export = decoded(path.trim_start_matches('/')).ok_or_else(wrong)?;
    if scheme == "nbd+unix" {
        let socket = query.and_then(|query| query.strip_prefix("socket="));
        let socket = socket.filter(|socket| !socket.contains('&')).ok_or_else(wrong)?;
        if !authority.is_empty() || socket.is_empty() {
            return Err(wrong());
        }
        return Ok((unix(&decoded(socket).ok_or_else(wrong)?), export));
    }
    if query.is_some() || authority.is_empty() {
        return Err(wrong());
    }
    let (host, port) = host_and_port(authority).ok_or_else(wrong)?;
    let (host, port) = (decoded(host).ok_or_else(wrong)?, port.unwrap_or("10809"));
    if host.is_empty() {
        return Err(wrong());
    }
    if scheme == "nbd+vsock" {
        let server = vec![("type", "vsock".into()), ("cid", host), ("port", port.into())];
        return Ok((server, export));
    }
    Ok((tcp(&host, port), export))
}

/// Text with `%XX` as the bytes that they stand for. None if it is no UTF-8 then, or holds a zero byte.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, more @ ..] = rest {
        rest = more;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = str::from_utf8(more.get(..2)?).ok()?;
        if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return None;
        }
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &more[2..];
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

/// The plain name that stands for the options, if there is one.
pub fn of(options: &NbdOptions) -> Option<String> {
    if options.dirty_bitmap.is_some() {
        return None;
    }
    let export = &options.export;
    match &options.server {
        Server::Unix(unix) if !unix.r#abstract => Some(match export.is_empty() {
            true => format!("nbd+unix://?socket={}", unix.path),
            false => format!("nbd+unix:///{export}?socket={}", unix.path),
        }),
        Server::Inet(inet) => {
            let host = match inet.host.contains(':') {
                true => format!("[{}]", inet.host),
                false => inet.host.clone(),
            };
            Some(match export.is_empty() {
                true => format!("nbd://{host}:{}", inet.port),
                false => format!("nbd://{host}:{}/{export}", inet.port),
            })
        }
        _ => None,
    }
    // What the name would be read as must be what it stands for.
    .filter(|name| read(name).is_ok_and(|map| Value::Map(map) == Value::Map(options.to_map())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::json;

    #[test]
    fn names_stand_for_a_server_and_an_export() {
        for (name, server, export) in [
            ("nbd:h:7", "inet h 7", ""),
            ("nbd:[::1]:7:exportname=a:b", "inet ::1 7", "a:b"),
            ("nbd:unix:/a:b", "unix /a:b", ""),
            ("nbd:unix:/a:exportname=x", "unix /a", "x"),
            ("nbd://h", "inet h 10809", ""),
            ("nbd://h:7/a%20b", "inet h 7", "a b"),
            ("nbd://[::1]:7//x/", "inet ::1 7", "x/"),
            ("nbd+tcp://h/x", "inet h 10809", "x"),
            ("nbd+unix:///x?socket=/a%20b", "unix /a b", "x"),
            ("nbd+unix://?socket=s", "unix s", ""),
            ("nbd+vsock://2:7/x", "vsock 2 7", "x"),
        ] {
            let map = read(name).unwrap();
            let found = map.get("server").map(|server| match server {
                Value::Map(map) => map.iter().filter_map(|(_, v)| v.as_str()).collect::<Vec<_>>(),
                _ => Vec::new(),
            });
            assert_eq!(found.unwrap().join(" "), server, "{name}");
            let found = map.get("export").and_then(|export| export.as_str()).unwrap_or_default();
            assert_eq!(found, export, "{name}: {}", json::to_text(&map.clone().into()));
        }
    }

    #[test]
    fn names_that_mean_nothing_are_refused_in_a_line() {
        for name in [
            "nbd:",
            "nbd:h",
            "nbd:h:",
            "nbd://",
            "nbd:///x",
            "nbd://h:/x",
            "nbd://h/x?socket=/s",
            "nbd://h/%zz",
            "nbd://h/%+1",
            "nbd://h/%00",
            "nbd+unix:///x",
            "nbd+unix:///x?path=/s",
            "nbd+unix:///x?socket=",
            "nbd+unix://h/x?socket=/s",
            "nbds://h/x",
            "nbd:[::1:7",
        ] {
            let error = read(name).unwrap_err().to_string();
            assert!(!error.contains('\n'), "{name}: {error}");
        }
    }
}
