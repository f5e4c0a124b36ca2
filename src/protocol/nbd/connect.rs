//! Connections to a server: where it is, how one is made, and when another one is as good.

use super::handshake::{Agreed, Fault, Wanted, Wire, negotiate};
use super::options::{Inet, NbdOptions, Server, Vsock};
use crate::block::Error;
use crate::io::socket::Address;
use crate::io::{self, Deadline, Errno, Socket};
use crate::nbd::option::BlockSizes;
use crate::nbd::request::{CMD_DISC, Request};
use crate::nbd::{CommandFlags, Headers, MAX_DATA};
use std::fs::File;
use std::net::ToSocketAddrs;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;
use std::time::Duration;

/// How long connecting and the handshake may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a server may take to hear that nobody wants it any more.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Between attempts to open.
const PAUSE: Duration = Duration::from_millis(100);

/// An export, entered.
pub struct Connection {
    pub socket: Socket,
    pub agreed: Agreed,
}

/// Whom to connect to.
pub struct Target {
    pub options: NbdOptions,
    /// Found when the node was opened: nobody looks names up later. None for a descriptor, which is one connection.
    addresses: Vec<Address>,
}

impl Target {
    /// Finds out where the server is, and connects, for as long as `open-timeout` says.
    pub async fn open(options: NbdOptions) -> Result<(Target, Connection), Error> {
        let mut target = Target { options, addresses: Vec::new() };
        if let Server::Fd(fd) = &target.options.server {
            let socket = take(&fd.str)?;
            let connection = target.agree(socket, Deadline::after(PATIENCE)).await;
            return Ok((target, connection.map_err(Fault::into_error)?));
        }
        let end = Deadline::after(target.options.open_timeout);
        loop {
            let error = match target.try_open().await {
                Ok(connection) => return Ok((target, connection)),
                Err(Fault::Refused(error)) => return Err(error),
                Err(Fault::Lost(error)) => error,
            };
            if end.has_passed() {
                return Err(error);
            }
            io::sleep(PAUSE).await;
        }
    }

    async fn try_open(&mut self) -> Result<Connection, Fault> {
        if self.addresses.is_empty() {
            let server = self.options.server.clone();
            self.addresses = io::offload(move || addresses(&server)).await?;
        }
        self.connect(Deadline::after(PATIENCE)).await
    }

    /// How messages call the server and its export.
    pub fn name(&self) -> String {
        let (server, export) = (self.options.server.described(), &self.options.export);
        format!("NBD server '{server}', export '{export}'")
    }

    pub fn io_timeout_ns(&self) -> u64 {
        self.options.io_timeout.as_nanos() as u64
    }

    pub fn most_connections(&self) -> u32 {
        if self.addresses.is_empty() { 1 } else { self.options.connections }
    }

    /// Makes a connection.
    pub async fn connect(&self, deadline: Deadline) -> Result<Connection, Fault> {
        let deadline = deadline.min(Deadline::after(PATIENCE));
        let mut error = Errno(libc::ENOTCONN);
        for address in &self.addresses {
            match Socket::connect(address, deadline).await {
                Ok(socket) => return self.agree(socket, deadline).await,
                Err(errno) => error = errno,
            }
        }
        let server = self.options.server.described();
        Err(Fault::Lost(Error::os(format!("Failed to connect to '{server}'"), error)))
    }

    async fn agree(&self, socket: Socket, deadline: Deadline) -> Result<Connection, Fault> {
        if let Server::Inet(Inet { keep_alive: Some(true), .. }) = &self.options.server {
            let failed = |errno| Fault::Refused(Error::os("Unable to set KEEPALIVE", errno));
            socket.keep_alive().map_err(failed)?;
        }
        let (export, bitmap) = (&*self.options.export, self.options.dirty_bitmap.as_deref());
        let wire = Wire { socket: &socket, deadline };
        let agreed = negotiate(&wire, &Wanted { export, dirty_bitmap: bitmap }).await?;
        Ok(Connection { socket, agreed })
    }
}

impl Connection {
    /// Whether what was agreed on is enough for who has relied on `before`.
    pub fn is_as_good_as(&self, before: &Agreed) -> bool {
        let Agreed { size, flags, sizes, context, .. } = self.agreed;
        let minimum = |sizes: Option<BlockSizes>| sizes.map_or(1, |sizes| sizes.minimum);
        let maximum =
            |sizes: Option<BlockSizes>| sizes.map_or(MAX_DATA, |sizes| sizes.maximum).min(MAX_DATA);
        size >= before.size
            && flags.contains(before.flags)
            && (context.is_some() || before.context.is_none())
            && minimum(sizes) <= minimum(before.sizes)
            && maximum(sizes) >= maximum(before.sizes)
    }

    /// Tells the server that the connection is over.
    pub async fn end(self) {
        let request = Request {
            flags: CommandFlags::empty(),
            command: CMD_DISC,
            cookie: 0,
            offset: 0,
            length: 0,
        };
        let wire = Wire { socket: &self.socket, deadline: Deadline::after(LAST_WORDS) };
        // A server that has gone does not need to hear it.
        let _ = match self.agreed.headers {
            Headers::Extended => wire.send(&request.encode_extended()).await,
            _ => wire.send(&request.encode_compact()).await,
        };
        self.socket.shut_down();
    }
}

/// Where a server may be reached. Blocks.
fn addresses(server: &Server) -> Result<Vec<Address>, Fault> {
    let wrong = |text: String| Fault::Refused(Error::new(text).with_errno(Errno::EINVAL));
    match server {
        Server::Unix(unix) if unix.r#abstract => {
            let mut name = format!("\0{}", unix.path);
            while !unix.tight && name.len() < 108 {
                name.push('\0');
            }
            Ok(vec![Address::Unix(PathBuf::from(name))])
        }
        Server::Unix(unix) => {
            Ok(vec![Address::Unix(crate::options::bytes::path_of(&unix.path).into())])
        }
        Server::Vsock(Vsock { cid, port }) => {
            let cid = cid.parse().map_err(|_| wrong(format!("Failed to parse cid '{cid}'")))?;
            let port = port.parse().map_err(|_| wrong(format!("Failed to parse port '{port}'")))?;
            Ok(vec![Address::Vsock { cid, port }])
        }
        Server::Inet(inet) => {
            let Inet { host, port, .. } = inet;
            let number: u16 =
                port.parse().map_err(|_| wrong(format!("'{port}' is no number of a port")))?;
            let found = (&**host, number).to_socket_addrs().map_err(|error| {
                let text = format!("address resolution failed for {host}:{port}: {error}");
                Fault::Lost(Error::new(text).with_errno(Errno(libc::EHOSTUNREACH)))
            })?;
            // One that is said to be on leaves the other off.
            let (v4, v6) = (inet.ipv4, inet.ipv6);
            let four = v4.unwrap_or(v6 != Some(true));
            let six = v6.unwrap_or(v4 != Some(true));
            let is_wanted = |address: &std::net::SocketAddr| match address.is_ipv4() {
                true => four,
                false => six,
            };
            let found: Vec<Address> = found.filter(is_wanted).map(Address::Tcp).collect();
            match found.is_empty() {
                true => Err(wrong(format!("'{host}' has no address of the kind that is wanted"))),
                false => Ok(found),
            }
        }
        Server::Fd(_) => Ok(Vec::new()),
    }
}

/// A socket of this process, by its number.
fn take(number: &str) -> Result<Socket, Error> {
    let failed = |errno: Errno| Error::os(format!("'{number}' is no connected socket"), errno);
    let fd: i32 = number.parse().map_err(|_| {
        let text = format!("'{number}' is no number of a file descriptor");
        Error::new(text).with_errno(Errno::EINVAL)
    })?;
    if fd < 0 {
        return Err(failed(Errno(libc::EBADF)));
    }
    // SAFETY: whoever started the program says that this descriptor is ours to use. It is only duplicated, which
    // fails where there is none.
    let own = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
    let file = File::from(own.map_err(|error| failed(error.into()))?);
    if !file.metadata().is_ok_and(|found| found.file_type().is_socket()) {
        return Err(failed(Errno(libc::ENOTSOCK)));
    }
    Socket::try_from(OwnedFd::from(file)).map_err(failed)
}
