//! One client of a monitor: greeting, negotiation, requests and replies. No I/O is done here.
//!
//! The rule held here: every request gets exactly one reply, in order, with its `id`. Requests that come while
//! a command is under way are read ahead, because `quit` is obeyed even then. Follows QEMU's
//! QMP specification (docs/interop/qmp-spec). The capability `oob` is not offered.

use super::commands::{self, Begun};
use super::framing::Framing;
use super::reply::{CommandError, Outcome, object};
use crate::options::{self, Map, Value, json};
use crate::service::{Pending, Service};
use serde::Deserialize;
use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Bytes of replies that wait for the client before its next request is looked at.
const OUTPUT_PAUSE: usize = 256 << 10;

/// Bytes that wait for the client at most; events beyond it end the connection.
const OUTPUT_LIMIT: usize = 2 << 20;

/// Bytes of requests that are read while a command is under way.
const READ_AHEAD: usize = 64 << 10;

/// The time for which a command delays a `quit` that its own client has sent after it: quick ones end before.
const QUIT_PATIENCE: Duration = Duration::from_secs(1);

/// The state of one connection.
pub struct Session {
    framing: Framing,
    negotiated: bool,
    pretty: bool,
    output: Vec<u8>,
    overrun: bool,
    /// The command that has begun and not ended, and its `id`. The next one waits for it.
    under_way: Option<UnderWay>,
    /// Requests that came while a command was under way, and the bytes that were read for them.
    ahead: VecDeque<Result<Value, String>>,
    read_ahead: usize,
}

struct UnderWay {
    id: Option<Value>,
    outcome: Pending<Outcome>,
    since: Instant,
}

/// What a request asks of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Handled,
    /// The process is to end.
    Quit,
}

/// The answer to a request, to be given with [`Session::reply`] after the events that the request
/// has caused.
pub struct Reply(Value);

impl Session {
    /// A connection that has just begun: its output is the greeting.
    pub fn new(pretty: bool) -> Session {
        let mut session = Session {
            framing: Framing::default(),
            negotiated: false,
            pretty,
            output: Vec::new(),
            overrun: false,
            under_way: None,
            ahead: VecDeque::new(),
            read_ahead: 0,
        };
        let greeting =
            object([("version", commands::version()), ("capabilities", Value::List(Vec::new()))]);
        session.say(&object([("QMP", greeting)]));
        session
    }

    /// Takes what the client has sent.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.framing.push(bytes);
        if self.is_waiting() {
            self.read_ahead();
        }
    }

    /// Cuts what has come into requests, while a command is under way.
    fn read_ahead(&mut self) {
        if self.ahead.is_empty() {
            self.read_ahead = 0;
        }
        self.read_ahead += self.framing.unread();
        while let Some(request) = self.framing.next_value() {
            self.ahead.push_back(request);
        }
    }

    /// Output that waits to be sent; [`Session::sent`] removes it.
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    pub fn sent(&mut self, bytes: usize) {
        self.output.drain(..bytes);
    }

    /// Whether more may be read from the client now.
    pub fn wants_input(&self) -> bool {
        let has_room = match self.is_waiting() {
            true => self.read_ahead < READ_AHEAD,
            false => !self.has_input(),
        };
        has_room && self.output.len() < OUTPUT_PAUSE
    }

    /// Whether [`Session::step`] may have something to do.
    pub fn has_work(&self) -> bool {
        !self.is_waiting() && self.has_input() && self.output.len() < OUTPUT_PAUSE
    }

    /// Whether input that has come is still to be looked at.
    pub fn has_input(&self) -> bool {
        self.framing.has_input() || !self.ahead.is_empty()
    }

    /// Whether the client has sent `quit` after the command that is under way, or after others that wait
    /// for it.
    pub fn has_quit_ahead(&self) -> bool {
        self.ahead.iter().flatten().any(is_quit)
    }

    /// When a `quit` is obeyed that waits for a command under way.
    pub fn quit_due(&self) -> Option<Instant> {
        let under_way = self.under_way.as_ref()?;
        self.has_quit_ahead().then(|| under_way.since + QUIT_PATIENCE)
    }

    /// Whether a command is under way: [`Session::step`] is to be called when a task has ended.
    pub fn is_waiting(&self) -> bool {
        self.under_way.is_some()
    }

    /// Whether more has piled up than a client may leave unread.
    pub fn is_overrun(&self) -> bool {
        self.overrun
    }

    /// Handles one request, if there is a whole one, and room for its reply; or continues with the one that is under
    /// way.
    pub fn step(&mut self, service: &Service) -> Option<(Reply, Step)> {
        if let Some(under_way) = &self.under_way {
            let outcome = under_way.outcome.take()?;
            let UnderWay { id, .. } = self.under_way.take()?;
            return Some((reply(id, outcome), Step::Handled));
        }
        if self.output.len() >= OUTPUT_PAUSE {
            return None;
        }
        let next = self.ahead.pop_front();
        let mut request = match next.or_else(|| self.framing.next_value())? {
            Ok(Value::Map(request)) => request,
            Ok(_) => {
                let error = CommandError::new("QMP input must be a JSON object");
                return Some((reply(None, Err(error)), Step::Handled));
            }
            Err(text) => return Some((reply(None, Err(CommandError::new(text))), Step::Handled)),
        };
        let id = request.take("id");
        match self.dispatch(request, service) {
            Ok((Begun::Ended(value), step)) => Some((reply(id, Ok(value)), step)),
            Ok((Begun::Later(outcome), _)) => {
                self.under_way = Some(UnderWay { id, outcome, since: Instant::now() });
                self.read_ahead();
                None
            }
            Err(error) => Some((reply(id, Err(error)), Step::Handled)),
        }
    }

    pub fn reply(&mut self, Reply(value): Reply) {
        self.say(&value);
    }

    /// Sends an event, once the client has negotiated.
    pub fn event(&mut self, name: &str, data: Value) {
        if !self.negotiated || self.overrun {
            return;
        }
        if self.output.len() > OUTPUT_LIMIT {
            self.overrun = true;
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = object([
            ("seconds", Value::from(now.as_secs())),
            ("microseconds", Value::from(u64::from(now.subsec_micros()))),
        ]);
        self.say(&object([("timestamp", timestamp), ("event", Value::from(name)), ("data", data)]));
    }

    fn dispatch(
        &mut self,
        mut request: Map,
        service: &Service,
    ) -> Result<(Begun, Step), CommandError> {
        let command = match request.take("execute") {
            Some(Value::Str(command)) => Some(command),
            Some(_) => {
                return Err(CommandError::new("QMP input member 'execute' must be a string"));
            }
            None => None,
        };
        let arguments = match request.take("arguments") {
            None => Map::new(),
            Some(Value::Map(map)) => map,
            Some(_) => {
                return Err(CommandError::new("QMP input member 'arguments' must be an object"));
            }
        };
        if let Some((key, _)) = request.iter().next() {
            let key = key.escape_debug();
            return Err(CommandError::new(format!("QMP input member '{key}' is unexpected")));
        }
        let command =
            command.ok_or_else(|| CommandError::new("QMP input lacks member 'execute'"))?;
        match (&*command, self.negotiated) {
            ("qmp_capabilities", false) => {
                negotiate(arguments)?;
                self.negotiated = true;
                Ok((Begun::Ended(Value::Map(Map::new())), Step::Handled))
            }
            ("qmp_capabilities", true) => Err(CommandError::not_found(
                "Capabilities negotiation is already complete, command ignored",
            )),
            (_, false) => Err(CommandError::not_found(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            )),
            ("quit", true) => {
                arguments.finish()?;
                Ok((Begun::Ended(Value::Map(Map::new())), Step::Quit))
            }
            (command, true) => {
                commands::run(command, arguments, service).map(|begun| (begun, Step::Handled))
            }
        }
    }

    fn say(&mut self, value: &Value) {
        let text = if self.pretty { json::to_pretty_text(value) } else { json::to_text(value) };
        self.output.extend_from_slice(text.as_bytes());
        self.output.extend_from_slice(b"\r\n");
    }
}

/// Whether a request is a `quit` that will not be refused.
fn is_quit(request: &Value) -> bool {
    let Value::Map(request) = request else { return false };
    request.iter().all(|(key, value)| match (key, value) {
        ("execute", value) => value.as_str() == Some("quit"),
        ("arguments", Value::Map(arguments)) => arguments.iter().next().is_none(),
        ("id", _) => true,
        _ => false,
    }) && request.get("execute").is_some()
}

/// The reply to a request with this `id`.
fn reply(id: Option<Value>, outcome: Outcome) -> Reply {
    let mut reply = Map::new();
    match outcome {
        Ok(value) => {
            reply.insert("return", value);
            id.map(|id| reply.insert("id", id));
        }
        Err(error) => {
            id.map(|id| reply.insert("id", id));
            reply.insert("error", error.into_value());
        }
    }
    Reply(Value::Map(reply))
}

/// `qmp_capabilities`: nothing is offered, so nothing can be enabled.
fn negotiate(arguments: Map) -> Result<(), CommandError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        #[serde(default)]
        enable: Vec<String>,
    }
    let Arguments { enable } = options::from_map(arguments)?;
    match enable.first() {
        None => Ok(()),
        Some(name) if name == "oob" => Err(CommandError::new("Capability 'oob' is not available")),
        Some(name) => {
            let name = name.escape_debug();
            Err(CommandError::new(format!("Parameter 'enable' does not accept value '{name}'")))
        }
    }
}
