//! The commands that move bytes: reads, writes, discards.

use super::words::{self, Words, human};
use super::{Said, Session};
use crate::block::{WriteFlags, ZeroFlags};
use crate::cli::img::{out, outln};
use crate::io::{AlignedBuf, Errno, IoResult, IoVec, current};
use crate::tools::Opened;
use crate::tools::output::errln;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// What is written where nothing else is said.
const FILL: u8 = 0xcd;
/// What a buffer holds before a read, so that what was not read shows.
const UNREAD: u8 = 0xab;
/// How far misaligned buffers are off, in bytes.
const MISALIGNED: usize = 16;

/// Memory for one request.
struct Memory {
    whole: AlignedBuf,
    skip: usize,
    len: usize,
}

impl Memory {
    fn new(len: u64, fill: u8, misalign: bool) -> Option<Memory> {
        let skip = if misalign { MISALIGNED } else { 0 };
        let Some(mut whole) = AlignedBuf::new(len as usize + skip, 4096) else {
            outln!("cannot allocate {len} bytes");
            return None;
        };
        whole.fill(fill);
        Some(Memory { whole, skip, len: len as usize })
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.whole[self.skip..][..self.len]
    }

    /// To fill, or to write from.
    fn list(&mut self) -> IoVec<'_> {
        self.whole.io_vec().slice(self.skip as u64, self.len as u64)
    }
}

/// A request as a command gives it.
struct Request {
    offset: u64,
    len: u64,
    begin: Instant,
    quiet: bool,
    /// One line, for programs.
    machine: bool,
}

impl Request {
    fn new(words: &Words<'_>, offset: u64, len: u64) -> Request {
        let (quiet, machine) = (words.has('q'), words.has('C'));
        Request { offset, len, begin: Instant::now(), quiet, machine }
    }

    /// What was done and how long it took.
    fn report(&self, did: &str) {
        if self.quiet {
            return;
        }
        let time = self.begin.elapsed();
        let (len, offset) = (self.len, self.offset);
        let per_second = |number: f64| number / time.as_secs_f64().max(1e-9);
        if self.machine {
            let (bytes, ops) = (per_second(len as f64), per_second(1.0));
            outln!("{len},1,{},{bytes:.3},{ops:.3}", clock(time));
            return;
        }
        outln!("{did} {len}/{len} bytes at offset {offset}");
        let shown = match time.as_secs() {
            0..60 => format!("{:02}.{:02} sec", time.as_secs(), time.subsec_millis() / 10),
            _ => clock(time),
        };
        outln!(
            "{}, 1 ops; {shown} ({}/sec and {:.4} ops/sec)",
            human(len as f64),
            human(per_second(len as f64)),
            per_second(1.0)
        );
    }
}

fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours}:{minutes:02}:{:02}.{:02}", seconds % 60, time.subsec_millis() / 10)
}

/// What the state of a machine is read and written in.
fn whole_sectors(offset: u64, len: u64) -> Said {
    for (value, name) in [(offset, "offset"), (len, "count")] {
        if !value.is_multiple_of(512) {
            outln!("{value} is not a sector-aligned value for '{name}'");
            return None;
        }
    }
    Some(())
}

/// Offset and length; for vectors, the sum of several lengths.
fn range(words: &Words<'_>) -> Option<(u64, u64)> {
    let [offset, lengths @ ..] = &*words.operands else { return None };
    let offset = words::number(offset)?;
    let mut len = 0u64;
    for text in lengths {
        len += words::length(text)?;
    }
    Some((offset, len))
}

/// Bytes in lines of sixteen.
fn dump(bytes: &[u8], offset: u64) {
    for (index, line) in bytes.chunks(16).enumerate() {
        out!("{:08x}:  ", offset + 16 * index as u64);
        line.iter().for_each(|byte| out!("{byte:02x} "));
        out!(" ");
        for &byte in line {
            out!("{}", if byte.is_ascii_alphanumeric() { byte as char } else { '.' });
        }
        outln!();
    }
}

/// Which bytes must be what.
struct Wanted {
    pattern: u8,
    skip: u64,
    count: u64,
}

impl Wanted {
    fn check(&self, bytes: &[u8], offset: u64) -> bool {
        let part = &bytes[self.skip as usize..][..self.count as usize];
        let good = part.iter().all(|&byte| byte == self.pattern);
        if !good {
            let at = offset + self.skip;
            outln!("Pattern verification failed at offset {at}, {} bytes", self.count);
        }
        good
    }
}

impl Session {
    pub(super) async fn read(&mut self, words: &Words<'_>, vector: bool) -> Said {
        let pattern = match words.get('P') {
            Some(text) => Some(words::pattern(text)?),
            None => None,
        };
        let skip = match words.get('s') {
            Some(text) => Some(words::number(text)?),
            None => None,
        };
        let count = match words.get('l') {
            Some(text) => Some(words::number(text)?),
            None => None,
        };
        if !vector && (words.operands.len() != 2) {
            return self.usage();
        }
        let (offset, len) = range(words)?;
        if words.has('b') {
            whole_sectors(offset, len)?;
        }
        if pattern.is_none() && (skip.is_some() || count.is_some()) {
            return self.usage();
        }
        let skip = skip.unwrap_or(0);
        let count = count.unwrap_or(len.saturating_sub(skip));
        if skip.checked_add(count).is_none_or(|end| end > len) {
            outln!("pattern verification range exceeds end of read data");
            return None;
        }
        let wanted = pattern.map(|pattern| Wanted { pattern, skip, count });
        let mut memory = Memory::new(len, UNREAD, self.misalign)?;
        let request = Request::new(words, offset, len);
        let into = memory.list();
        let image = self.image()?;
        let read = match (words.has('b'), image.node().driver().image()) {
            (false, _) => image.read(offset, &into).await,
            (true, Some(image)) => image.read_machine(offset, &into).await,
            (true, None) => Err(Errno::ENOTSUP),
        };
        if let Err(errno) = read {
            outln!("{} failed: {errno}", if vector { "readv" } else { "read" });
            return None;
        }
        let good = wanted.is_none_or(|wanted| wanted.check(memory.bytes(), offset));
        if request.quiet {
            return good.then_some(());
        }
        if words.has('v') {
            dump(memory.bytes(), offset);
        }
        request.report("read");
        good.then_some(())
    }

    pub(super) async fn write(&mut self, words: &Words<'_>, vector: bool) -> Said {
        let has = |letter| words.has(letter);
        let pattern = match words.get('P') {
            Some(text) => Some(words::pattern(text)?),
            None => None,
        };
        if !vector && words.operands.len() != 2 {
            return self.usage();
        }
        for (wrong, text) in [
            (has('b') && has('z'), "-b and -z cannot be specified at the same time"),
            (
                has('f') && (has('b') || has('c')),
                "-f and -b or -c cannot be specified at the same time",
            ),
            (has('n') && !has('z'), "-n requires -z to be specified"),
            (has('u') && !has('z'), "-u requires -z to be specified"),
            (
                [has('z'), has('P'), has('s')].into_iter().filter(|&given| given).count() > 1,
                "Only one of -z, -P, and -s can be specified at the same time",
            ),
        ] {
            if wrong {
                outln!("{text}");
                return None;
            }
        }
        let (offset, len) = range(words)?;
        if has('b') {
            whole_sectors(offset, len)?;
        }
        self.check_writable()?;
        let mut memory = Memory::new(if has('z') { 0 } else { len }, FILL, self.misalign)?;
        if let Some(byte) = pattern {
            memory.bytes().fill(byte);
        }
        if let Some(name) = words.get('s') {
            fill_from(name, memory.bytes())?;
        }
        let request = Request::new(words, offset, len);
        let image = self.image()?;
        let written = if has('b') {
            let from = memory.list();
            match image.node().driver().image() {
                Some(image) => image.write_machine(offset, &from).await,
                None => Err(Errno::ENOTSUP),
            }
        } else if has('z') {
            image.zero(offset, len, zero_flags(words)).await
        } else if has('c') {
            image.write_compressed(offset, &memory.list()).await
        } else {
            image.write(offset, &memory.list(), write_flags(words)).await
        };
        if let Err(errno) = written {
            outln!("{} failed: {errno}", if vector { "writev" } else { "write" });
            return None;
        }
        request.report("wrote");
        Some(())
    }

    pub(super) async fn discard(&mut self, words: &Words<'_>) -> Said {
        if words.operands.len() != 2 {
            return self.usage();
        }
        let (offset, len) = range(words)?;
        self.check_writable()?;
        let request = Request::new(words, offset, len);
        if let Err(errno) = self.image()?.node().discard(offset, len).await {
            outln!("discard failed: {errno}");
            return None;
        }
        request.report("discard");
        Some(())
    }

    pub(super) async fn aio_read(&mut self, words: &Words<'_>) -> Said {
        let pattern = match words.get('P') {
            Some(text) => Some(words::pattern(text)?),
            None => None,
        };
        if words.has('i') {
            outln!("injecting invalid read request");
            return Some(());
        }
        let (offset, len) = range(words)?;
        let mut memory = Memory::new(len, UNREAD, self.misalign)?;
        let request = Request::new(words, offset, len);
        let (image, shows) = (self.image()?.clone(), words.has('v'));
        self.start(async move {
            if let Err(errno) = image.read(offset, &memory.list()).await {
                return outln!("readv failed: {errno}");
            }
            if let Some(pattern) = pattern {
                Wanted { pattern, skip: 0, count: len }.check(memory.bytes(), offset);
            }
            if !request.quiet && shows {
                dump(memory.bytes(), offset);
            }
            request.report("read");
        });
        Some(())
    }

    pub(super) async fn aio_write(&mut self, words: &Words<'_>) -> Said {
        let pattern = match words.get('P') {
            Some(text) => Some(words::pattern(text)?),
            None => None,
        };
        if words.has('i') {
            outln!("injecting invalid write request");
            return Some(());
        }
        if words.has('z') && words.operands.len() != 2 {
            outln!("-z supports only a single length parameter");
            return None;
        }
        if words.has('u') && !words.has('z') {
            outln!("-u requires -z to be specified");
            return None;
        }
        let (offset, len) = range(words)?;
        self.check_writable()?;
        let zero = words.has('z');
        let size = if zero { 0 } else { len };
        let mut memory = Memory::new(size, pattern.unwrap_or(FILL), self.misalign)?;
        let request = Request::new(words, offset, len);
        let (flags, zero_flags) = (write_flags(words), zero_flags(words));
        let image = self.image()?.clone();
        self.start(async move {
            let written = match zero {
                true => image.zero(offset, len, zero_flags).await,
                false => image.write(offset, &memory.list(), flags).await,
            };
            match written {
                Ok(()) => request.report("wrote"),
                Err(errno) => outln!("aio_write failed: {errno}"),
            }
        });
        Some(())
    }

    /// Starts a request that nobody waits for before `aio_flush`.
    fn start(&mut self, request: impl Future<Output = ()> + 'static) {
        let pending = self.pending.clone();
        pending.set(pending.get() + 1);
        current().spawn(async move {
            request.await;
            pending.set(pending.get() - 1);
        });
    }
}

fn write_flags(words: &Words<'_>) -> WriteFlags {
    if words.has('f') { WriteFlags::FUA } else { WriteFlags::empty() }
}

fn zero_flags(words: &Words<'_>) -> ZeroFlags {
    let mut flags = ZeroFlags::empty();
    flags.set(ZeroFlags::UNMAP, words.has('u'));
    flags.set(ZeroFlags::NO_FALLBACK, words.has('n'));
    flags.set(ZeroFlags::FUA, words.has('f'));
    flags
}

/// Fills memory with a file's bytes, over and over.
fn fill_from(name: &str, bytes: &mut [u8]) -> Said {
    let found = match std::fs::read(crate::options::bytes::path_of(name)) {
        Ok(found) => found,
        Err(error) => {
            errln!("{name}: {}", Errno::from(error));
            return None;
        }
    };
    if found.is_empty() {
        errln!("{name}: file is empty");
        return None;
    }
    for part in bytes.chunks_mut(found.len()) {
        part.copy_from_slice(&found[..part.len()]);
    }
    Some(())
}

/// Makes everything written so far durable.
pub async fn flush(image: &Rc<Opened>) -> IoResult {
    image.node().flush().await
}
