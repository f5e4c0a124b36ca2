//! The loop that serves all monitors of a process until the process ends.

use super::chardev::{Chardev, Endpoint, MonitorOptions};
use super::poll::{Polled, accept, poll, polled};
use super::reply::object;
use super::session::{Session, Step};
use super::{commands, events, jobs};
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

/// The time that clients get to read the last messages.
const FAREWELL: Duration = Duration::from_secs(1);

/// The pause after a client could not be accepted.
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
    /// No client is accepted before this time, because the last one failed.
    paused_until: Option<Instant>,
}

struct Client {
    stream: File,
    session: Session,
    /// Nothing more will come from the client.
    ended: bool,
}

impl Control {
    /// `--chardev`: adds a character device. With `wait=on`, returns when a client has connected.
    /// `stop` is readable when the program is to end.
    pub fn add_chardev(&mut self, mut chardev: Chardev, stop: RawFd) -> Result<(), Error> {
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
    pub fn serve(&mut self, service: &Service, stop: RawFd) {
        // A monitor's client gets an error at once if a lock is held.
        service.wait_for_locks(None);
        loop {
            let mut fds: Vec<_> = [stop, service.events_descriptor(), service.tasks_descriptor()]
                .map(|fd| polled(fd, POLLIN))
                .into();
            fds.extend(self.monitors.iter_mut().map(Monitor::poll));
            poll(&mut fds, self.timeout());
            if fds[0].revents != 0 {
                return;
            }
            service.clear_tasks_event();
            self.send_events(service);
            for (index, polled) in fds[3..].iter().enumerate() {
                self.monitors[index].transfer(polled.revents);
                // One request of each client, round robin.
                if self.step(index, service) == Some(Step::Quit) {
                    return;
                }
            }
            let now = Instant::now();
            if self.sessions().filter_map(Session::quit_due).any(|due| due <= now) {
                return;
            }
        }
    }

    /// Milliseconds until work without a descriptor is due; -1: never.
    fn timeout(&self) -> i32 {
        if self.sessions().any(Session::has_work) {
            return 0;
        }
        let pauses = self.monitors.iter().filter_map(|monitor| monitor.paused_until);
        match pauses.chain(self.sessions().filter_map(Session::quit_due)).min() {
            Some(due) => milliseconds_until(due),
            None => -1,
        }
    }

    fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.monitors.iter().filter_map(|monitor| monitor.client.as_ref()).map(|it| &it.session)
    }

    /// Handles the next request of a client, or replies to the one under way.
    fn step(&mut self, index: usize, service: &Service) -> Option<Step> {
        let client = self.monitors[index].client.as_mut();
        let answer = client.and_then(|client| client.session.step(service));
        // The events that a request has caused come before its reply.
        self.tell_changes(service);
        let monitor = &mut self.monitors[index];
        let step = answer.map(|(reply, step)| {
            if let Some(client) = &mut monitor.client {
                client.session.reply(reply);
            }
            step
        });
        monitor.send();
        step
    }

    fn send_events(&mut self, service: &Service) {
        self.tell_changes(service);
        sandbox::report_refused();
        for error in service.take_io_errors() {
            self.send_event("BLOCK_IO_ERROR", &commands::block_io_error(error));
        }
        for notice in service.take_notices() {
            let (event, data) = events::of_notice(notice);
            self.send_event(event, &data);
        }
    }

    /// Reports events.
    fn tell_changes(&mut self, service: &Service) {
        self.tell_ended(service);
        for (id, status) in service.jobs().take_events() {
            self.send_event("JOB_STATUS_CHANGE", &jobs::status_change(id, status));
        }
    }

    fn tell_ended(&mut self, service: &Service) {
        for id in service.take_ended() {
            self.send_event("BLOCK_EXPORT_DELETED", &object([("id", Value::from(id))]));
        }
    }

    /// Ends the exports, reports each end to the clients, and gives them a moment to read it.
    pub fn finish(mut self, service: &Service) {
        let exports = service.end_exports();
        let mut end = None;
        loop {
            service.clear_tasks_event();
            // Checked first, so that the last events are there.
            if end.is_none() && exports.take().is_some() {
                end = Some(Instant::now() + FAREWELL);
            }
            self.send_events(service);
            for index in 0..self.monitors.len() {
                self.finish_commands(index, service);
            }
            let timeout = end.map_or(-1, milliseconds_until);
            let is_done =
                self.sessions().all(|session| session.output().is_empty() && !session.is_waiting());
            if end.is_some() && (is_done || timeout == 0) {
                return;
            }
            let notices = [service.events_descriptor(), service.tasks_descriptor()];
            let mut fds: Vec<_> = notices.map(|fd| polled(fd, POLLIN)).into();
            let clients = self.monitors.iter().filter_map(|monitor| monitor.client.as_ref());
            let unread = clients.filter(|client| !client.session.output().is_empty());
            fds.extend(unread.map(|client| polled(client.stream.as_raw_fd(), POLLOUT)));
            poll(&mut fds, timeout);
        }
    }

    /// Replies to the command under way if it has ended, and continues until the client's `quit`, if it has sent one.
    fn finish_commands(&mut self, index: usize, service: &Service) {
        loop {
            let client = self.monitors[index].client.as_ref();
            let goes_on = client.is_some_and(|client| {
                client.session.is_waiting() || client.session.has_quit_ahead()
            });
            if !goes_on || self.step(index, service).is_none() {
                return self.monitors[index].send();
            }
        }
    }

    fn send_event(&mut self, event: &str, data: &Value) {
        let clients = self.monitors.iter_mut().filter_map(|monitor| monitor.client.as_mut());
        for client in clients {
            client.session.event(event, data.clone());
        }
    }
}

fn milliseconds_until(due: Instant) -> i32 {
    let left = due.saturating_duration_since(Instant::now());
    if left.is_zero() { 0 } else { left.as_millis() as i32 + 1 }
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
