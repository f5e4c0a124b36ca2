//! Where an NBD server listens: Unix and TCP sockets, and inherited ones.

use crate::block::Error;
use crate::export::core::address::Address;
use crate::export::core::socket::{self, SocketFile};
use crate::io::Errno;
use crate::options::{self, Map, Value};
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

/// A listening socket, and its file if it is ours to remove.
pub(super) struct Listening {
    /// Removed before the socket closes.
    _file: Option<SocketFile>,
    fd: OwnedFd,
}

impl Listening {
    /// A socket that does not keep whoever accepts waiting.
    fn new(fd: OwnedFd, file: Option<SocketFile>) -> std::io::Result<Listening> {
        // It may be of any family; this call is the same for all.
        let socket = UnixListener::from(fd);
        socket.set_nonblocking(true)?;
        Ok(Listening { _file: file, fd: socket.into() })
    }
}

impl AsRawFd for Listening {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// What is to be listened on.
pub enum Where {
    Inet(Inet),
    Other(Address),
}

/// Addresses of hosts, by name or number.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inet {
    host: String,
    port: String,
    /// The last port that is tried.
    to: Option<u16>,
    #[serde(default)]
    numeric: bool,
    ipv4: Option<bool>,
    ipv6: Option<bool>,
    #[serde(rename = "keep-alive", default)]
    _keep_alive: bool,
}

impl Where {
    /// Reads a `SocketAddress`.
    ///
    /// # Errors
    /// It is of another kind, or not complete.
    pub fn read(addr: Value) -> Result<Where, Error> {
        if let Value::Map(map) = &addr
            && map.get("type").and_then(Value::as_str) == Some("inet")
        {
            let mut map = map.clone();
            map.take("type");
            let inet = options::from_map(map).map_err(|error| Error::from(error.under("addr")))?;
            return Ok(Where::Inet(inet));
        }
        Address::read(addr).map(Where::Other)
    }

    /// Reads a `SocketAddressLegacy`, which has all but its type in `data`.
    ///
    /// # Errors
    /// As of [`Where::read`].
    pub fn read_legacy(addr: Value) -> Result<Where, Error> {
        let Value::Map(mut map) = addr else {
            return Err(Error::new("Invalid parameter type for 'addr', expected: object"));
        };
        let at = |error: options::Error| Error::from(error.under("addr"));
        let kind = map.take_required_str("type").map_err(at)?;
        let data = map.take("data");
        map.finish().map_err(at)?;
        let mut flat = match data {
            Some(Value::Map(data)) => data,
            Some(_) => {
                return Err(Error::new("Invalid parameter type for 'addr.data', expected: object"));
            }
            None => return Err(Error::new("Parameter 'addr.data' is missing")),
        };
        flat.insert("type", kind);
        Where::read(Value::Map(flat))
    }

    /// A TCP address as `qemu-nbd` names it; without a host all of this one's.
    pub fn tcp(host: Option<&str>, port: &str) -> Where {
        Where::Inet(Inet {
            host: host.unwrap_or_default().to_owned(),
            port: port.to_owned(),
            to: None,
            numeric: false,
            ipv4: None,
            ipv6: None,
            _keep_alive: false,
        })
    }

    /// Opens the sockets. It may wait for a name to be looked up.
    ///
    /// # Errors
    /// One of them cannot be had.
    pub(super) fn listen(self) -> Result<Vec<Listening>, Error> {
        let failed = |error| Error::os("cannot set up a listening socket", error);
        match self {
            Where::Inet(inet) => inet.listen(),
            Where::Other(Address::Path { path, mode, owner }) => {
                let (listener, file) = socket::listen(&path, mode, owner)?;
                Listening::new(listener.into(), Some(file)).map(|one| vec![one]).map_err(failed)
            }
            Where::Other(Address::Listening(fd)) => {
                Listening::new(fd, None).map(|one| vec![one]).map_err(failed)
            }
            Where::Other(Address::Connected(_) | Address::Connect(_)) => {
                Err(Error::new("an NBD server needs a listening socket"))
            }
        }
    }
}

impl Inet {
    fn is_wanted(&self, address: &SocketAddr) -> bool {
        // As QEMU: if one family is asked for, the other is not, unless it is asked for too.
        match (self.ipv4, self.ipv6) {
            (Some(v4), Some(v6)) => {
                if address.is_ipv4() {
                    v4
                } else {
                    v6
                }
            }
            (Some(v4), None) => address.is_ipv4() == v4,
            (None, Some(v6)) => address.is_ipv6() == v6,
            (None, None) => true,
        }
    }

    /// The addresses of a port. Several where the host has several.
    fn addresses(&self, port: u16) -> Result<Vec<SocketAddr>, Error> {
        let found: Vec<SocketAddr> = match &*self.host {
            // A socket of the sixth version takes clients of both.
            "" if self.ipv4 != Some(true) && self.ipv6 != Some(false) && has_ipv6() => {
                return Ok(vec![SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)]);
            }
            "" => vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)],
            host => match host.parse::<IpAddr>() {
                Ok(ip) => vec![SocketAddr::new(ip, port)],
                Err(_) if self.numeric => return Err(self.unknown("not a number")),
                Err(_) => (host, port)
                    .to_socket_addrs()
                    .map_err(|e| self.unknown(&e.to_string()))?
                    .collect(),
            },
        };
        let wanted: Vec<_> = found.into_iter().filter(|address| self.is_wanted(address)).collect();
        match wanted.is_empty() {
            true => Err(self.unknown("no address of the wanted family")),
            false => Ok(wanted),
        }
    }

    fn unknown(&self, why: &str) -> Error {
        let why = why.trim_start_matches("failed to lookup address information: ");
        Error::new(format!("address resolution failed for {}:{}: {why}", self.host, self.port))
    }

    fn listen(&self) -> Result<Vec<Listening>, Error> {
        let first: u16 = self.port.parse().map_err(|_| self.unknown("Servname not supported"))?;
        let last = self.to.unwrap_or(first).max(first);
        let mut failed = None;
        for port in first..=last {
            let bind =
                |address: &SocketAddr| Listening::new(TcpListener::bind(address)?.into(), None);
            let all: std::io::Result<Vec<_>> = self.addresses(port)?.iter().map(bind).collect();
            match all {
                Ok(all) => return Ok(all),
                Err(error) => failed = Some(error),
            }
        }
        let what = format!("Failed to find an available port: {}:{}", self.host, self.port);
        Err(Error::os(what, failed.map_or(Errno(libc::EADDRINUSE), Errno::from)))
    }
}

/// Whether the host has the sixth version of the protocol at all.
fn has_ipv6() -> bool {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok()
}

/// An address of either form, for the options of a server.
pub fn read_options(map: &mut Map, legacy: bool) -> Result<Where, Error> {
    match map.take("addr") {
        Some(addr) if legacy => Where::read_legacy(addr),
        Some(addr) => Where::read(addr),
        None => Err(Error::new("Parameter 'addr' is missing")),
    }
}
