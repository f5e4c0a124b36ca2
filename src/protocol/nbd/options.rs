//! The options of `nbd`, and where they say that the server is.

use crate::block::Error;
use crate::options::Map;
use serde::Deserialize;
use std::time::Duration;

/// The driver's own options, as they are written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Written {
    server: Option<Server>,
    // The older form of `server`.
    path: Option<String>,
    host: Option<String>,
    port: Option<String>,
    // A name is read with the rest.
    filename: Option<String>,
    export: Option<String>,
    tls_creds: Option<String>,
    tls_hostname: Option<String>,
    x_dirty_bitmap: Option<String>,
    #[serde(default)]
    reconnect_delay: u32,
    #[serde(default)]
    open_timeout: u32,
    io_timeout: Option<u32>,
    connections: Option<u32>,
}

/// Where the server is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename = "type", rename_all = "lowercase")]
pub enum Server {
    Inet(Inet),
    Unix(Unix),
    Vsock(Vsock),
    Fd(Fd),
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Inet {
    pub host: String,
    pub port: String,
    pub numeric: Option<bool>,
    pub to: Option<u16>,
    pub ipv4: Option<bool>,
    pub ipv6: Option<bool>,
    pub keep_alive: Option<bool>,
    pub mptcp: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unix {
    pub path: String,
    /// The name is no file's.
    #[serde(default)]
    pub r#abstract: bool,
    /// Such a name ends where it ends, and is not filled up with zeroes.
    #[serde(default = "yes")]
    pub tight: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    pub cid: String,
    pub port: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fd {
    pub str: String,
}

/// Bytes that the kernel has for a socket's name.
const SOCKET_NAME: usize = 108;
/// Seconds: longer ones are refused.
const LONGEST: u32 = 3600 * 24;
/// Connections to one server.
pub const MOST_CONNECTIONS: u32 = 64;
/// As many unless others are asked for.
const USUAL_CONNECTIONS: u32 = 16;
const USUAL_TIMEOUT: u32 = 60;

fn yes() -> bool {
    true
}

/// The driver's own options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdOptions {
    pub server: Server,
    /// Empty: the server's default one.
    pub export: String,
    /// The context that stands in for `base:allocation`.
    pub dirty_bitmap: Option<String>,
    /// How long requests wait for a lost connection.
    pub reconnect_delay: Duration,
    /// How long opening tries to connect.
    pub open_timeout: Duration,
    /// How long a server may be silent that owes an answer.
    pub io_timeout: Duration,
    /// At most, where the server allows several.
    pub connections: u32,
}

impl NbdOptions {
    /// # Errors
    /// What is written makes no sense together, or is not to be had.
    pub fn read(mut written: Written) -> Result<NbdOptions, Error> {
        if let Some(name) = written.filename.take() {
            let parts = super::name::read(&name)?;
            let named: Written = crate::options::from_map(parts)?;
            if written.server.is_some() || written.path.is_some() || written.host.is_some() {
                return Err(Error::new("'filename' and a server cannot be given together"));
            }
            written.server = named.server;
            written.export = written.export.or(named.export);
        }
        if written.tls_creds.is_some() || written.tls_hostname.is_some() {
            return Err(Error::new("TLS for NBD is not supported yet"));
        }
        let server = server(written.server, written.path, written.host, written.port)?;
        for (name, seconds) in [
            ("reconnect-delay", written.reconnect_delay),
            ("open-timeout", written.open_timeout),
            ("io-timeout", written.io_timeout.unwrap_or(1)),
        ] {
            if seconds > LONGEST || (name == "io-timeout" && seconds == 0) {
                return Err(Error::new(format!("'{name}' is at most {LONGEST} seconds")));
            }
        }
        let connections = written.connections.unwrap_or(USUAL_CONNECTIONS);
        if !(1..=MOST_CONNECTIONS).contains(&connections) {
            return Err(Error::new(format!("'connections' is from 1 to {MOST_CONNECTIONS}")));
        }
        let export = written.export.unwrap_or_default();
        let bitmap = written.x_dirty_bitmap;
        for (what, name) in [("export name", Some(&export)), ("x-dirty-bitmap", bitmap.as_ref())] {
            if name.is_some_and(|name| name.len() > crate::nbd::MAX_STRING) {
                return Err(Error::new(format!("{what} too long to send to server")));
            }
        }
        Ok(NbdOptions {
            server,
            export,
            dirty_bitmap: bitmap,
            reconnect_delay: Duration::from_secs(written.reconnect_delay.into()),
            open_timeout: Duration::from_secs(written.open_timeout.into()),
            io_timeout: Duration::from_secs(written.io_timeout.unwrap_or(USUAL_TIMEOUT).into()),
            connections,
        })
    }

    /// The options that say which disk it is.
    pub fn to_map(&self) -> Map {
        let mut server = Map::new();
        match &self.server {
            Server::Inet(inet) => {
                server.insert("type", "inet");
                server.insert("host", &*inet.host);
                server.insert("port", &*inet.port);
            }
            Server::Unix(unix) => {
                server.insert("type", "unix");
                server.insert("path", &*unix.path);
                if unix.r#abstract {
                    server.insert("abstract", true);
                    server.insert("tight", unix.tight);
                }
            }
            Server::Vsock(vsock) => {
                server.insert("type", "vsock");
                server.insert("cid", &*vsock.cid);
                server.insert("port", &*vsock.port);
            }
            Server::Fd(fd) => {
                server.insert("type", "fd");
                server.insert("str", &*fd.str);
            }
        }
        let mut map = Map::from_iter([("server", server)]);
        if !self.export.is_empty() {
            map.insert("export", &*self.export);
        }
        if let Some(bitmap) = &self.dirty_bitmap {
            map.insert("x-dirty-bitmap", &**bitmap);
        }
        map
    }
}

impl Server {
    pub fn tcp(host: &str, port: &str) -> Server {
        Server::Inet(Inet {
            host: host.to_owned(),
            port: port.to_owned(),
            numeric: None,
            to: None,
            ipv4: None,
            ipv6: None,
            keep_alive: None,
            mptcp: None,
        })
    }

    pub fn unix(path: &str) -> Server {
        Server::Unix(Unix { path: path.to_owned(), r#abstract: false, tight: true })
    }

    /// How messages call it.
    pub fn described(&self) -> String {
        match self {
            Server::Inet(inet) => format!("{}:{}", inet.host, inet.port),
            Server::Unix(unix) => unix.path.clone(),
            Server::Vsock(vsock) => format!("{}:{}", vsock.cid, vsock.port),
            Server::Fd(fd) => format!("fd {}", fd.str),
        }
    }
}

/// Joins both forms.
fn server(
    server: Option<Server>,
    path: Option<String>,
    host: Option<String>,
    port: Option<String>,
) -> Result<Server, Error> {
    let older = path.is_some() || host.is_some() || port.is_some();
    if path.is_some() && host.is_some() {
        return Err(Error::new("path and host may not be used at the same time"));
    }
    if path.is_some() && port.is_some() || host.is_none() && port.is_some() {
        return Err(Error::new("port may not be used without host"));
    }
    if older && server.is_some() {
        return Err(Error::new("'server' and path/host/port may not be used at the same time"));
    }
    let server = match (server, path, host) {
        (Some(server), ..) => server,
        (_, Some(path), _) => Server::unix(&path),
        (_, _, Some(host)) => Server::tcp(&host, port.as_deref().unwrap_or("10809")),
        _ => return Err(Error::new("NBD server address missing")),
    };
    match &server {
        Server::Unix(unix) => {
            // One byte ends a path, or begins a name that is none.
            if unix.path.len() >= SOCKET_NAME {
                return Err(Error::new(format!("UNIX socket path '{}' is too long", unix.path))
                    .with_hint(format!("Path must be less than {SOCKET_NAME} bytes")));
            }
        }
        Server::Inet(inet) => {
            if inet.to.is_some() {
                return Err(Error::new("'to' is for servers that listen"));
            }
            if inet.mptcp == Some(true) {
                return Err(Error::new("MPTCP is not supported"));
            }
            if inet.ipv4 == Some(false) && inet.ipv6 == Some(false) {
                return Err(Error::new("Cannot disable IPv4 and IPv6 at same time"));
            }
        }
        Server::Vsock(_) | Server::Fd(_) => {}
    }
    Ok(server)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{from_map, keyval};

    fn read(text: &str) -> Result<NbdOptions, String> {
        let map = keyval::parse(text, None).unwrap().options;
        let written = from_map(map).map_err(|error| error.to_string())?;
        NbdOptions::read(written).map_err(|error| error.to_string())
    }

    #[test]
    fn a_server_is_named_in_either_form() {
        for (text, server) in [
            ("server.type=unix,server.path=/s", Server::unix("/s")),
            ("path=/s", Server::unix("/s")),
            ("server.type=inet,server.host=h,server.port=7", Server::tcp("h", "7")),
            ("host=h,port=7", Server::tcp("h", "7")),
            ("host=h", Server::tcp("h", "10809")),
            ("filename=nbd://h/x", Server::tcp("h", "10809")),
        ] {
            assert_eq!(read(text).unwrap().server, server, "{text}");
        }
        let fd = read("server.type=fd,server.str=7,export=e,reconnect-delay=5").unwrap();
        assert_eq!(fd.server, Server::Fd(Fd { str: "7".into() }));
        assert_eq!((fd.export.as_str(), fd.reconnect_delay), ("e", Duration::from_secs(5)));
        let vsock = read("server.type=vsock,server.cid=2,server.port=9").unwrap();
        assert_eq!(vsock.server.described(), "2:9");
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_a_line() {
        let long = format!("path=/{}", "x".repeat(108));
        for (text, wanted) in [
            ("", "NBD server address missing"),
            ("path=/s,host=h", "path and host may not be used at the same time"),
            ("port=1", "port may not be used without host"),
            ("path=/s,tls-creds=t", "TLS for NBD is not supported yet"),
            ("path=/s,connections=0", "'connections' is from 1 to 64"),
            ("path=/s,io-timeout=0", "'io-timeout' is at most 86400 seconds"),
            ("path=/s,server.type=unix,server.path=/s", "'server' and path/host/port"),
            ("server.type=inet,server.host=h", "Parameter 'server.port' is missing"),
            ("server.type=tcp", "Parameter 'type' does not accept value 'tcp'"),
            (&long, "UNIX socket path"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.starts_with(wanted) && !error.contains('\n'), "{text}: {error}");
        }
    }
}
