//! `--chardev` and `--monitor`: the sockets of monitors.

use super::poll;
use crate::block::Error;
use crate::export::core::socket::{self, SocketFile};
use crate::options::{self, Map, bytes, is_identifier, keyval, qemuopts, similar};
use serde::Deserialize;
use std::io::ErrorKind;
use std::net::{IpAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

/// What QEMU has and this program has not.
const OTHER_BACKENDS: [&str; 17] = [
    "chardev", "console", "file", "hub", "memory", "msmouse", "mux", "null", "parallel", "pipe",
    "pty", "ringbuf", "serial", "stdio", "testdev", "udp", "wctablet",
];

/// A character device: one end of a socket.
pub struct Chardev {
    /// Goes before the listener does.
    own_file: Option<SocketFile>,
    pub(super) id: String,
    pub(super) endpoint: Endpoint,
    /// To be connected before the program continues.
    pub(super) wait: bool,
}

/// Where clients come from.
pub(super) enum Endpoint {
    Listening(OwnedFd),
    /// We are the one that connected; when the other end goes, there is no other.
    Connected(Option<OwnedFd>),
}

impl Chardev {
    /// Reads `--chardev socket,…` and opens the socket. Whoever it connects to is waited for until `stop` is
    /// readable.
    ///
    /// # Errors
    /// In QEMU's words; and a host that is not this one, for monitors know no passwords.
    pub fn open(text: &str, stop: RawFd) -> Result<Chardev, Error> {
        let mut options = match text.starts_with('{') {
            true => keyval::parse_argument(text, None)?.options,
            false => {
                let parsed = qemuopts::parse(text, Some("backend"))?;
                for short in &parsed.short_forms {
                    log::warn!("--chardev {text}: {}", qemuopts::short_form_warning(short));
                }
                parsed.options
            }
        };
        let backend = options.take_str("backend")?;
        let id = options.take_str("id")?.ok_or_else(|| Error::new("chardev: no id specified"))?;
        if !is_identifier(&id) {
            return Err(Error::new("Parameter 'id' expects an identifier").with_hint(
                "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.",
            ));
        }
        match backend.as_deref() {
            Some("socket") => Chardev::socket(id, options, stop),
            Some(other) if OTHER_BACKENDS.contains(&other) => {
                Err(Error::new(format!("character devices of type '{other}' are not available")))
            }
            Some(other) => {
                let shown = other.escape_debug();
                let unknown = Error::new(format!("'{shown}' is not a valid char driver name"));
                Err(unknown.with_advice(similar::did_you_mean(other, ["socket"])))
            }
            None => Err(Error::new(format!("chardev: \"{id}\" missing backend"))),
        }
    }

    /// The socket file that it has made.
    pub(super) fn socket_file(&self) -> Option<&Path> {
        self.own_file.as_ref().map(SocketFile::path)
    }

    fn socket(id: String, mut options: Map, stop: RawFd) -> Result<Chardev, Error> {
        let known = ["path", "fd", "host", "port", "server", "wait"];
        let path = options.take_str("path")?;
        let fd = options.take_str("fd")?;
        let host = options.take_str("host")?;
        let port = options.take_str("port")?;
        let server = options.take_opt_bool("server")?.unwrap_or(false);
        let wait = options.take_opt_bool("wait")?;
        options.finish_known().map_err(|e| e.meant(known))?;
        if wait.is_some() && !server {
            return Err(Error::new(
                "'wait' option is incompatible with socket in client connect mode",
            ));
        }
        let wait = server && wait.unwrap_or(true);
        let (endpoint, own_file) = match (path, fd, host) {
            (Some(path), None, None) => at_path(&bytes::path_of(&path), server, stop)?,
            (None, Some(fd), None) => {
                let number = fd.parse().map_err(|_| {
                    Error::new(format!("Unable to parse FD number {}", fd.escape_debug()))
                })?;
                if !server {
                    return Err(Error::new("'fd' needs server=on and a listening socket"));
                }
                (Endpoint::Listening(poll::take_listener(number)?), None)
            }
            (None, None, Some(host)) => {
                let port = port.ok_or_else(|| Error::new("chardev: socket: no port given"))?;
                (at_host(&host, &port, server)?, None)
            }
            _ => {
                return Err(Error::new("one of 'path', 'fd' or 'host' is required"));
            }
        };
        Ok(Chardev { id, endpoint, wait, own_file })
    }
}

type Opened = (Endpoint, Option<SocketFile>);

/// How often a listener is tried that takes no more connections.
const RETRY: libc::c_int = 20;

/// How long a port of this host may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

fn at_path(path: &Path, server: bool, stop: RawFd) -> Result<Opened, Error> {
    if !server {
        let failed = |e| Error::os(format!("Failed to connect to '{}'", path.display()), e);
        socket::check_path(path)?;
        loop {
            match socket::try_connect(path) {
                Ok(stream) => return Ok((Endpoint::Connected(Some(stream.into())), None)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let mut fds = [poll::polled(stop, libc::POLLIN)];
                    poll::poll(&mut fds, RETRY);
                    if fds[0].revents != 0 {
                        return Err(failed(error));
                    }
                }
                Err(error) => return Err(failed(error)),
            }
        }
    }
    let (listener, file) = socket::listen(path, None, None)?;
    let failed = |e| Error::os(format!("Failed to set up socket to {}", path.display()), e);
    listener.set_nonblocking(true).map_err(failed)?;
    Ok((Endpoint::Listening(listener.into()), Some(file)))
}

fn at_host(host: &str, port: &str, server: bool) -> Result<Endpoint, Error> {
    let shown = format!("{}:{}", host.escape_debug(), port.escape_debug());
    let number: u16 =
        port.parse().map_err(|_| Error::new(format!("'{shown}': the port is not a number")))?;
    let name = host.trim_start_matches('[').trim_end_matches(']');
    let found = (name, number)
        .to_socket_addrs()
        .map_err(|e| Error::new(format!("address resolution failed for {shown}: {e}")))?;
    let addresses: Vec<_> = found.collect();
    let is_here = |ip: IpAddr| ip.is_loopback();
    if addresses.is_empty() || !addresses.iter().all(|address| is_here(address.ip())) {
        return Err(Error::new(format!(
            "'{shown}' is not an address of the loopback interface, and others are not available \
             to monitors"
        )));
    }
    if server {
        let listener = TcpListener::bind(&*addresses);
        let listener = listener.and_then(|it| it.set_nonblocking(true).map(|()| it));
        let failed = |e| Error::os(format!("Failed to find an available port at {shown}"), e);
        return Ok(Endpoint::Listening(listener.map_err(failed)?.into()));
    }
    let mut stream = Err(ErrorKind::AddrNotAvailable.into());
    for address in &addresses {
        stream = TcpStream::connect_timeout(address, PATIENCE);
        if stream.is_ok() {
            break;
        }
    }
    let stream = stream.and_then(|it| it.set_nonblocking(true).map(|()| it));
    let failed = |e| Error::os(format!("Failed to connect to '{shown}'"), e);
    Ok(Endpoint::Connected(Some(stream.map_err(failed)?.into())))
}

/// `--monitor [chardev=]ID,…`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MonitorOptions {
    #[serde(rename = "id")]
    _id: Option<String>,
    mode: Option<Mode>,
    #[serde(default)]
    pub(super) pretty: bool,
    pub(super) chardev: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Readline,
    Control,
}

impl MonitorOptions {
    pub(super) fn read(options: Map) -> Result<MonitorOptions, Error> {
        let options: MonitorOptions = options::from_map(options)?;
        match options.mode {
            Some(Mode::Readline) => Err(Error::new("Only QMP is supported")),
            Some(Mode::Control) | None => Ok(options),
        }
    }
}
