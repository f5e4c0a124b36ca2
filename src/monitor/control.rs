//! The loop that serves all monitors of a process until it is to end.

use super::chardev::{Chardev, Endpoint, MonitorOptions};
use super::poll::{Polled, accept, poll, polled};
use super::session::{Session, Step};
use super::{commands, events};
use crate::block::Error;
use crate::io::descriptors;
use crate::options::{Map, Value};
use crate::sandbox;
use crate::service::Service;
use libc::{POLLERR, POLLHUP, POLLIN, POLLNVAL, POLLOUT};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long clients are given to read what was said last.
const FAREWELL: Duration = Duration::from_secs(1);

/// Milliseconds between two looks at commands that are under way, and at monitors that pause.
const LOOK: i32 = 10;

/// How long a monitor accepts no client after one could not be.
const PAUSE: Duration = Duration::from_millis(100);

/// All monitors of a process, and the character devices that they may be put on.
#[derive(Default)]
pub struct Control {
    chardevs: Vec<Chardev>,
    monitors: Vec<Monitor>,
}

struct Monitor {
    chardev: Chardev,
    pretty: bool,
    /// One at a time; others wait in the socket's queue.
    client: Option<Client>,
    /// No client is accepted before: the last could not be.
    paused_until: Option<Instant>,
}

struct Client {
    stream: File,
    session: Session,
    /// Nothing more will come from the client.
    ended: bool,
}

impl Control {
    /// `--chardev`: opens a character device. With `wait=on`, returns when a client has connected.
    /// `stop` is readable when the program is to end.
    pub fn add_chardev(&mut self, text: &str, stop: RawFd) -> Result<(), Error> {
        let mut chardev = Chardev::open(text, stop)?;
        let id = &chardev.id;
        let mut taken = self.chardevs.iter().chain(self.monitors.iter().map(|m| &m.chardev));
        if taken.any(|other| other.id == *id) {
            return Err(Error::new(format!("Chardev with id '{id}' already exists")));
        }
        if let (true, Endpoint::Listening(listener)) = (chardev.wait, &chardev.endpoint) {
            log::warn!("waiting for a connection to the character device '{id}'");
            let mut fds = [polled(listener.as_raw_fd(), POLLIN), polled(stop, POLLIN)];
            poll(&mut fds, -1);
            if fds[0].revents & POLLIN == 0 {
                return Err(Error::new("ended by a signal before a client has connected"));
            }
            chardev.wait = false;
        }
        self.chardevs.push(chardev);
        Ok(())
    }

    /// `--monitor`: serves QMP on a character device.
    pub fn add_monitor(&mut self, options: Map) -> Result<(), Error> {
        let MonitorOptions { chardev: id, pretty, .. } = MonitorOptions::read(options)?;
        let shown = id.escape_debug();
        if self.monitors.iter().any(|monitor| monitor.chardev.id == id) {
            return Err(Error::new(format!("Device '{shown}' is in use")));
        }
        let found = self.chardevs.iter().position(|chardev| chardev.id == id);
        let index = found.ok_or_else(|| Error::new(format!("chardev \"{shown}\" not found")))?;
        let chardev = self.chardevs.remove(index);
        self.monitors.push(Monitor { chardev, pretty, client: None, paused_until: None });
        Ok(())
    }

    pub fn has_monitors(&self) -> bool {
        !self.monitors.is_empty()
    }

    /// The socket files that are ours to remove.
    pub fn sockets(&self) -> impl Iterator<Item = &Path> {
        let monitors = self.monitors.iter().map(|monitor| &monitor.chardev);
        self.chardevs.iter().chain(monitors).filter_map(Chardev::socket_file)
    }

    /// Serves until `stop` is readable or a client asks the process to end.
    pub fn serve(&mut self, service: &mut Service, stop: RawFd) {
        // Not on this thread, which other clients need.
        service.wait_for_locks(None);
        loop {
            let mut fds = vec![polled(stop, POLLIN), polled(service.ended_notice(), POLLIN)];
            fds.extend(self.monitors.iter_mut().map(Monitor::poll));
            let busy = self.monitors.iter().any(Monitor::has_work);
            let waiting = self.monitors.iter().any(Monitor::is_waiting);
            poll(
                &mut fds,
                if busy {
                    0
                } else if waiting {
                    LOOK
                } else {
                    -1
                },
            );
            if fds[0].revents != 0 {
                return;
            }
            for id in service.take_ended() {
                self.tell_export_deleted(&id);
            }
            sandbox::tell_refused();
            for error in service.take_io_errors() {
                self.tell("BLOCK_IO_ERROR", &commands::block_io_error(error));
            }
            for notice in service.take_notices() {
                let (event, data) = events::of_notice(notice);
                self.tell(event, &data);
            }
            for (index, polled) in fds[2..].iter().enumerate() {
                self.monitors[index].transfer(polled.revents);
                // One request of each in turn.
                let client = self.monitors[index].client.as_mut();
                let answer = client.and_then(|client| client.session.step(service));
                for id in service.take_ended() {
                    self.tell_export_deleted(&id);
                }
                let mut quit = false;
                if let (Some((reply, step)), Some(client)) =
                    (answer, &mut self.monitors[index].client)
                {
                    client.session.reply(reply);
                    quit = step == Step::Quit;
                }
                self.monitors[index].send();
                if quit {
                    return;
                }
            }
        }
    }

    /// Ends the exports, tells the clients, and gives them a moment to read it.
    pub fn finish(mut self, service: &mut Service) {
        for id in service.end_exports() {
            self.tell_export_deleted(&id);
        }
        let end = Instant::now() + FAREWELL;
        loop {
            self.monitors.iter_mut().for_each(Monitor::send);
            let unread = self.monitors.iter().filter_map(|monitor| monitor.client.as_ref());
            let unread = unread.filter(|client| !client.session.output().is_empty());
            let mut fds: Vec<_> =
                unread.map(|client| polled(client.stream.as_raw_fd(), POLLOUT)).collect();
            let left = end.saturating_duration_since(Instant::now());
            if fds.is_empty() || left.is_zero() {
                return;
            }
            poll(&mut fds, left.as_millis() as i32 + 1);
        }
    }

    fn tell_export_deleted(&mut self, id: &str) {
        self.tell("BLOCK_EXPORT_DELETED", &commands::object([("id", Value::from(id))]));
    }

    fn tell(&mut self, event: &str, data: &Value) {
        let clients = self.monitors.iter_mut().filter_map(|monitor| monitor.client.as_mut());
        for client in clients {
            client.session.event(event, data.clone());
        }
    }
}

impl Monitor {
    /// What to wait for.
    fn poll(&mut self) -> Polled {
        let pretty = self.pretty;
        let client = |stream: File| Client { stream, session: Session::new(pretty), ended: false };
        if self.client.is_none()
            && let Endpoint::Connected(stream) = &mut self.chardev.endpoint
            && let Some(stream) = stream.take()
        {
            self.client = Some(client(File::from(stream)));
        }
        self.paused_until = self.paused_until.filter(|until| *until > Instant::now());
        match (&self.client, &self.chardev.endpoint) {
            // It has gone, and one of its commands is still under way.
            (Some(Client { session, ended: true, .. }), _) if session.output().is_empty() => {
                polled(-1, 0)
            }
            (Some(Client { stream, session, ended }), _) => {
                let mut events = 0;
                if session.wants_input() && !ended {
                    events |= POLLIN;
                }
                if !session.output().is_empty() {
                    events |= POLLOUT;
                }
                polled(stream.as_raw_fd(), events)
            }
            (None, Endpoint::Listening(listener)) if self.paused_until.is_none() => {
                polled(listener.as_raw_fd(), POLLIN)
            }
            // Not waited on at all.
            (None, _) => polled(-1, 0),
        }
    }

    fn has_work(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.session.has_work())
    }

    /// Whether it is to be looked at again soon.
    fn is_waiting(&self) -> bool {
        let waits = self.client.as_ref().is_some_and(|client| client.session.is_waiting());
        waits || self.paused_until.is_some()
    }

    /// Does what the descriptor is ready for.
    fn transfer(&mut self, ready: libc::c_short) {
        if ready == 0 {
            return;
        }
        let Some(client) = &mut self.client else {
            let Endpoint::Listening(listener) = &self.chardev.endpoint else { return };
            match accept(listener.as_fd()) {
                Ok(stream) => {
                    let (stream, session) = (File::from(stream), Session::new(self.pretty));
                    self.client = Some(Client { stream, session, ended: false });
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => {
                    let why = descriptors::explain(&error);
                    log::error!("monitor '{}': accept: {why}", self.chardev.id);
                    // Out of descriptors, most likely: do not spin on it.
                    self.paused_until = Some(Instant::now() + PAUSE);
                }
            }
            return;
        };
        let gone = ready & POLLHUP != 0 && ready & POLLIN == 0 && !client.session.has_input();
        if ready & (POLLERR | POLLNVAL) != 0 || gone {
            self.client = None;
            return;
        }
        client.ended |= ready & POLLHUP != 0 && ready & POLLIN == 0;
        if ready & POLLIN != 0 {
            let mut buffer = [0; 4096];
            match client.stream.read(&mut buffer) {
                Ok(0) => client.ended = true,
                Ok(n) => client.session.receive(&buffer[..n]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(_) => self.client = None,
            }
        }
    }

    /// Sends what there is room for, and lets a client go that has gone, or does not read.
    fn send(&mut self) {
        let Some(client) = &mut self.client else { return };
        while !client.session.output().is_empty() {
            match client.stream.write(client.session.output()) {
                Ok(n) => client.session.sent(n),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.client = None;
                    return;
                }
            }
        }
        if client.session.is_overrun() {
            log::warn!("monitor '{}': the client does not read: cut off", self.chardev.id);
            self.client = None;
        } else if client.ended
            && !client.session.has_input()
            && !client.session.is_waiting()
            && client.session.output().is_empty()
        {
            self.client = None;
        }
    }
}
