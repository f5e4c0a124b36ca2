//! An NBD server by hand, on a Unix socket: every style of the protocol, and what no good server does.

use std::io::{Read, Result, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How it negotiates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    Oldstyle,
    /// The only option is the export's name.
    Newstyle,
    /// Options are known, and none of the replies but simple ones.
    Simple,
    Structured,
    Extended,
}

/// What it does wrong, in its answer to a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    Nothing,
    /// It answers a request that nobody has made.
    Cookie,
    /// More data than were asked for.
    Long,
    /// Data before those that were asked for.
    Outside,
    /// Some data twice.
    Twice,
    /// Less data than were asked for, and then the end of the reply.
    Short,
    /// Errors without end.
    Endless,
    /// A magic number that there is not.
    Magic,
    /// Half a header, and the end of the connection.
    Half,
    /// No answer at all.
    Silence,
}

/// What it serves, and how.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub style: Style,
    /// Bytes.
    pub size: u64,
    pub flags: u16,
    /// Minimum, preferred and maximum block size.
    pub sizes: Option<[u32; 3]>,
    pub wrong: Wrong,
    /// How often it does that.
    pub times: usize,
}

/// Flags: HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, FAST_ZERO.
pub const FLAGS: u16 = 0x86d;
pub const MULTI_CONN: u16 = 1 << 8;

impl Setup {
    pub fn new(style: Style) -> Setup {
        Setup { style, size: 1 << 20, flags: FLAGS, sizes: None, wrong: Wrong::Nothing, times: 1 }
    }
}

/// A command as it came: type, flags, offset, length.
pub type Command = (u16, u16, u64, u64);

/// What all connections share.
struct State {
    setup: Setup,
    data: Mutex<Vec<u8>>,
    commands: Mutex<Vec<Command>>,
    connections: AtomicUsize,
    wrongs: AtomicUsize,
    streams: Mutex<Vec<UnixStream>>,
}

/// A server; it ends with the process.
pub struct NbdServer(Arc<State>);

impl NbdServer {
    pub fn start(path: &Path, setup: Setup) -> Result<NbdServer> {
        let listener = UnixListener::bind(path)?;
        let state = Arc::new(State {
            setup,
            data: Mutex::new(vec![0; setup.size as usize]),
            commands: Mutex::default(),
            connections: AtomicUsize::new(0),
            wrongs: AtomicUsize::new(setup.times),
            streams: Mutex::default(),
        });
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                shared.connections.fetch_add(1, Ordering::SeqCst);
                if let Ok(clone) = stream.try_clone() {
                    lock(&shared.streams).push(clone);
                }
                let shared = shared.clone();
                // A client that goes is none of the test's concern.
                std::thread::spawn(move || drop(serve(&shared, stream)));
            }
        });
        Ok(NbdServer(state))
    }

    /// Commands so far.
    pub fn commands(&self) -> Vec<Command> {
        lock(&self.0.commands).clone()
    }

    pub fn connections(&self) -> usize {
        self.0.connections.load(Ordering::SeqCst)
    }

    pub fn data(&self) -> Vec<u8> {
        lock(&self.0.data).clone()
    }

    /// Breaks all connections.
    pub fn hang_up(&self) {
        for stream in lock(&self.0.streams).drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Wire(UnixStream);

impl Wire {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> Result<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.take().map(u64::from_be_bytes)
    }

    fn vec(&mut self, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn put(&mut self, parts: &[&[u8]]) -> Result<()> {
        self.0.write_all(&parts.concat())
    }

    fn reply(&mut self, option: u32, kind: u32, payload: &[u8]) -> Result<()> {
        let magic = 0x0003_e889_0455_65a9u64.to_be_bytes();
        let len = (payload.len() as u32).to_be_bytes();
        self.put(&[&magic, &option.to_be_bytes(), &kind.to_be_bytes(), &len, payload])
    }
}

fn serve(state: &State, stream: UnixStream) -> Result<()> {
    let mut wire = Wire(stream);
    let Setup { style, size, flags, .. } = state.setup;
    let export = [size.to_be_bytes().as_slice(), &flags.to_be_bytes()].concat();
    if style == Style::Oldstyle {
        let magic = 0x0000_4202_8186_1253u64.to_be_bytes();
        let flags = u32::from(flags).to_be_bytes();
        wire.put(&[b"NBDMAGIC", &magic, &size.to_be_bytes(), &flags, &[0; 124]])?;
        return commands(state, &mut wire, Style::Simple);
    }
    let fixed = u16::from(style != Style::Newstyle);
    wire.put(&[b"NBDMAGICIHAVEOPT", &fixed.to_be_bytes()])?;
    wire.u32()?;
    let mut agreed = Style::Simple;
    loop {
        wire.u64()?;
        let option = wire.u32()?;
        let len = wire.u32()?;
        let payload = wire.vec(len.into())?;
        match option {
            1 => {
                wire.put(&[&export, &[0; 124]])?;
                return commands(state, &mut wire, agreed);
            }
            8 if matches!(style, Style::Structured | Style::Extended) => {
                agreed = Style::Structured;
                wire.reply(option, 1, &[])?;
            }
            11 if style == Style::Extended => {
                agreed = Style::Extended;
                wire.reply(option, 1, &[])?;
            }
            10 => {
                // The only query is at the end.
                let name = payload.len() - 15;
                wire.reply(option, 4, &[&7u32.to_be_bytes(), &payload[name..]].concat())?;
                wire.reply(option, 1, &[])?;
            }
            7 => {
                wire.reply(option, 3, &[&[0, 0], &export[..]].concat())?;
                if let Some(sizes) = state.setup.sizes {
                    let sizes = sizes.map(u32::to_be_bytes).concat();
                    wire.reply(option, 3, &[&[0, 3], &sizes[..]].concat())?;
                }
                wire.reply(option, 1, &[])?;
                return commands(state, &mut wire, agreed);
            }
            2 => return Ok(()),
            _ => wire.reply(option, 0x8000_0001, b"what?")?,
        }
    }
}

/// A request, and how it is answered.
struct Asked {
    style: Style,
    cookie: u64,
    offset: u64,
    len: u64,
}

impl Asked {
    fn simple(&self, error: u32) -> Vec<u8> {
        let head = [0x6744_6698u32.to_be_bytes(), error.to_be_bytes()].concat();
        [&head[..], &self.cookie.to_be_bytes()].concat()
    }

    fn chunk(&self, kind: u16, last: bool, payload: &[u8]) -> Vec<u8> {
        let extended = self.style == Style::Extended;
        let magic: u32 = if extended { 0x6e8a_278c } else { 0x668e_33ef };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(u16::from(last).to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        if extended {
            bytes.extend(self.offset.to_be_bytes());
            bytes.extend((payload.len() as u64).to_be_bytes());
        } else {
            bytes.extend((payload.len() as u32).to_be_bytes());
        }
        bytes.extend(payload);
        bytes
    }

    fn data(&self, offset: u64, last: bool, data: &[u8]) -> Vec<u8> {
        self.chunk(1, last, &[&offset.to_be_bytes(), data].concat())
    }

    fn done(&self) -> Vec<u8> {
        match self.style {
            Style::Extended => self.chunk(0, true, &[]),
            // Good servers answer with simple replies where nothing is carried.
            _ => self.simple(0),
        }
    }

    /// A good answer to a read: in two chunks from the back to the front, and a hole where there are zeroes.
    fn read(&self, data: &[u8]) -> Vec<u8> {
        if self.style == Style::Simple {
            return [&self.simple(0), data].concat();
        }
        if data.iter().all(|&byte| byte == 0) {
            let (offset, len) = (self.offset.to_be_bytes(), (self.len as u32).to_be_bytes());
            return self.chunk(2, true, &[&offset[..], &len].concat());
        }
        let half = self.len / 2;
        let (front, back) = data.split_at(half as usize);
        let last = self.data(self.offset + half, half == 0, back);
        if half == 0 { last } else { [last, self.data(self.offset, true, front)].concat() }
    }

    fn wrong(&self, wrong: Wrong, data: &[u8]) -> Vec<u8> {
        let end = self.offset + self.len;
        let other = || Asked { cookie: self.cookie ^ 1 << 32, ..*self };
        match (wrong, self.style) {
            (Wrong::Cookie, _) => other().read(data),
            (Wrong::Magic, _) => vec![0x55; 64],
            (Wrong::Half, _) => self.read(data)[..9].to_vec(),
            // Simple replies cannot be long or short: what follows is no header.
            (_, Style::Simple) => [&self.read(data), data].concat(),
            (Wrong::Long, _) => self.data(self.offset, true, &[data, data].concat()),
            (Wrong::Outside, _) => self.data(end - 1, true, &data[..2]),
            (Wrong::Twice, _) => [self.data(self.offset, false, data), self.read(data)].concat(),
            (Wrong::Short, _) => self.data(self.offset, true, &data[1..]),
            (Wrong::Endless, _) => self.chunk(0x8001, false, &[0, 0, 0, 5, 0, 0]).repeat(100_000),
            _ => Vec::new(),
        }
    }
}

fn commands(state: &State, wire: &mut Wire, style: Style) -> Result<()> {
    loop {
        wire.u32()?;
        let (flags, command, cookie, offset) = (wire.u16()?, wire.u16()?, wire.u64()?, wire.u64()?);
        let len = if style == Style::Extended { wire.u64()? } else { wire.u32()?.into() };
        lock(&state.commands).push((command, flags, offset, len));
        let asked = Asked { style, cookie, offset, len };
        let range = offset as usize..(offset + len) as usize;
        let reply = match command {
            0 => {
                let data = lock(&state.data)[range].to_vec();
                let take = |left: usize| left.checked_sub(1);
                let is_wrong = state.setup.wrong != Wrong::Nothing
                    && state.wrongs.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok();
                match state.setup.wrong {
                    Wrong::Silence if is_wrong => loop {
                        std::thread::sleep(Duration::from_secs(1));
                    },
                    wrong if is_wrong => {
                        wire.put(&[&asked.wrong(wrong, &data)])?;
                        if wrong == Wrong::Half {
                            return wire.0.shutdown(std::net::Shutdown::Both);
                        }
                        continue;
                    }
                    _ => asked.read(&data),
                }
            }
            1 => {
                let data = wire.vec(len)?;
                lock(&state.data)[range].copy_from_slice(&data);
                asked.done()
            }
            2 => return Ok(()),
            4 | 6 => {
                lock(&state.data)[range].fill(0);
                asked.done()
            }
            7 => {
                let data = lock(&state.data);
                let is_zero = |at: usize| data[at..].iter().take(512).all(|&byte| byte == 0);
                let first = is_zero(range.start);
                let end = range.clone().step_by(512).find(|&at| is_zero(at) != first);
                let found = (end.unwrap_or(range.end) - range.start) as u64;
                let kind = if first { 3u64 } else { 0 };
                let id = 7u32.to_be_bytes();
                match style {
                    Style::Extended => asked.chunk(
                        6,
                        true,
                        &[&id[..], &1u32.to_be_bytes(), &found.to_be_bytes(), &kind.to_be_bytes()]
                            .concat(),
                    ),
                    _ => asked.chunk(
                        5,
                        true,
                        &[id, (found as u32).to_be_bytes(), (kind as u32).to_be_bytes()].concat(),
                    ),
                }
            }
            _ => asked.done(),
        };
        wire.put(&[&reply])?;
    }
}
