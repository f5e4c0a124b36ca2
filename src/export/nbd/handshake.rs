//! The handshake of the server: options and their replies, until the client has chosen an export.

use super::contexts::{self, Context};
use super::offer::Offer;
use super::server::Server;
use crate::io::{Deadline, Errno, IoVec, Socket};
use crate::nbd::handshake::*;
use crate::nbd::option::{self as carried, Go, Info, Listed, MetaQueries};
use crate::nbd::{
    ClientFlags, ExportFlags, Headers, MAX_DATA, MAX_OPTION, MAX_STRING, Malformed, ServerFlags,
    cut,
};
use std::sync::Arc;

/// What a client has chosen.
pub(super) struct Agreed {
    pub export: Arc<dyn Offer>,
    pub headers: Headers,
    /// The numbers of the contexts.
    pub contexts: Vec<u32>,
}

/// Why there was no agreement.
pub(super) enum End {
    /// The client has left.
    Gone,
    /// It was refused; a line for the log.
    Refused(String),
}

impl From<Malformed> for End {
    fn from(error: Malformed) -> End {
        End::Refused(error.to_string())
    }
}

impl From<Errno> for End {
    fn from(errno: Errno) -> End {
        match errno.0 {
            libc::ETIMEDOUT | libc::ETIME | libc::ECANCELED => {
                End::Refused("its handshake takes too long".into())
            }
            _ => End::Gone,
        }
    }
}

/// One handshake.
struct Handshake<'a> {
    server: &'a Server,
    socket: &'a Socket,
    deadline: Deadline,
    flags: ClientFlags,
    headers: Headers,
    /// The export that contexts were chosen of, and their numbers.
    contexts: Option<(String, Vec<u32>)>,
    /// Replies that are not sent yet.
    out: Vec<u8>,
}

/// Agrees with a client.
pub(super) async fn negotiate(
    server: &Server,
    socket: &Socket,
    deadline: Deadline,
) -> Result<Agreed, End> {
    let mut out = Vec::with_capacity(512);
    out.extend(greeting(ServerFlags::all()));
    let (flags, headers, contexts) = (ClientFlags::empty(), Headers::Simple, None);
    let mut handshake = Handshake { server, socket, deadline, flags, headers, contexts, out };
    handshake.send().await?;
    let mut bits = [0; 4];
    handshake.receive(&mut bits).await?;
    handshake.flags = read_client_flags(bits)?;
    loop {
        let mut header = [0; OPTION_LEN];
        handshake.receive(&mut header).await?;
        let header = OptionHeader::decode(&header)?;
        let agreed = handshake.option(header).await?;
        handshake.send().await?;
        if let Some(export) = agreed {
            let contexts = match handshake.contexts.take() {
                Some((name, ids)) if name == export.name() => ids,
                _ => Vec::new(),
            };
            return Ok(Agreed { export, headers: handshake.headers, contexts });
        }
    }
}

impl Handshake<'_> {
    async fn receive(&self, into: &mut [u8]) -> Result<(), End> {
        let mut done = 0;
        while done < into.len() {
            let list = IoVec::from_mut(&mut into[done..]);
            match self.socket.receive(&list, self.deadline).await? {
                0 => return Err(End::Gone),
                n => done += n as usize,
            }
        }
        Ok(())
    }

    /// Sends the replies.
    async fn send(&mut self) -> Result<(), End> {
        let mut done = 0;
        while done < self.out.len() {
            let list = IoVec::from_ref(&self.out[done..]);
            done += self.socket.send(&list, self.deadline).await? as usize;
        }
        self.out.clear();
        Ok(())
    }

    fn reply(&mut self, option: u32, kind: u32, payload: &[u8]) {
        let len = payload.len() as u32;
        self.out.extend(OptionReply { option, kind, len }.encode());
        self.out.extend(payload);
    }

    /// Replies with an error; the text is for people.
    fn refuse(&mut self, option: u32, kind: u32, text: &str) {
        self.reply(option, kind, cut(text).as_bytes());
    }

    /// Reads what an option carries, and replies to it. The export, if the client has chosen one.
    async fn option(&mut self, header: OptionHeader) -> Result<Option<Arc<dyn Offer>>, End> {
        let OptionHeader { option, len } = header;
        let name = option_name(option);
        if option == OPT_EXPORT_NAME {
            return self.export_name(len).await.map(Some);
        }
        if !self.flags.contains(ClientFlags::FIXED_NEWSTYLE) {
            let why = format!("option {option} ({name}) from a client that knows no replies");
            return Err(End::Refused(why));
        }
        if len as usize > MAX_OPTION {
            self.skip(option, len).await?;
            self.refuse(option, REP_ERR_TOO_BIG, &format!("option {option} ({name}) is too long"));
            return Ok(None);
        }
        let mut payload = vec![0; len as usize];
        self.receive(&mut payload).await?;
        match option {
            OPT_ABORT => {
                self.reply(option, REP_ACK, &[]);
                // It may not wait for the reply.
                let _ = self.send().await;
                return Err(End::Gone);
            }
            OPT_INFO | OPT_GO => return Ok(self.go(option, &payload)),
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => self.meta(option, &payload),
            OPT_LIST | OPT_STRUCTURED_REPLY | OPT_EXTENDED_HEADERS | OPT_STARTTLS
                if !payload.is_empty() =>
            {
                let text = format!("option {option} ({name}) has unexpected length");
                self.refuse(option, REP_ERR_INVALID, &text);
            }
            OPT_LIST => {
                for export in self.server.exports() {
                    let (name, description) = (export.name(), export.description());
                    self.reply(option, REP_SERVER, &Listed { name, description }.encode());
                }
                self.reply(option, REP_ACK, &[]);
            }
            OPT_STRUCTURED_REPLY => self.take_headers(option, Headers::Structured),
            OPT_EXTENDED_HEADERS => self.take_headers(option, Headers::Extended),
            OPT_STARTTLS => self.refuse(option, REP_ERR_POLICY, "TLS not configured"),
            _ => {
                let text = format!("Unsupported option {option} ({name})");
                self.refuse(option, REP_ERR_UNSUP, &text);
            }
        }
        Ok(None)
    }

    /// Uses these headers from now on, unless they or better ones are used already.
    fn take_headers(&mut self, option: u32, wanted: Headers) {
        let text = match (self.headers, wanted) {
            (Headers::Extended, _) => "extended headers already negotiated",
            (Headers::Structured, Headers::Structured) => "structured reply already negotiated",
            _ => {
                self.headers = wanted;
                return self.reply(option, REP_ACK, &[]);
            }
        };
        self.refuse(option, REP_ERR_INVALID, text);
    }

    /// Takes what an option carries that is too long.
    async fn skip(&mut self, option: u32, len: u32) -> Result<(), End> {
        if len > MAX_DATA {
            return Err(End::Refused(format!("option {option} has {len} bytes")));
        }
        let mut left = len as usize;
        let mut bytes = [0; 4096];
        while left > 0 {
            let n = left.min(bytes.len());
            self.receive(&mut bytes[..n]).await?;
            left -= n;
        }
        Ok(())
    }

    /// The old way to choose an export, which has no reply for errors.
    async fn export_name(&mut self, len: u32) -> Result<Arc<dyn Offer>, End> {
        if len as usize > MAX_STRING {
            return Err(End::Refused(format!("an export's name of {len} bytes")));
        }
        if self.headers == Headers::Extended {
            return Err(End::Refused("the export's name alone, after extended headers".into()));
        }
        let mut name = vec![0; len as usize];
        self.receive(&mut name).await?;
        let shown = String::from_utf8_lossy(&name);
        let found = str::from_utf8(&name).ok().and_then(|name| self.server.find(name));
        let export = found.ok_or_else(|| End::Refused(not_present(&shown)))?;
        self.out.extend(export_name_reply(export.size(), self.export_flags(&*export)));
        if !self.flags.contains(ClientFlags::NO_ZEROES) {
            self.out.extend([0; EXPORT_NAME_ZEROES]);
        }
        Ok(export)
    }

    /// What the export can do for this client.
    fn export_flags(&self, export: &dyn Offer) -> ExportFlags {
        let mut flags = export.flags();
        flags.set(ExportFlags::CAN_MULTI_CONN, self.server.is_shared());
        flags.set(ExportFlags::SEND_DF, self.headers != Headers::Simple);
        flags.set(ExportFlags::BLOCK_STATUS_PAYLOAD, self.headers == Headers::Extended);
        flags
    }

    /// Tells of an export. It is chosen if the option says so.
    fn go(&mut self, option: u32, payload: &[u8]) -> Option<Arc<dyn Offer>> {
        let Go { name, wanted } = match Go::decode(payload) {
            Ok(go) => go,
            Err(error) => {
                self.refuse(option, REP_ERR_INVALID, &error.to_string());
                return None;
            }
        };
        let Some(export) = self.server.find(name) else {
            self.refuse(option, REP_ERR_UNKNOWN, &not_present(name));
            return None;
        };
        let mut infos = Vec::new();
        if wanted.contains(&carried::INFO_NAME) {
            infos.push(Info::Name(export.name()));
        }
        if !export.description().is_empty() {
            infos.push(Info::Description(export.description()));
        }
        let mut sizes = export.block_sizes();
        if !wanted.contains(&carried::INFO_BLOCK_SIZE) {
            // Who does not ask may do as he likes.
            sizes.minimum = 1;
        }
        infos.push(Info::BlockSize(sizes));
        infos.push(Info::Export(export.size(), self.export_flags(&*export)));
        for info in infos {
            self.reply(option, REP_INFO, &info.encode());
        }
        self.reply(option, REP_ACK, &[]);
        (option == OPT_GO).then_some(export)
    }

    /// Lists contexts, or chooses some.
    fn meta(&mut self, option: u32, payload: &[u8]) {
        let sets = option == OPT_SET_META_CONTEXT;
        if sets {
            self.contexts = None;
        }
        if self.headers == Headers::Simple {
            let name = option_name(option);
            let text = format!("request option '{name}' when structured reply is not negotiated");
            return self.refuse(option, REP_ERR_INVALID, &text);
        }
        let MetaQueries { export, queries } = match MetaQueries::decode(payload) {
            Ok(queries) => queries,
            Err(error) => return self.refuse(option, REP_ERR_INVALID, &error.to_string()),
        };
        let Some(found) = self.server.find(export) else {
            return self.refuse(option, REP_ERR_UNKNOWN, &not_present(export));
        };
        let all = found.contexts();
        let chosen = match sets {
            true => contexts::chosen(all, &queries),
            false => contexts::listed(all, &queries),
        };
        for Context { id, name, .. } in &chosen {
            let id = if sets { *id } else { 0 };
            self.reply(option, REP_META_CONTEXT, &carried::Context { id, name }.encode());
        }
        self.reply(option, REP_ACK, &[]);
        if sets {
            let ids = chosen.iter().map(|context| context.id).collect();
            self.contexts = Some((export.to_owned(), ids));
        }
    }
}

fn not_present(name: &str) -> String {
    format!("export '{}' not present", name.escape_debug())
}
