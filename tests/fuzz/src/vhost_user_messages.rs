//! A hostile front end against the real session: its messages, its descriptors, its memory.
//!
//! The law: no panic; the session comes to its end once the front end has hung up; afterwards no
//! descriptor and no mapping of the connection's is left.

mod belongings;

use super::disk::{self, Under, Wanted};
use super::guest::memory_file;
use super::input::Input;
use super::mapped::Mapped;
use super::worker::worker;
use belongings::{BELONGINGS, Belongings};
use std::cell::RefCell;
use std::fs::File;
use std::io::Seek;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;
use vhost::vhost_user::{BackendReqHandler, Error};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use vublk::export::core::server_events::ServerEvents;
use vublk::export::vhost_user_blk::channel::Channel;
use vublk::export::vhost_user_blk::device::Device;
use vublk::export::vhost_user_blk::session::Session;
use vublk::io::sim::Disorder;

/// Messages in one connection; few enough for all of them and their replies to wait in the socket.
const MESSAGES: usize = 40;
const QUEUES: u16 = 3;
/// Bytes of the front end's memory.
const MEMORY: u64 = 64 << 10;
/// Bytes that the specification's layout takes for a queue of 16 entries, in whole lines of 64.
const KEPT: u64 = 320;
const USER: u64 = 0x7f00_0000_0000;

/// Codes of the vhost-user specification's front-end messages.
mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    /// One past the last that is defined.
    pub const END: u32 = 48;
}

/// Runs one connection.
pub fn run(data: &[u8]) {
    thread_local! {
        /// The first connection of a thread makes what later ones find.
        static WARM: () = {
            // As in every Rust program; libFuzzer's is none.
            // SAFETY: no handler runs.
            unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
            connect(&[1]);
            // All messages that a ring needs, so that one has run.
            connect(&[1, 0, 12]);
        };
    }
    WARM.with(|()| ());
    let before = count_open_files();
    connect(data);
    let after = count_open_files();
    assert!(after <= before, "{before} descriptors became {after}: {:?}", open_files());
}

/// The disk that a daemon serves.
async fn open_device() -> Arc<Device> {
    let device = disk::open(Wanted {
        graph: Under::Fast,
        faulty: false,
        failures: Default::default(),
        writable: true,
        write_through: false,
        logical_block_size: 512,
        num_queues: QUEUES,
    });
    let device = device.await;
    let fence = device.disk.node().fence();
    assert!(fence.holds(), "the disk is not offered inflight tracking");
    device
}

/// How many descriptors this process has open.
fn count_open_files() -> u64 {
    static LIST: LazyLock<File> =
        LazyLock::new(|| File::open("/proc/self/fd").expect("a list of descriptors"));
    match LIST.metadata().expect("it is open").len() {
        // Kernels before 6.2 do not tell their number as the list's length.
        0 => open_files().len() as u64,
        count => count,
    }
}

/// What this process's descriptors lead to, if nothing else runs in it.
fn open_files() -> Vec<PathBuf> {
    let list = std::fs::read_dir("/proc/self/fd").expect("a list of descriptors");
    list.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()).collect()
}

fn connect(data: &[u8]) {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    FrontEnd::new(Input::new(data)).speak(&ours);
    // All has been said; what the session waits for beyond it is the end of the connection. The answers wait
    // in the socket.
    ours.shutdown(Shutdown::Write).expect("it is open");

    let workers = vec![worker(0), worker(1)];
    let max_delay = Duration::from_micros(50);
    let calm = Disorder { seed: 1, max_delay, short: 0.0, interrupted: 0.0 };
    workers[1].drive(calm, |_| async {});
    let device = workers[0].drive(calm, |_| open_device());
    let session = Session::new(device, workers.clone(), 0);
    let session = Arc::new(Mutex::new(session));
    let mut handler = BackendReqHandler::from_stream(theirs, session.clone());
    let server_events = ServerEvents::new().expect("an eventfd");
    server_events.resized();
    let mut channel = Channel::new("fuzz", &server_events, None);
    loop {
        if channel.wait(handler.as_raw_fd(), true, None).is_none() {
            continue;
        }
        match handler.handle_request() {
            Ok(()) => channel.accept(session.lock().expect("no panic").has_channel()),
            Err(Error::SocketRetry(_)) => {}
            Err(_) => break,
        }
    }
    session.lock().expect("no panic").stop_all();
    drop((channel, handler, session));
    // A queue's worker drops it after its last word.
    for worker in workers {
        worker.call(|_| ());
    }
}

/// What a front end says, and has to give.
struct FrontEnd<'a> {
    input: Input<'a>,
    has: Rc<Belongings>,
}

/// A descriptor to send.
enum Sent<'a> {
    New(OwnedFd),
    Kept(&'a File),
}

impl Sent<'_> {
    fn raw(&self) -> RawFd {
        match self {
            Sent::New(fd) => fd.as_raw_fd(),
            Sent::Kept(file) => file.as_raw_fd(),
        }
    }
}

impl FrontEnd<'_> {
    fn new(input: Input<'_>) -> FrontEnd<'_> {
        let has = BELONGINGS.with(Rc::clone);
        has.renew();
        FrontEnd { input, has }
    }

    fn speak(mut self, socket: &UnixStream) {
        let usual = self.input.one_in(2);
        let mut said = 0;
        if usual {
            said = self.set_up(socket);
        }
        while said < MESSAGES && !self.input.is_empty() {
            said += 1;
            let code = match self.input.u8() % 8 {
                0 => self.input.u32(),
                1 => self.input.below(u64::from(code::END)) as u32,
                _ => self.input.pick(&[
                    code::SET_MEM_TABLE,
                    code::SET_LOG_BASE,
                    code::SET_LOG_FD,
                    code::SET_VRING_NUM,
                    code::SET_VRING_ADDR,
                    code::SET_VRING_BASE,
                    code::GET_VRING_BASE,
                    code::SET_VRING_KICK,
                    code::SET_VRING_KICK,
                    code::SET_VRING_CALL,
                    code::SET_VRING_ERR,
                    code::SET_VRING_ENABLE,
                    code::SET_FEATURES,
                    code::SET_BACKEND_REQ_FD,
                    code::GET_CONFIG,
                    code::SET_CONFIG,
                    code::ADD_MEM_REG,
                    code::REM_MEM_REG,
                    code::GET_INFLIGHT_FD,
                    code::SET_INFLIGHT_FD,
                ]),
            };
            let mut body = self.body(code);
            let mut flags = 1 | if self.input.one_in(2) { 8 } else { 0 };
            let mut size = body.len() as u32;
            if self.input.one_in(16) {
                flags = self.input.u32();
            }
            if self.input.one_in(16) {
                size = self.input.edgy() as u32;
            }
            if self.input.one_in(16) {
                body.truncate(self.input.u8().into());
            }
            let has = self.has.clone();
            let files = self.files(code, &body, &has);
            if !send(socket, code, flags, size, &body, &files) {
                return;
            }
        }
    }

    /// What every front end begins with, up to a ring that runs.
    fn set_up(&mut self, socket: &UnixStream) -> usize {
        let tracked = if self.input.one_in(2) { Some(self.kept()) } else { None };
        let has = self.has.clone();
        let event = |code| Sent::Kept(has.event(code));
        let words = |list: &[u64]| list.iter().flat_map(|word| word.to_le_bytes()).collect();
        let pair = |a: u32, b: u32| [a.to_le_bytes(), b.to_le_bytes()].concat();
        let ring = [pair(0, 0), words(&[USER, USER + 0x1800, USER + 0x1000, 0])].concat();
        let table = [pair(1, 0), words(&[0, MEMORY, USER, 0])].concat();
        let kept = [words(&[KEPT * 3, 0]), pair(3 | 16 << 16, 0)].concat();
        let tracks =
            tracked.map(|file| (code::SET_INFLIGHT_FD, kept, vec![Sent::New(file.into())]));
        let messages: [(u32, Vec<u8>, Vec<Sent<'_>>); 12] = [
            (code::SET_OWNER, vec![], vec![]),
            (code::GET_FEATURES, vec![], vec![]),
            (code::GET_PROTOCOL_FEATURES, vec![], vec![]),
            // MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS
            (
                code::SET_PROTOCOL_FEATURES,
                words(&[1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15]),
                vec![],
            ),
            // VERSION_1, PROTOCOL_FEATURES, EVENT_IDX, INDIRECT_DESC, FLUSH, CONFIG_WCE, MQ
            (
                code::SET_FEATURES,
                words(&[1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 9 | 1 << 11 | 1 << 12]),
                vec![],
            ),
            (code::SET_MEM_TABLE, table, vec![Sent::Kept(&has.memory)]),
            (code::SET_VRING_NUM, pair(0, 16), vec![]),
            (code::SET_VRING_BASE, pair(0, 0), vec![]),
            (code::SET_VRING_ADDR, ring, vec![]),
            (code::SET_VRING_CALL, words(&[0]), vec![event(code::SET_VRING_CALL)]),
            (code::SET_VRING_KICK, words(&[0]), vec![event(code::SET_VRING_KICK)]),
            (code::SET_VRING_ENABLE, pair(0, 1), vec![]),
        ];
        let count = usize::from(self.input.u8()) % (messages.len() * 4);
        let count = count.min(messages.len());
        // After the memory's table.
        let (before, after) = messages[..count].split_at(count.min(6));
        for (code, body, files) in before.iter().chain(&tracks).chain(after) {
            send(socket, *code, 1, body.len() as u32, body, files);
        }
        count + tracks.iter().len()
    }

    fn user(&mut self) -> u64 {
        match self.input.u8() % 4 {
            0 => self.input.edgy(),
            1 => USER.wrapping_add(self.input.edgy()),
            _ => USER + self.input.below(MEMORY / 16) * 16,
        }
    }

    fn region(&mut self) -> Vec<u8> {
        let plain = !self.input.one_in(4);
        let page = self.input.below(16) * 4096;
        let words = if plain {
            [page, self.input.pick(&[4096, MEMORY, MEMORY - page, 1, 0x1800]), USER + page, 0]
        } else {
            [(); 4].map(|()| self.input.edgy())
        };
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn body(&mut self, code: u32) -> Vec<u8> {
        if self.input.one_in(16) {
            let len = usize::from(self.input.u16()) % 4200;
            return self.input.bytes(len).to_vec();
        }
        let index = if self.input.one_in(8) {
            self.input.edgy() as u32
        } else {
            self.input.below(u64::from(QUEUES) + 1) as u32
        };
        let pair = |a: u32, b: u32| [a.to_le_bytes(), b.to_le_bytes()].concat();
        match code {
            code::SET_MEM_TABLE => {
                let count = self.input.below(10) as u32;
                let announced = if self.input.one_in(8) { self.input.u32() } else { count };
                let mut body = pair(announced, 0);
                for _ in 0..count {
                    body.extend(self.region());
                }
                body
            }
            code::SET_LOG_BASE => {
                let size = self.input.pick(&[MEMORY, 0x1000, 1, 0, 1 << 40, u64::MAX]);
                let offset = self.input.pick(&[0, 0, 0x1000, 1, MEMORY, u64::MAX]);
                [size, offset].map(u64::to_le_bytes).concat()
            }
            code::SET_FEATURES => {
                // As in the beginning, with the log and without, or anything.
                let usual = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 9 | 1 << 11 | 1 << 12;
                let features = match self.input.u8() % 4 {
                    0 => self.input.u64(),
                    1 => usual,
                    _ => usual | 1 << 26,
                };
                features.to_le_bytes().to_vec()
            }
            code::ADD_MEM_REG | code::REM_MEM_REG => [vec![0; 8], self.region()].concat(),
            code::SET_VRING_NUM => {
                let num = self.input.pick(&[16, 1, 1024, 2048, 0, 3, u32::MAX, 0x1_0010]);
                pair(index, num)
            }
            code::SET_VRING_ADDR => {
                let flags = if self.input.one_in(8) { self.input.u32() } else { 0 };
                let mut body = pair(index, flags);
                for _ in 0..4 {
                    body.extend(self.user().to_le_bytes());
                }
                body
            }
            code::SET_VRING_BASE | code::GET_VRING_BASE | code::SET_VRING_ENABLE => {
                let value =
                    if self.input.one_in(4) { self.input.u32() } else { u32::from(index == 0) };
                pair(index, value)
            }
            code::SET_VRING_KICK | code::SET_VRING_CALL | code::SET_VRING_ERR => {
                let none = if self.input.one_in(4) { 0x100 } else { 0 };
                (u64::from(index) | none).to_le_bytes().to_vec()
            }
            code::GET_CONFIG | code::SET_CONFIG => {
                let offset = self.input.pick(&[0, 32, 0x100, 0x120, 255, 256, u32::MAX]);
                let size = self.input.pick(&[1, 60, 256, 0, 255, 4096, u32::MAX]);
                let payload = self.input.pick(&[size, 1, 0]).min(4000) as usize;
                let fill = self.input.u8() % 3;
                let head = [offset, size, self.input.u32() % 3].map(u32::to_le_bytes).concat();
                [head, vec![fill; payload]].concat()
            }
            code::GET_INFLIGHT_FD | code::SET_INFLIGHT_FD => {
                let size = self.input.pick(&[0x1000, MEMORY, 0x240, 1, 0, 1 << 40, u64::MAX]);
                let offset = self.input.pick(&[0, 0, 0x1000, 1, MEMORY, u64::MAX]);
                let queues = self.input.pick(&[1u16, QUEUES, 0, 4, 0xffff]);
                let entries = self.input.pick(&[16u16, 1, 0, 3, 1024, 0xffff]);
                let words = [size, offset].map(u64::to_le_bytes).concat();
                let halves = [queues, entries, 0, 0].map(u16::to_le_bytes).concat();
                [words, halves].concat()
            }
            _ => self.input.edgy().to_le_bytes().to_vec(),
        }
    }

    /// The descriptors that go with a message: as many and of the kind that it wants, or not.
    fn files<'h>(&mut self, code: u32, body: &[u8], has: &'h Belongings) -> Vec<Sent<'h>> {
        let right = match code {
            code::SET_MEM_TABLE => usize::from(body.first().copied().unwrap_or(0)),
            code::SET_VRING_KICK | code::SET_VRING_CALL | code::SET_VRING_ERR => {
                usize::from(body.get(1).is_none_or(|none| none & 1 == 0))
            }
            code::SET_LOG_BASE | code::SET_LOG_FD => 1,
            code::ADD_MEM_REG | code::SET_INFLIGHT_FD | code::SET_BACKEND_REQ_FD => 1,
            _ => 0,
        };
        let count =
            if self.input.one_in(16) { self.input.below(34) as usize } else { right.min(33) };
        (0..count).map(|_| self.file(code, has)).collect()
    }

    /// Memory as the daemon hands it out to track requests in, with anything in it: for up to four
    /// queues of 16 entries.
    fn kept(&mut self) -> File {
        let kept = memory_file(MEMORY);
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;
        // SAFETY: integers are all that the call takes.
        let sealed = unsafe { libc::fcntl(kept.as_raw_fd(), libc::F_ADD_SEALS, seals) };
        assert_eq!(sealed, 0, "{}", std::io::Error::last_os_error());
        let mut bytes = [0; 4 * KEPT as usize];
        for queue in bytes.chunks_mut(KEPT as usize) {
            let [last, used] = [(); 2].map(|()| self.input.u8() % 17);
            let header = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 16, 0, last, 0, used % 3, 0];
            queue[..16].copy_from_slice(&header);
            for _ in 0..self.input.below(4) {
                let (entry, mark) = (self.input.below(17) as usize, self.input.u8() % 3);
                let [next, counter] = [(); 2].map(|()| self.input.u8() % 17);
                queue[16 + entry * 16..][..9]
                    .copy_from_slice(&[mark, 0, 0, 0, 0, 0, next, 0, counter]);
            }
        }
        kept.write_all_at(&bytes, 0).expect("room in memory");
        kept
    }

    fn file<'h>(&mut self, code: u32, has: &'h Belongings) -> Sent<'h> {
        let strange = self.input.one_in(8);
        let eventful =
            matches!(code, code::SET_VRING_KICK | code::SET_VRING_CALL | code::SET_VRING_ERR);
        if !strange && eventful {
            return Sent::Kept(has.event(code));
        }
        Sent::New(match code {
            code::SET_BACKEND_REQ_FD if !strange => {
                UnixStream::pair().expect("a pair of sockets").0.into()
            }
            code::SET_INFLIGHT_FD | code::SET_LOG_BASE if !strange => self.kept().into(),
            _ if !strange => return Sent::Kept(&has.memory),
            _ => match self.input.u8() % 6 {
                0 => {
                    // One that blocks, and would at the next word: it is full.
                    let event = EventFd::new(0).expect("an eventfd");
                    event.write(u64::MAX - 1).expect("it was empty");
                    file(event).into()
                }
                1 => return Sent::Kept(&has.memory),
                2 => File::open("/dev/zero").expect("a device").into(),
                3 => File::open("/proc/self/fd").expect("a folder").into(),
                4 => UnixStream::pair().expect("a pair of sockets").0.into(),
                _ => memory_file(self.input.below(3) * 2048).into(),
            },
        })
    }
}

fn file(event: EventFd) -> File {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the descriptor is taken from its only owner.
    unsafe { File::from_raw_fd(event.into_raw_fd()) }
}

/// False if the socket takes no more.
fn send(
    socket: &UnixStream,
    code: u32,
    flags: u32,
    size: u32,
    body: &[u8],
    files: &[Sent<'_>],
) -> bool {
    let header = [code, flags, size].map(u32::to_le_bytes).concat();
    let fds: Vec<RawFd> = files.iter().map(Sent::raw).collect();
    // As one piece: that is how descriptors belong to their message.
    let message = [&header, body].concat();
    matches!(socket.send_with_fds(&[&message[..]], &fds), Ok(n) if n == message.len())
}
