//! The fake controller's admin commands.

use super::Event;
use super::device::{Completions, Device, Submissions};
use crate::spec::identify::{LEN, cns};
use crate::spec::{AdminOpcode, Command, Status, feature, log_page};

/// What is answered: a status and dword 0; `None` for later or never.
type Answer = Option<(Status, u32)>;

impl Device {
    pub fn admin_command(&mut self, command: Command) {
        if self.broken.mute_admin {
            return;
        }
        if let Some((status, result)) = self.answer(&command) {
            self.complete(0, &command, status, result);
        }
    }

    fn answer(&mut self, command: &Command) -> Answer {
        let is = |opcode: AdminOpcode| opcode as u8 == command.opcode();
        let plain = |status: Status| Some((status, 0));
        if is(AdminOpcode::Identify) {
            return plain(self.identify(command));
        }
        if is(AdminOpcode::CreateCompletionQueue) {
            return plain(self.create_completions(command));
        }
        if is(AdminOpcode::CreateSubmissionQueue) {
            return plain(self.create_submissions(command));
        }
        if is(AdminOpcode::DeleteSubmissionQueue) {
            return plain(self.delete_submissions(command.dword(10) as usize));
        }
        if is(AdminOpcode::DeleteCompletionQueue) {
            return plain(self.delete_completions(command.dword(10) as usize));
        }
        if is(AdminOpcode::SetFeatures) || is(AdminOpcode::GetFeatures) {
            return Some(self.feature(command));
        }
        if is(AdminOpcode::Abort) {
            return Some(self.abort(command.dword(10)));
        }
        if is(AdminOpcode::GetLogPage) {
            return plain(self.log_page(command));
        }
        if is(AdminOpcode::AsyncEvent) {
            if self.event_requests.len() >= 4 {
                return plain(Status::EVENT_LIMIT);
            }
            self.event_requests.push(command.id());
            self.send_event();
            return None;
        }
        plain(Status::INVALID_OPCODE)
    }

    fn identify(&mut self, command: &Command) -> Status {
        let mut data = vec![0; LEN];
        let mut put = |at: usize, bytes: &[u8]| data[at..at + bytes.len()].copy_from_slice(bytes);
        let config = &self.config;
        match command.dword(10) & 0xff {
            cns::CONTROLLER => {
                put(0, &0x1b36u16.to_le_bytes());
                put(4, format!("{:<20.20}", config.serial).as_bytes());
                put(24, format!("{:<40}", "Fake NVMe").as_bytes());
                put(64, b"1       ");
                put(77, &[config.mdts]);
                put(80, &0x0002_0000u32.to_le_bytes());
                put(92, &(1u32 << 8).to_le_bytes());
                put(258, &[3, 3]);
                put(262, &[63]);
                put(512, &[0x66, 0x44]);
                put(516, &(self.media.len() as u32).to_le_bytes());
                put(520, &config.optional_commands.to_le_bytes());
                put(525, &[u8::from(config.write_cache)]);
                put(536, &config.sgls.to_le_bytes());
            }
            cns::NAMESPACE => {
                let Some(media) = self.media.get(command.namespace().wrapping_sub(1) as usize)
                else {
                    return Status::INVALID_NAMESPACE;
                };
                put(0, &media.blocks.to_le_bytes());
                put(8, &media.blocks.to_le_bytes());
                // Deallocated blocks read as zeroes, and Write Zeroes deallocates.
                put(33, &[1 | 1 << 3]);
                put(128, &(u32::from(media.metadata) | media.block_shift << 16).to_le_bytes());
            }
            cns::ACTIVE_NAMESPACES => {
                let there = self.media.iter().zip(1u32..).filter(|(media, _)| media.blocks > 0);
                let more = there.map(|(_, id)| id).filter(|&id| id > command.namespace());
                for (id, at) in more.zip((0..LEN).step_by(4)) {
                    put(at, &id.to_le_bytes());
                }
            }
            cns::NAMESPACE_DESCRIPTORS => {
                let Some(media) = self.media.get(command.namespace().wrapping_sub(1) as usize)
                else {
                    return Status::INVALID_NAMESPACE;
                };
                put(0, &[3, 16]);
                put(20, &[4, 1, 0, 0, media.set]);
            }
            cns::CONTROLLER_OF_SET => {
                let Some((write_zeroes, range_blocks)) = config.limits else {
                    return Status::INVALID_FIELD;
                };
                put(1, &[write_zeroes]);
                put(4, &range_blocks.to_le_bytes());
            }
            _ => return Status::INVALID_FIELD,
        }
        self.give(command, &data)
    }

    fn create_completions(&mut self, command: &Command) -> Status {
        let (id, entries) = queue(command);
        let vector = command.dword(11) >> 16;
        if id == 0 || id > usize::from(self.config.pairs) {
            return Status::INVALID_QUEUE_ID;
        }
        if entries < 2 || entries > self.config.max_entries {
            return Status::INVALID_QUEUE_SIZE;
        }
        if command.dword(11) & 1 == 0 || !command.0[3].is_multiple_of(4096) {
            return Status::INVALID_FIELD;
        }
        if id >= self.completions.len() {
            self.completions.resize_with(id + 1, || None);
        }
        if self.completions[id].is_some() {
            return Status::INVALID_QUEUE_ID;
        }
        let vector = (command.dword(11) & 2 != 0).then_some(vector as u16);
        self.completions[id] = Some(Completions::new(command.0[3], entries, vector));
        Status::SUCCESS
    }

    fn create_submissions(&mut self, command: &Command) -> Status {
        let (id, entries) = queue(command);
        let completions = command.dword(11) >> 16;
        if id == 0 || id > usize::from(self.config.pairs) {
            return Status::INVALID_QUEUE_ID;
        }
        if entries < 2 || entries > self.config.max_entries {
            return Status::INVALID_QUEUE_SIZE;
        }
        if !matches!(self.completions.get(completions as usize), Some(Some(_))) {
            self.complain(format!("submission queue {id} without its completion queue"));
            return Status::INVALID_FIELD;
        }
        if id >= self.submissions.len() {
            self.submissions.resize_with(id + 1, || None);
        }
        if self.submissions[id].is_some() {
            return Status::INVALID_QUEUE_ID;
        }
        let completions = completions as u16;
        self.submissions[id] =
            Some(Submissions { base: command.0[3], entries, head: 0, completions });
        Status::SUCCESS
    }

    fn delete_submissions(&mut self, id: usize) -> Status {
        match self.submissions.get_mut(id) {
            Some(queue @ Some(_)) if id > 0 => {
                *queue = None;
                self.held.retain(|held| usize::from(held.queue) != id);
                Status::SUCCESS
            }
            _ => Status::INVALID_QUEUE_ID,
        }
    }

    fn delete_completions(&mut self, id: usize) -> Status {
        let used =
            self.submissions.iter().flatten().any(|queue| usize::from(queue.completions) == id);
        match self.completions.get_mut(id) {
            Some(Some(_)) if used => {
                self.complain(format!("completion queue {id} deleted before its submission queue"));
                Status::INVALID_QUEUE
            }
            Some(queue @ Some(_)) if id > 0 => {
                *queue = None;
                Status::SUCCESS
            }
            _ => Status::INVALID_QUEUE_ID,
        }
    }

    fn feature(&mut self, command: &Command) -> (Status, u32) {
        match command.dword(10) & 0xff {
            feature::NUMBER_OF_QUEUES => {
                let wanted = command.dword(11);
                let most = u32::from(self.config.pairs) - 1;
                let granted = (wanted & 0xffff).min(most) | (wanted >> 16).min(most) << 16;
                (Status::SUCCESS, granted)
            }
            feature::ASYNC_EVENTS => (Status::SUCCESS, 0),
            _ => (Status::INVALID_FIELD, 0),
        }
    }

    fn abort(&mut self, dword: u32) -> (Status, u32) {
        let (queue, id) = (dword as u16, (dword >> 16) as u16);
        let mut held = self.held.iter();
        let found = held.position(|held| (held.queue, held.command.id()) == (queue, id));
        match found.filter(|_| !self.broken.no_abort).and_then(|at| self.held.remove(at)) {
            Some(held) => {
                self.events.push(Event::Aborted(queue, id));
                self.complete(queue, &held.command, Status::ABORTED, 0);
                (Status::SUCCESS, 0)
            }
            None => (Status::SUCCESS, 1),
        }
    }

    fn log_page(&mut self, command: &Command) -> Status {
        let len = ((command.dword(10) >> 16) as usize + 1) * 4;
        let mut data = vec![0; len.min(LEN)];
        match command.dword(10) as u8 {
            log_page::CHANGED_NAMESPACES => {}
            log_page::ERRORS => fill(&mut data, &self.config.errors),
            log_page::HEALTH => fill(&mut data, &self.config.health),
            _ => return Status::INVALID_LOG,
        }
        self.give(command, &data)
    }

    /// Tells of an event, now or when it is asked for.
    pub fn raise_event(&mut self, event: u32) {
        self.event_waiting = Some(event);
        self.send_event();
    }

    fn send_event(&mut self) {
        if self.event_waiting.is_some()
            && let Some(id) = self.event_requests.pop()
        {
            let event = self.event_waiting.take().unwrap_or_default();
            let command = Command::admin(AdminOpcode::AsyncEvent).with_id(id);
            self.complete(0, &command, Status::SUCCESS, event);
        }
    }
}

/// What a log page begins with.
fn fill(page: &mut [u8], bytes: &[u8]) {
    page.iter_mut().zip(bytes).for_each(|(place, byte)| *place = *byte);
}

/// The identifier and entries of a queue to be made.
fn queue(command: &Command) -> (usize, u32) {
    let dword = command.dword(10);
    ((dword & 0xffff) as usize, (dword >> 16) + 1)
}
