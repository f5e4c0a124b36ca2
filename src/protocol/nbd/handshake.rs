//! The handshake with a server: what it can do is agreed on, and the export entered.
//!
//! The order is the protocol's: extended headers, or else structured replies; the context of block status;
//! `GO`, or what older servers know instead. A server has until the deadline for all of it, and what it says
//! is bounded in length and number.

use crate::block::Error;
use crate::io::{Deadline, Errno, IoResult, IoVec, Socket};
use crate::nbd::handshake::{
    EXPORT_NAME_REPLY_LEN, EXPORT_NAME_ZEROES, GREETING_LEN, OLDSTYLE_LEN, OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS, OPT_GO, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OPTION_REPLY_LEN,
    OptionHeader, OptionReply, REP_ACK, REP_ERR_POLICY, REP_ERR_SHUTDOWN, REP_ERR_TLS_REQD,
    REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO, REP_META_CONTEXT, Style, client_flags, oldstyle,
    option_name, read_export_name_reply, reply_name, server_flags, style,
};
use crate::nbd::option::{BlockSizes, Context, Go, INFO_BLOCK_SIZE, Info, MetaQueries};
use crate::nbd::{
    BASE_ALLOCATION, ClientFlags, ExportFlags, Headers, MAX_OPTION, Malformed, ServerFlags,
};

/// Replies to one option that are looked at.
const MOST_REPLIES: usize = 64;

/// What a client asks for.
pub struct Wanted<'a> {
    pub export: &'a str,
    /// The context that stands in for `base:allocation`.
    pub dirty_bitmap: Option<&'a str>,
}

/// What the two sides have agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Bytes.
    pub size: u64,
    pub flags: ExportFlags,
    pub sizes: Option<BlockSizes>,
    pub headers: Headers,
    /// How block status names the context.
    pub context: Option<u32>,
}

/// Why there is no connection.
#[derive(Debug)]
pub enum Fault {
    /// The server was not reached, or has gone: it may be there later.
    Lost(Error),
    /// It was, and does not want to, or is no server.
    Refused(Error),
}

impl Fault {
    pub fn into_error(self) -> Error {
        match self {
            Fault::Lost(error) | Fault::Refused(error) => error,
        }
    }
}

impl From<Malformed> for Fault {
    fn from(malformed: Malformed) -> Fault {
        refused(malformed.to_string())
    }
}

fn refused(text: impl Into<String>) -> Fault {
    Fault::Refused(Error::new(text).with_errno(Errno::EINVAL))
}

/// Whole messages on a socket.
pub struct Wire<'a> {
    pub socket: &'a Socket,
    pub deadline: Deadline,
}

impl Wire<'_> {
    pub async fn send(&self, bytes: &[u8]) -> IoResult {
        let mut at = 0;
        while at < bytes.len() {
            let from = IoVec::from_ref(&bytes[at..]);
            at += self.socket.send(&from, self.deadline).await? as usize;
        }
        Ok(())
    }

    async fn fill(&self, bytes: &mut [u8]) -> IoResult {
        let mut at = 0;
        while at < bytes.len() {
            let into = IoVec::from_mut(&mut bytes[at..]);
            match self.socket.receive(&into, self.deadline).await? {
                0 => return Err(Errno(libc::ECONNRESET)),
                count => at += count as usize,
            }
        }
        Ok(())
    }

    async fn array<const N: usize>(&self, what: &str) -> Result<[u8; N], Fault> {
        let mut bytes = [0; N];
        self.fill(&mut bytes).await.map_err(|errno| lost("read", what, errno))?;
        Ok(bytes)
    }

    async fn tell(&self, what: &str, bytes: &[u8]) -> Result<(), Fault> {
        self.send(bytes).await.map_err(|errno| lost("send", what, errno))
    }

    async fn option(&self, option: u32, payload: &[u8]) -> Result<(), Fault> {
        let header = OptionHeader { option, len: payload.len() as u32 };
        self.tell(option_name(option), &[&header.encode(), payload].concat()).await
    }

    /// The next reply to an option: its type, and what it carries.
    async fn reply(&self, option: u32) -> Result<(OptionReply, Vec<u8>), Fault> {
        let name = option_name(option);
        let header = OptionReply::decode(&self.array::<OPTION_REPLY_LEN>(name).await?)?;
        if header.option != option {
            let (other, theirs) = (header.option, option_name(header.option));
            let text =
                format!("Unexpected option type {other} ({theirs}), expected {option} ({name})");
            return Err(refused(text));
        }
        if header.len as usize > MAX_OPTION {
            let text = format!("the reply to option {option} ({name}) has {} bytes", header.len);
            return Err(refused(text));
        }
        let mut payload = vec![0; header.len as usize];
        self.fill(&mut payload).await.map_err(|errno| lost("read", name, errno))?;
        Ok((header, payload))
    }
}

fn lost(verb: &str, what: &str, errno: Errno) -> Fault {
    Fault::Lost(Error::os(format!("Failed to {verb} {what}"), errno))
}

/// Agrees with the server.
///
/// # Errors
/// Those of the socket, what the server says, or that it talks nonsense.
pub async fn negotiate(wire: &Wire<'_>, wanted: &Wanted<'_>) -> Result<Agreed, Fault> {
    let agreed = match style(&wire.array::<GREETING_LEN>("initial magic").await?)? {
        Style::Newstyle => newstyle(wire, wanted).await?,
        Style::Oldstyle if wanted.export.is_empty() => {
            let (size, flags) = oldstyle(&wire.array::<OLDSTYLE_LEN>("export length").await?)?;
            Agreed { size, flags, sizes: None, headers: Headers::Simple, context: None }
        }
        Style::Oldstyle => {
            return Err(refused("Server does not support non-empty export names"));
        }
    };
    if i64::try_from(agreed.size).is_err() {
        return Err(refused(format!("export length {} is too large", agreed.size)));
    }
    if let Some(sizes) = agreed.sizes
        && !agreed.size.is_multiple_of(sizes.minimum.into())
    {
        let (size, minimum) = (agreed.size, sizes.minimum);
        let text = format!("export length {size} is not multiple of minimum block size {minimum}");
        return Err(refused(text));
    }
    if let Some(bitmap) = wanted.dirty_bitmap
        && agreed.context.is_none()
    {
        return Err(refused(format!("requested x-dirty-bitmap {bitmap} not found")));
    }
    Ok(agreed)
}

async fn newstyle(wire: &Wire<'_>, wanted: &Wanted<'_>) -> Result<Agreed, Fault> {
    let theirs = server_flags(wire.array::<2>("server flags").await?);
    let mut ours = ClientFlags::empty();
    ours.set(ClientFlags::FIXED_NEWSTYLE, theirs.contains(ServerFlags::FIXED_NEWSTYLE));
    ours.set(ClientFlags::NO_ZEROES, theirs.contains(ServerFlags::NO_ZEROES));
    wire.tell("client flags", &client_flags(ours)).await?;
    let (mut headers, mut context) = (Headers::Simple, None);
    if ours.contains(ClientFlags::FIXED_NEWSTYLE) {
        if is_taken(wire, OPT_EXTENDED_HEADERS).await? {
            headers = Headers::Extended;
        } else if is_taken(wire, OPT_STRUCTURED_REPLY).await? {
            headers = Headers::Structured;
        }
        if headers != Headers::Simple {
            context = find_context(wire, wanted).await?;
        }
        if let Some((size, flags, sizes)) = go(wire, wanted.export).await? {
            return Ok(Agreed { size, flags, sizes, headers, context });
        }
        if headers == Headers::Extended {
            return Err(refused("the server knows extended headers, and not the option go"));
        }
    }
    wire.option(OPT_EXPORT_NAME, wanted.export.as_bytes()).await?;
    // A server that does not have the export can but hang up.
    let reply = wire.array::<EXPORT_NAME_REPLY_LEN>("export length").await?;
    let (size, flags) = read_export_name_reply(&reply);
    if !ours.contains(ClientFlags::NO_ZEROES) {
        wire.array::<EXPORT_NAME_ZEROES>("reserved block").await?;
    }
    Ok(Agreed { size, flags, sizes: None, headers, context })
}

/// What an error's reply is told as. None: the server does not know the option.
fn said(reply: OptionReply, payload: &[u8]) -> Option<Fault> {
    let (option, name) = (reply.option, option_name(reply.option));
    let text = match reply.kind {
        REP_ERR_UNSUP => return None,
        REP_ERR_POLICY => format!("Denied by server for option {option} ({name})"),
        REP_ERR_TLS_REQD => format!("Server requires TLS for option {option} ({name})"),
        REP_ERR_UNKNOWN => "Requested export not available".to_owned(),
        REP_ERR_SHUTDOWN => format!("Server shutting down before option {option} ({name})"),
        kind => {
            format!("Server refused option {option} ({name}): {kind:#x} ({})", reply_name(kind))
        }
    };
    // It is another's text: one line, and no control characters.
    let message = String::from_utf8_lossy(&payload[..payload.len().min(256)]).into_owned();
    let error = Error::new(text).with_errno(Errno::EINVAL);
    Some(Fault::Refused(match message.is_empty() {
        true => error,
        false => {
            let plain = |c: char| if c.is_control() { ' ' } else { c };
            let message: String = message.chars().map(plain).collect();
            error.with_hint(format!("server reported: {message}"))
        }
    }))
}

/// Whether the server takes up an option that carries nothing.
async fn is_taken(wire: &Wire<'_>, option: u32) -> Result<bool, Fault> {
    wire.option(option, &[]).await?;
    let (reply, payload) = wire.reply(option).await?;
    match reply.kind {
        REP_ACK if payload.is_empty() => Ok(true),
        // Whatever it minds about this, other things may work.
        _ if reply.is_error() && reply.kind != REP_ERR_TLS_REQD => Ok(false),
        _ => Err(unexpected(reply, &payload)),
    }
}

fn unexpected(reply: OptionReply, payload: &[u8]) -> Fault {
    let of_error = reply.is_error().then(|| said(reply, payload)).flatten();
    of_error.unwrap_or_else(|| {
        let (option, name) = (reply.option, option_name(reply.option));
        let (kind, known) = (reply.kind, reply_name(reply.kind));
        refused(format!("Unexpected reply {kind:#x} ({known}) to option {option} ({name})"))
    })
}

/// The number of the context that is wanted; none if the server has none.
async fn find_context(wire: &Wire<'_>, wanted: &Wanted<'_>) -> Result<Option<u32>, Fault> {
    let name = wanted.dirty_bitmap.unwrap_or(BASE_ALLOCATION);
    let queries = MetaQueries { export: wanted.export, queries: vec![name] };
    wire.option(OPT_SET_META_CONTEXT, &queries.encode()).await?;
    let mut found = None;
    for _ in 0..MOST_REPLIES {
        let (reply, payload) = wire.reply(OPT_SET_META_CONTEXT).await?;
        match reply.kind {
            REP_META_CONTEXT => {
                let context = Context::decode(&payload)?;
                if context.name != name || found.is_some() {
                    let text = format!(
                        "the server names a context that was not asked for: {:?}",
                        context.name
                    );
                    return Err(refused(text));
                }
                found = Some(context.id);
            }
            REP_ACK => return Ok(found),
            _ if reply.is_error() && reply.kind != REP_ERR_TLS_REQD => return Ok(None),
            _ => return Err(unexpected(reply, &payload)),
        }
    }
    Err(refused("the server does not stop naming contexts"))
}

type Entered = (u64, ExportFlags, Option<BlockSizes>);

/// Enters the export. None: the server does not know how.
async fn go(wire: &Wire<'_>, export: &str) -> Result<Option<Entered>, Fault> {
    wire.option(OPT_GO, &Go { name: export, wanted: vec![INFO_BLOCK_SIZE] }.encode()).await?;
    let (mut entered, mut sizes) = (None, None);
    for _ in 0..MOST_REPLIES {
        let (reply, payload) = wire.reply(OPT_GO).await?;
        match reply.kind {
            REP_INFO => match Info::decode(&payload)? {
                Info::Export(size, flags) => entered = Some((size, flags)),
                Info::BlockSize(told) => sizes = Some(told),
                Info::Name(_) | Info::Description(_) | Info::Other(_) => {}
            },
            REP_ACK => {
                let (size, flags) =
                    entered.ok_or_else(|| refused("broken server omitted NBD_INFO_EXPORT"))?;
                return Ok(Some((size, flags, sizes)));
            }
            REP_ERR_UNSUP => return Ok(None),
            _ => return Err(unexpected(reply, &payload)),
        }
    }
    Err(refused("the server does not stop describing the export"))
}
