//! The device behind the fake: its registers, its view of memory, its queues.

mod memory;

use super::media::{Media, MediaKind};
use super::rogue::Rogue;
use super::{Broken, Config, Counts, Event, Fault};
use crate::Error;
use crate::dma::HostRange;
use crate::sgl;
use crate::spec::command::{CQE, RANGE, SQE};
use crate::spec::registers::{self, ENABLE, FATAL, READY};
use crate::spec::{Command, Completion, IoOpcode, Status};
use std::collections::VecDeque;
use vmm_sys_util::eventfd::EventFd;

/// Complaints kept at most.
const COMPLAINTS: usize = 64;

pub struct Device {
    pub config: Config,
    pub media: Vec<Media>,
    pub broken: Broken,
    pub holding: bool,
    pub held: VecDeque<Held>,
    pub faults: Vec<Fault>,
    pub rogue: Option<Rogue>,
    pub events: Vec<Event>,
    pub counts: Counts,
    pub complaints: Vec<String>,
    pub bus_master: bool,
    pub mappings: Vec<(u64, HostRange)>,
    pub interrupts: Vec<EventFd>,
    configuration: u32,
    status: u32,
    admin_attributes: u32,
    admin_submissions: u64,
    admin_completions: u64,
    /// By identifier.
    pub submissions: Vec<Option<Submissions>>,
    pub completions: Vec<Option<Completions>>,
    /// Asynchronous event requests that wait.
    pub event_requests: Vec<u16>,
    /// Events that wait for a request; and whether the log page of the last was read.
    pub event_waiting: Option<u32>,
}

#[derive(Clone, Copy)]
pub struct Submissions {
    pub base: u64,
    pub entries: u32,
    pub head: u32,
    pub completions: u16,
}

pub struct Completions {
    pub base: u64,
    pub entries: u32,
    pub tail: u32,
    pub head: u32,
    pub phase: bool,
    pub vector: Option<u16>,
    /// Completions for which there was no room.
    pub waiting: VecDeque<Completion>,
}

/// A command that was fetched and not done.
pub struct Held {
    pub queue: u16,
    pub command: Command,
}

impl Device {
    pub fn new(config: Config) -> Device {
        Device {
            media: config.namespaces.clone(),
            broken: Broken::default(),
            holding: false,
            held: VecDeque::new(),
            faults: Vec::new(),
            rogue: None,
            events: Vec::new(),
            counts: Counts::default(),
            complaints: Vec::new(),
            bus_master: false,
            mappings: Vec::new(),
            interrupts: Vec::new(),
            configuration: 0,
            status: 0,
            admin_attributes: 0,
            admin_submissions: 0,
            admin_completions: 0,
            submissions: Vec::new(),
            completions: Vec::new(),
            event_requests: Vec::new(),
            event_waiting: None,
            config,
        }
    }

    pub fn complain(&mut self, what: impl Into<String>) {
        if self.complaints.len() < COMPLAINTS {
            self.complaints.push(what.into());
        }
    }

    // ---- Registers

    fn capabilities(&self) -> u64 {
        let config = &self.config;
        u64::from(config.max_entries - 1)
            | 1 << 16
            | u64::from(config.timeout) << 24
            | u64::from(config.doorbell_stride) << 32
            | 1 << 37
            | 1 << 43
            | u64::from(config.page_shift) << 48
            | u64::from(config.page_shift.max(4)) << 52
    }

    pub fn read(&mut self, offset: usize) -> u32 {
        if let Some(value) = self.broken.registers {
            return value;
        }
        let half = |value: u64, low: usize| (value >> if offset == low { 0 } else { 32 }) as u32;
        match offset {
            0x00 | 0x04 => half(self.capabilities(), registers::CAP),
            registers::VS => 0x0002_0000,
            registers::CC => self.configuration,
            registers::CSTS => self.status | if self.broken.fatal { FATAL } else { 0 },
            registers::AQA => self.admin_attributes,
            0x28 | 0x2c => half(self.admin_submissions, registers::ASQ),
            0x30 | 0x34 => half(self.admin_completions, registers::ACQ),
            _ => 0,
        }
    }

    pub fn write(&mut self, offset: usize, value: u32) {
        if self.broken.registers.is_some() {
            return;
        }
        let put = |place: &mut u64, low: usize| {
            *place = match offset == low {
                true => *place & !0xffff_ffff | u64::from(value),
                false => *place & 0xffff_ffff | u64::from(value) << 32,
            };
        };
        match offset {
            registers::CC => self.configure(value),
            registers::AQA => self.admin_attributes = value,
            0x28 | 0x2c => put(&mut self.admin_submissions, registers::ASQ),
            0x30 | 0x34 => put(&mut self.admin_completions, registers::ACQ),
            registers::DOORBELLS.. => self.doorbell(offset - registers::DOORBELLS, value),
            _ => self.complain(format!("register {offset:#x} written")),
        }
    }

    fn configure(&mut self, value: u32) {
        let before = std::mem::replace(&mut self.configuration, value);
        if value & registers::SHUTDOWN_MASK != 0 && before & registers::SHUTDOWN_MASK == 0 {
            self.events.push(Event::Shutdown);
            self.status |= registers::SHUTDOWN_COMPLETE;
        }
        match (before & ENABLE != 0, value & ENABLE != 0) {
            (false, true) => {
                self.events.push(Event::Enabled);
                if !self.bus_master {
                    self.complain("enabled without bus mastering");
                }
                if self.interrupts.is_empty() {
                    self.complain("enabled without interrupts");
                }
                let (submissions, completions) = (
                    (self.admin_attributes & 0xfff) + 1,
                    (self.admin_attributes >> 16 & 0xfff) + 1,
                );
                let admin = Submissions {
                    base: self.admin_submissions,
                    entries: submissions,
                    head: 0,
                    completions: 0,
                };
                self.submissions = vec![Some(admin)];
                self.completions =
                    vec![Some(Completions::new(self.admin_completions, completions, Some(0)))];
                if !self.broken.never_ready {
                    self.status |= READY;
                }
            }
            (true, false) => {
                self.events.push(Event::Disabled);
                if !self.broken.stays_ready {
                    self.reset_controller();
                }
            }
            _ => {}
        }
    }

    pub fn leave_running(&mut self) {
        self.bus_master = true;
        self.configure(registers::enabled(12, false));
    }

    fn reset_controller(&mut self) {
        self.status = 0;
        self.broken.fatal = false;
        self.submissions.clear();
        self.completions.clear();
        self.held.clear();
        self.event_requests.clear();
        self.event_waiting = None;
    }

    pub fn reset_function(&mut self) {
        self.reset_controller();
        self.configuration = 0;
        self.admin_attributes = 0;
        self.bus_master = false;
    }

    pub fn set_vectors(&mut self, events: Vec<EventFd>) {
        self.events.push(Event::Vectors(events.len()));
        self.interrupts = events;
    }

    fn doorbell(&mut self, offset: usize, value: u32) {
        let step = 4 << self.config.doorbell_stride;
        let (number, is_head) = (offset / step, offset / step % 2 == 1);
        let id = number / 2;
        if self.status & READY == 0 || !offset.is_multiple_of(step) {
            return self
                .complain(format!("doorbell {offset:#x} of a controller that is not ready"));
        }
        if is_head {
            self.counts.completion_doorbells += u64::from(id > 0);
            self.completion_doorbell(id, value);
        } else {
            self.counts.submission_doorbells += u64::from(id > 0);
            self.submission_doorbell(id, value);
        }
    }

    fn completion_doorbell(&mut self, id: usize, head: u32) {
        let Some(Some(queue)) = self.completions.get_mut(id) else {
            return self.complain(format!("doorbell of completion queue {id}, which is not there"));
        };
        if head >= queue.entries || head == queue.head {
            return self.complain(format!("head {head} of completion queue {id}"));
        }
        queue.head = head;
        let waiting = std::mem::take(&mut queue.waiting);
        for completion in waiting {
            self.post(id, completion);
        }
    }

    fn submission_doorbell(&mut self, id: usize, tail: u32) {
        loop {
            let Some(Some(queue)) = self.submissions.get_mut(id) else {
                return self
                    .complain(format!("doorbell of submission queue {id}, which is not there"));
            };
            if tail >= queue.entries {
                return self.complain(format!("tail {tail} of submission queue {id}"));
            }
            if queue.head == tail {
                return;
            }
            let at = queue.base + u64::from(queue.head) * SQE as u64;
            queue.head = (queue.head + 1) % queue.entries;
            let Some(entry) = self.reach(at, SQE) else { return };
            let mut bytes = [0; SQE];
            entry.read(0, &mut bytes);
            let mut words = [0; 8];
            for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
                *word = bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
            }
            self.fetched(id as u16, Command(words));
        }
    }

    fn fetched(&mut self, queue: u16, command: Command) {
        if self.held.iter().any(|held| (held.queue, held.command.id()) == (queue, command.id())) {
            self.complain(format!("identifier {} of queue {queue} is in use", command.id()));
            return self.complete(queue, &command, Status::ID_CONFLICT, 0);
        }
        if queue == 0 {
            self.events.push(Event::Admin(command.opcode()));
            return self.admin_command(command);
        }
        self.counts.commands += 1;
        if self.holding || self.rogue.is_some() {
            self.held.push_back(Held { queue, command });
        } else {
            self.run(queue, command);
        }
        if let Some(mut rogue) = self.rogue.take() {
            rogue.act(self);
            if rogue.is_over() {
                while !self.holding && self.release_one(0) {}
            } else {
                self.rogue = Some(rogue);
            }
        }
    }

    pub fn release_one(&mut self, n: usize) -> bool {
        if self.held.is_empty() {
            return false;
        }
        let at = n % self.held.len();
        if let Some(Held { queue, command }) = self.held.remove(at) {
            self.run(queue, command);
        }
        true
    }

    /// Does an I/O command and completes it.
    pub fn run(&mut self, queue: u16, command: Command) {
        let status = match self.fault(&command) {
            Some(status) => status,
            None => self.io(&command),
        };
        self.complete(queue, &command, status, 0);
    }

    fn fault(&mut self, command: &Command) -> Option<Status> {
        let touched = command.lba()..command.lba() + u64::from(command.blocks());
        let fault = self.faults.iter_mut().find(|fault| {
            fault.times > 0
                && fault.opcode.is_none_or(|opcode| opcode == command.opcode())
                && fault
                    .blocks
                    .as_ref()
                    .is_none_or(|blocks| touched.start < blocks.end && blocks.start < touched.end)
        })?;
        fault.times -= 1;
        Some(fault.status)
    }

    pub fn media(&mut self, namespace: u32) -> Option<&mut Media> {
        self.media.get_mut((namespace as usize).checked_sub(1)?)
    }

    pub fn bytes(&mut self, namespace: u32, at: usize, len: usize) -> Vec<u8> {
        let part = self.media(namespace).and_then(|media| media.part(at, len));
        part.map(|part| part.to_vec()).unwrap_or_default()
    }

    fn io(&mut self, command: &Command) -> Status {
        const WRITE: u8 = IoOpcode::Write as u8;
        const READ: u8 = IoOpcode::Read as u8;
        const DISCARD: u8 = IoOpcode::DatasetManagement as u8;
        let Some(media) = self.media(command.namespace()) else {
            return Status::INVALID_NAMESPACE;
        };
        match command.opcode() {
            WRITE | READ => {
                let (at, len) = match media.range(command) {
                    Ok(range) => range,
                    Err(status) => return status,
                };
                if matches!(media.kind, MediaKind::Null) {
                    return Status::SUCCESS;
                }
                let smallest = 4096 << self.config.page_shift;
                if self.config.mdts > 0 && len > smallest << self.config.mdts {
                    self.complain(format!("a transfer of {len} bytes, more than MDTS"));
                    return Status::INVALID_FIELD;
                }
                let pieces = match self.pieces(command, len) {
                    Ok(pieces) => pieces,
                    Err(status) => return status,
                };
                let Some(bytes) = self.media(command.namespace()).and_then(|m| m.part(at, len))
                else {
                    return Status::INTERNAL;
                };
                let mut done = 0;
                for piece in pieces {
                    let part = &mut bytes[done..done + piece.len()];
                    done += piece.len();
                    if command.opcode() == READ {
                        piece.write(0, part)
                    } else {
                        piece.read(0, part)
                    };
                }
                Status::SUCCESS
            }
            DISCARD => {
                let len = ((command.dword(10) & 0xff) as usize + 1) * RANGE;
                let mut ranges = Vec::new();
                match self.pieces(command, len) {
                    Ok(pieces) => {
                        for piece in pieces {
                            let mut bytes = vec![0; piece.len()];
                            piece.read(0, &mut bytes);
                            ranges.extend(bytes);
                        }
                    }
                    Err(status) => return status,
                }
                let media = self.media(command.namespace());
                media.map_or(Status::INVALID_NAMESPACE, |media| media.deallocate(&ranges))
            }
            _ => media.run(command),
        }
    }

    /// Completes a command of a queue that is still there.
    pub fn complete(&mut self, queue: u16, command: &Command, status: Status, result: u32) {
        let Some(&Some(submissions)) = self.submissions.get(usize::from(queue)) else { return };
        let head = submissions.head as u16;
        let id = command.id();
        let completion = Completion { result, head, queue, id, phase: false, status };
        self.post(usize::from(submissions.completions), completion);
    }

    /// Writes a completion, or keeps it until there is room.
    pub fn post(&mut self, id: usize, completion: Completion) {
        let Some(Some(queue)) = self.completions.get_mut(id) else { return };
        let next = (queue.tail + 1) % queue.entries;
        if next == queue.head {
            return queue.waiting.push_back(completion);
        }
        let (at, phase) = (queue.base + u64::from(queue.tail) * CQE as u64, queue.phase);
        queue.tail = next;
        if next == 0 {
            queue.phase = !queue.phase;
        }
        let vector = queue.vector;
        let Some(entry) = self.reach(at, CQE) else { return };
        let dwords = Completion { phase, ..completion }.dwords();
        for (n, dword) in dwords.into_iter().enumerate() {
            entry.store(n * 4, dword);
        }
        if let Some(event) = vector.and_then(|vector| self.interrupts.get(usize::from(vector))) {
            self.counts.interrupts += 1;
            let _ = event.write(1);
        }
    }

    /// Whether a completion would be written at once.
    pub fn has_room(&self, id: usize) -> bool {
        let queue = self.completions.get(id).and_then(Option::as_ref);
        queue.is_some_and(|queue| (queue.tail + 1) % queue.entries != queue.head)
    }

    pub fn resize(&mut self, namespace: u32, blocks: u64) {
        if let Some(media) = self.media(namespace) {
            media.set_blocks(blocks);
        }
        // Notice, namespace attribute changed, log page 4.
        self.raise_event(2 | 4 << 16);
    }
}

impl Completions {
    pub fn new(base: u64, entries: u32, vector: Option<u16>) -> Completions {
        Completions {
            base,
            entries,
            tail: 0,
            head: 0,
            phase: true,
            vector,
            waiting: VecDeque::new(),
        }
    }
}
