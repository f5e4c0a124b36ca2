//! The sockets of a command line: where front ends connect, or where we do.

use crate::block::Error;
use crate::export::core::{Address, Socket, socket, socket_fd};
use crate::service::SOCKET_PATIENCE;
use std::io::ErrorKind;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// How often a listener is tried that takes no more connections.
const RETRY: Duration = Duration::from_millis(20);

/// Connects to the socket of a daemon. A listener that takes no more connections is tried for
/// [`SOCKET_PATIENCE`], unless `give_up` says otherwise.
///
/// # Errors
/// Nobody listens there, or the listener still takes no connections.
pub fn connect(path: &Path, give_up: fn() -> bool) -> std::io::Result<UnixStream> {
    let end = Instant::now() + SOCKET_PATIENCE;
    loop {
        match socket::try_connect(path) {
            Ok(stream) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
            Err(_) if Instant::now() > end || give_up() => {
                let why = "the process that listens there takes no more connections";
                return Err(std::io::Error::new(ErrorKind::WouldBlock, why));
            }
            Err(_) => std::thread::sleep(RETRY),
        }
    }
}

/// A `--timeout`: seconds, up to a day.
pub fn parse_timeout(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("'{text}' is not a number of seconds"))?;
    match (0.1..=86400.0).contains(&seconds) {
        true => Ok(Duration::from_secs_f64(seconds)),
        false => Err(format!("'{text}' is not between 0.1 and 86400 seconds")),
    }
}

/// One `--socket`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketArg {
    /// A socket to be made.
    Path(PathBuf),
    /// `fd:N`: a descriptor inherited from the program's parent.
    Fd(RawFd),
    /// `systemd` or `systemd:NAME`: a descriptor of systemd's socket activation, the next or by name.
    Systemd(Option<String>),
    /// `connect:PATH`: a socket that the front end listens on.
    Connect(PathBuf),
}

impl FromStr for SocketArg {
    type Err = String;

    fn from_str(text: &str) -> Result<SocketArg, String> {
        if text == "systemd" {
            return Ok(SocketArg::Systemd(None));
        }
        Ok(match text.split_once(':') {
            Some(("fd", number)) => match number.parse() {
                Ok(fd) if fd >= 0 => SocketArg::Fd(fd),
                _ => return Err(format!("'{number}' is not the number of a descriptor")),
            },
            Some(("systemd", name)) => SocketArg::Systemd(Some(name.to_owned())),
            Some(("connect", path)) => SocketArg::Connect(path.into()),
            _ => SocketArg::Path(text.into()),
        })
    }
}

/// The descriptors of systemd's socket activation (`sd_listen_fds(3)`) that are not taken yet, and
/// those from `fd:N` that are.
pub struct Descriptors {
    activated: Vec<(RawFd, String)>,
    taken: Vec<RawFd>,
}

impl Descriptors {
    /// Asks the environment. To be called before there is another thread.
    pub fn new() -> Descriptors {
        let activated = sd_notify::listen_fds_with_names(false);
        let activated = activated.map_or_else(|_| Vec::new(), Iterator::collect);
        Descriptors { activated, taken: Vec::new() }
    }

    /// What an export is to be given for a socket.
    ///
    /// # Errors
    /// There is no such descriptor, or it is no socket, or was named twice.
    pub fn address(
        &mut self,
        socket: &SocketArg,
        mode: Option<u32>,
        owner: Option<(u32, u32)>,
    ) -> Result<Address, Error> {
        let fd = match socket {
            SocketArg::Path(path) => return Ok(Address::Path { path: path.clone(), mode, owner }),
            SocketArg::Connect(path) => return Ok(Address::Connect(path.clone())),
            SocketArg::Fd(fd) => *fd,
            SocketArg::Systemd(name) => self.activated(name.as_deref())?,
        };
        if self.taken.contains(&fd) {
            return Err(Error::new(format!("File descriptor '{fd}' is used twice")));
        }
        // SAFETY: the program's caller gives this descriptor to us, and we do so once.
        let socket = unsafe { socket_fd(fd) }?;
        self.taken.push(fd);
        Ok(match socket {
            Socket::Listening(fd) => Address::Listening(fd),
            Socket::Connected(fd) => Address::Connected(fd),
        })
    }

    fn activated(&mut self, name: Option<&str>) -> Result<RawFd, Error> {
        let found = self.activated.iter().position(|(_, n)| name.is_none_or(|name| name == n));
        match (found, name) {
            (Some(index), _) => Ok(self.activated.remove(index).0),
            (None, None) => Err(Error::new("systemd has passed no other socket")),
            (None, Some(name)) => {
                Err(Error::new(format!("systemd has passed no socket of the name '{name}'")))
            }
        }
    }
}
