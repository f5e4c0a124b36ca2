//! What is done about one request: whether it may be, and then the request itself.

use super::contexts::Context;
use super::replies::Reply;
use crate::block::{WriteFlags, ZeroFlags};
use crate::export::core::Disk;
use crate::export::core::disk::Request as DiskRequest;
use crate::export::core::failure::{Failure, Operation};
use crate::io::{AlignedBuf, Errno, Permit};
use crate::nbd::reply::Status;
use crate::nbd::request::*;
use crate::nbd::{CommandFlags, Headers, MAX_DATA};
use std::borrow::Cow;
use std::sync::atomic::Ordering;

/// A request that may be done. Ranges lie inside the disk, in bytes.
pub(super) enum Work {
    /// `whole`: the data in one chunk.
    Read {
        whole: bool,
    },
    Write {
        flags: WriteFlags,
    },
    Flush,
    Trim {
        durable: bool,
    },
    Cache,
    WriteZeroes {
        flags: ZeroFlags,
    },
    /// Of these contexts.
    Status {
        len: u64,
        one: bool,
        ids: Vec<u32>,
    },
}

/// A request that is refused before anything is done.
#[derive(Debug)]
pub(super) struct Refusal {
    pub errno: Errno,
    pub text: Cow<'static, str>,
}

fn refuse<T>(errno: Errno, text: impl Into<Cow<'static, str>>) -> Result<T, Refusal> {
    Err(Refusal { errno, text: text.into() })
}

/// What a client may ask for.
pub(super) struct Rules<'a> {
    pub disk: &'a Disk,
    pub headers: Headers,
    /// The numbers of its contexts.
    pub contexts: &'a [u32],
}

impl Rules<'_> {
    /// Checks a request. `query`: what a request for block status carries.
    pub fn plan(&self, request: &Request, query: Option<StatusQuery>) -> Result<Work, Refusal> {
        let Request { flags, command, length, .. } = *request;
        let name = command_name(command);
        let structured = self.headers != Headers::Simple;
        let extended = self.headers == Headers::Extended;
        let mut allowed = match command {
            CMD_READ if structured => CommandFlags::DF,
            CMD_WRITE if extended => CommandFlags::PAYLOAD_LEN,
            CMD_WRITE_ZEROES => CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO,
            CMD_BLOCK_STATUS if extended => CommandFlags::REQ_ONE | CommandFlags::PAYLOAD_LEN,
            CMD_BLOCK_STATUS => CommandFlags::REQ_ONE,
            CMD_READ | CMD_WRITE | CMD_FLUSH | CMD_TRIM | CMD_CACHE => CommandFlags::empty(),
            _ => return refuse(Errno::EINVAL, format!("invalid request type ({command})")),
        };
        // Everywhere, whether it means something or not.
        allowed |= CommandFlags::FUA;
        if !allowed.contains(flags) {
            let bits = flags.bits();
            return refuse(
                Errno::EINVAL,
                format!("unsupported flags for command {name} (got {bits:#x})"),
            );
        }
        let writes = matches!(command, CMD_WRITE | CMD_WRITE_ZEROES | CMD_TRIM);
        if writes && !self.disk.options.writable {
            return refuse(Errno::EPERM, "Export is read-only");
        }
        if matches!(command, CMD_READ | CMD_WRITE) && length > MAX_DATA.into() {
            let text = format!("len ({length}) is larger than max len ({MAX_DATA})");
            return refuse(Errno::EINVAL, text);
        }
        let len = query.as_ref().map_or(length, |query| query.length);
        if command != CMD_FLUSH {
            self.check_range(request, len)?;
        }
        let through = self.disk.write_through.load(Ordering::Relaxed);
        let durable = through || flags.contains(CommandFlags::FUA);
        Ok(match command {
            CMD_READ => Work::Read { whole: flags.contains(CommandFlags::DF) },
            CMD_WRITE if durable => Work::Write { flags: WriteFlags::FUA },
            CMD_WRITE => Work::Write { flags: WriteFlags::empty() },
            CMD_FLUSH => Work::Flush,
            CMD_TRIM => Work::Trim { durable },
            CMD_CACHE => Work::Cache,
            CMD_WRITE_ZEROES => {
                let mut zero = ZeroFlags::empty();
                zero.set(ZeroFlags::UNMAP, !flags.contains(CommandFlags::NO_HOLE));
                zero.set(ZeroFlags::NO_FALLBACK, flags.contains(CommandFlags::FAST_ZERO));
                zero.set(ZeroFlags::FUA, durable);
                Work::WriteZeroes { flags: zero }
            }
            _ => self.plan_status(len, flags, query)?,
        })
    }

    fn check_range(&self, request: &Request, len: u64) -> Result<(), Refusal> {
        let size = self.disk.capacity.load(Ordering::Relaxed) * crate::block::SECTOR;
        let from = request.offset;
        if from.checked_add(len).is_some_and(|end| end <= size) {
            return Ok(());
        }
        let errno = match request.command {
            CMD_WRITE | CMD_WRITE_ZEROES => Errno::ENOSPC,
            _ => Errno::EINVAL,
        };
        refuse(errno, format!("operation past EOF; From: {from}, Len: {len}, Size: {size}"))
    }

    fn plan_status(
        &self,
        len: u64,
        flags: CommandFlags,
        query: Option<StatusQuery>,
    ) -> Result<Work, Refusal> {
        if self.contexts.is_empty() {
            return refuse(Errno::EINVAL, "CMD_BLOCK_STATUS not negotiated");
        }
        if len == 0 {
            return refuse(Errno::EINVAL, "need non-zero length");
        }
        let ids = match query {
            None => self.contexts.to_vec(),
            Some(StatusQuery { ids, .. }) => {
                let known = ids.iter().all(|id| self.contexts.contains(id));
                let repeats = ids.iter().enumerate().any(|(n, id)| ids[..n].contains(id));
                if ids.is_empty() || repeats || !known {
                    return refuse(Errno::EINVAL, "the contexts asked for were not negotiated");
                }
                ids
            }
        };
        Ok(Work::Status { len, one: flags.contains(CommandFlags::REQ_ONE), ids })
    }
}

impl Work {
    /// As counters tell requests apart.
    pub fn operation(&self) -> Option<Operation> {
        match self {
            Work::Read { .. } => Some(Operation::Read),
            Work::Write { .. } => Some(Operation::Write),
            Work::Flush => Some(Operation::Flush),
            Work::Trim { .. } => Some(Operation::Discard),
            Work::WriteZeroes { .. } => Some(Operation::WriteZeroes),
            Work::Cache | Work::Status { .. } => None,
        }
    }

    /// What it may take of memory on its way through the graph, in bytes.
    pub fn memory(&self, disk: &Disk, request: &Request, data: Option<&AlignedBuf>) -> u64 {
        let needs = disk.node().working_memory();
        match (self, data) {
            (Work::Read { .. } | Work::Write { .. }, Some(data)) => {
                let writes = matches!(self, Work::Write { .. });
                needs.to_transfer(request.offset, data.source().as_raw(), writes)
            }
            (Work::WriteZeroes { .. }, _) => needs.to_zero(request.length),
            _ => needs.to_ask(),
        }
    }

    /// Does it. The reply, and whether it tells of success. `data` is the request's own or has room for the reply's.
    pub async fn run(
        self,
        disk: &Disk,
        contexts: &[Context],
        headers: Headers,
        request: &Request,
        data: Option<(AlignedBuf, Permit)>,
    ) -> (Reply, bool) {
        let at = request.offset;
        let mut data = data;
        let result = match (&self, &mut data) {
            (Work::Read { .. }, Some((data, _))) => {
                disk.run(DiskRequest::Read { at, into: data.io_vec() }).await
            }
            (Work::Write { flags }, Some((data, _))) => {
                let from = data.source();
                disk.run(DiskRequest::Write { at, from, flags: *flags }).await
            }
            (Work::Flush, _) => disk.run(DiskRequest::Flush).await,
            (Work::Trim { durable }, _) => trim(disk, at, request.length, *durable).await,
            (Work::WriteZeroes { flags }, _) if request.length > 0 => {
                zero(disk, at, request.length, *flags).await
            }
            (Work::Status { len, one, ids }, _) => {
                return status(disk, contexts, headers, request, (*len, *one, ids)).await;
            }
            // What is cached is up to the kernel.
            _ => Ok(()),
        };
        match (result, self) {
            (Ok(()), Work::Read { whole }) => match data {
                Some((data, permit)) => {
                    (Reply::data(headers, request, (data, Some(permit)), whole), true)
                }
                None => (Reply::no_data(headers, request), true),
            },
            (Ok(()), _) => (Reply::done(headers, request), true),
            (Err(failure), work) => {
                // No failure of the storage: there is no quick way.
                let is_slow = matches!(work, Work::WriteZeroes { flags }
                    if flags.contains(ZeroFlags::NO_FALLBACK) && failure.errno.is_unsupported());
                if !is_slow {
                    disk.failed(failure);
                }
                failed(headers, request, failure.errno)
            }
        }
    }
}

fn failed(headers: Headers, request: &Request, errno: Errno) -> (Reply, bool) {
    let text = format!("{} failed: {errno}", command_name(request.command));
    (Reply::failed(headers, request, errno, &text), false)
}

async fn trim(disk: &Disk, at: u64, len: u64, durable: bool) -> Result<(), Failure> {
    if len > 0 {
        disk.run(DiskRequest::Discard { at, len }).await?;
    }
    if durable { disk.run(DiskRequest::Flush).await } else { Ok(()) }
}

async fn zero(disk: &Disk, at: u64, len: u64, flags: ZeroFlags) -> Result<(), Failure> {
    if !flags.contains(ZeroFlags::NO_FALLBACK) {
        return disk.run(DiskRequest::WriteZeroes { at, len, flags }).await;
    }
    // A failure that only says that there is no quick way is none of the storage's.
    match disk.node().zero(at, len, flags).await {
        Err(errno) if errno.is_unsupported() => {
            let operation = Operation::WriteZeroes;
            Err(Failure { operation, offset: at, len, errno: Errno::ENOTSUP })
        }
        Ok(()) => Ok(()),
        Err(_) => disk.run(DiskRequest::WriteZeroes { at, len, flags }).await,
    }
}

async fn status(
    disk: &Disk,
    contexts: &[Context],
    headers: Headers,
    request: &Request,
    (len, one, ids): (u64, bool, &[u32]),
) -> (Reply, bool) {
    let node = disk.node();
    let mut all = Vec::with_capacity(ids.len());
    for context in contexts.iter().filter(|context| ids.contains(&context.id)) {
        match context.extents(&node, request.offset, len, one).await {
            Ok(extents) => all.push(Status { id: context.id, extents }),
            Err(errno) => return failed(headers, request, errno),
        }
    }
    (Reply::status(headers, request, &all), true)
}
