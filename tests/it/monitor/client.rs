//! A QMP client that shares nothing with the program: lines of JSON, read by serde.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// No answer takes this long unless there is none.
const LIMIT: Duration = Duration::from_secs(60);

pub struct Client {
    pub stream: BufReader<UnixStream>,
    pub greeting: Value,
    /// Events that came before a reply.
    pub events: Vec<Value>,
}

/// Connects. A socket that has its name already may not be listened to yet.
fn connect(path: &Path) -> UnixStream {
    let began = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Err(error)
                if error.kind() == ErrorKind::ConnectionRefused && began.elapsed() < LIMIT =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            connected => return connected.unwrap(),
        }
    }
}

impl Client {
    /// Connects and reads the greeting.
    pub fn greet(path: &Path) -> Client {
        let stream = connect(path);
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut client =
            Client { stream: BufReader::new(stream), greeting: Value::Null, events: Vec::new() };
        client.greeting = client.receive().expect("a greeting");
        client
    }

    /// Connects and negotiates.
    pub fn connect(path: &Path) -> Client {
        let mut client = Client::greet(path);
        let mut answer = client.ask("qmp_capabilities", json!({}));
        // QEMU 7.2 greets twice at times.
        if answer["QMP"]["version"]["package"].as_str().is_some_and(|p| p.starts_with("Debian")) {
            answer = client.reply();
        }
        assert_eq!(answer, json!({"return": {}}));
        client
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).unwrap();
    }

    /// What comes next; none if the monitor has closed the connection.
    pub fn receive(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => return None,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
            result => result.unwrap(),
        };
        assert!(line.ends_with("\r\n"), "{line:?}");
        Some(serde_json::from_str(&line).unwrap())
    }

    /// The next reply; events are put aside.
    pub fn reply(&mut self) -> Value {
        loop {
            let value = self.receive().expect("a reply");
            if value.get("event").is_none() {
                return value;
            }
            self.events.push(value);
        }
    }

    /// The next event, of those put aside or to come.
    pub fn event(&mut self) -> Value {
        if !self.events.is_empty() {
            return self.events.remove(0);
        }
        let value = self.receive().expect("an event");
        assert!(value.get("event").is_some(), "{value}");
        value
    }

    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        self.send(request.to_string().as_bytes());
        self.reply()
    }

    /// A command that succeeds.
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        let reply = self.ask(command, arguments);
        reply.get("return").unwrap_or_else(|| panic!("{command}: {reply}")).clone()
    }

    /// The sentence with which a command fails.
    pub fn refusal(&mut self, command: &str, arguments: Value) -> String {
        let reply = self.ask(command, arguments);
        reply["error"]["desc"].as_str().unwrap_or_else(|| panic!("{command}: {reply}")).to_owned()
    }
}

/// Whether two replies say the same: advice may follow QEMU's sentence in the first.
pub fn is_same_but_for_advice(ours: &Value, theirs: &Value) -> bool {
    let sentence = |reply: &Value| reply["error"]["desc"].as_str().map(str::to_owned);
    match (sentence(ours), sentence(theirs)) {
        (Some(said), Some(wanted)) => {
            ours["error"]["class"] == theirs["error"]["class"] && said.starts_with(&wanted)
        }
        _ => ours == theirs,
    }
}
