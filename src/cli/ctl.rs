//! `vublk ctl`: one command to a running daemon's monitor, for people.

use super::Failure;
use super::img::outln;
use super::sockets;
use crate::monitor::Framing;
use crate::options::{Map, Value, json, keyval, size};
use crate::service::SOCKET_PATIENCE;
use crate::tools::output::errln;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Ask or change a running daemon through its monitor
#[derive(clap::Args)]
pub struct Ctl {
    /// The monitor's socket
    #[arg(short, long, value_name = "PATH", value_hint = clap::ValueHint::FilePath)]
    socket: PathBuf,
    /// Seconds to wait for the monitor's greeting, and then for the reply [default: 5 and 60]
    #[arg(long, value_name = "SECONDS", value_parser = sockets::parse_timeout)]
    timeout: Option<Duration>,
    /// The command; query-commands lists all
    command: String,
    /// Its arguments: KEY=VALUE,… or a JSON object
    arguments: Option<String>,
}

/// How long a greeting may take. A socket that is not a monitor's, such as an export's, sends none, and must not be
/// kept from its clients.
const GREETING: Duration = Duration::from_secs(5);
/// How long a reply may take.
const REPLY: Duration = Duration::from_secs(60);

/// Keys whose values are names, even where they look like numbers or switches.
const NAMES: [&str; 13] = [
    "backing",
    "device",
    "driver",
    "file",
    "filename",
    "id",
    "iothread",
    "node-name",
    "path",
    "qom-type",
    "serial",
    "str",
    "type",
];

impl Ctl {
    pub fn run(self) -> super::Outcome {
        let arguments = match &self.arguments {
            None => Map::new(),
            Some(text) => {
                let parsed = keyval::parse_argument(text, None).map_err(|e| e.to_string())?;
                if text.starts_with('{') { parsed.options } else { typed(parsed.options) }
            }
        };
        let shown = self.socket.display().to_string();
        // Nothing keeps a signal from ending this program.
        let stream = sockets::connect(&self.socket, || false);
        let stream = stream.map_err(|error| format!("{shown}: {error}"))?;
        let (greeting, reply) = (self.timeout.unwrap_or(GREETING), self.timeout.unwrap_or(REPLY));
        let mut connection =
            Connection { stream, framing: Framing::default(), end: Instant::now() + greeting };
        connection.wait_for_greeting(&shown)?;
        connection.end = Instant::now() + reply;
        let at = |error: Trouble| match error {
            Trouble::NoTime => {
                let seconds = reply.as_secs_f64();
                format!(
                    "{shown}: no reply within {seconds} seconds; the daemon may still do what it was told"
                )
            }
            Trouble::Other(text) => format!("{shown}: {text}"),
        };
        connection.ask("qmp_capabilities", Map::new()).map_err(at)??;
        let answer = connection.ask(&self.command, arguments).map_err(at)??;
        outln!("{}", json::to_pretty_text(&answer));
        Ok(())
    }
}

struct Connection {
    stream: UnixStream,
    framing: Framing,
    /// When to stop waiting.
    end: Instant,
}

/// Why nothing was received.
enum Trouble {
    NoTime,
    Other(String),
}

impl From<String> for Trouble {
    fn from(text: String) -> Trouble {
        Trouble::Other(text)
    }
}

impl From<std::io::Error> for Trouble {
    fn from(error: std::io::Error) -> Trouble {
        Trouble::Other(error.to_string())
    }
}

const NO_MONITOR: &str = "not a QMP monitor";

impl Connection {
    /// Waits for the greeting, and prints a line where it takes long.
    fn wait_for_greeting(&mut self, shown: &str) -> super::Outcome {
        let end = self.end;
        self.end = end.min(Instant::now() + SOCKET_PATIENCE);
        let mut greeting = self.receive();
        if matches!(greeting, Err(Trouble::NoTime)) && self.end < end {
            errln!("vublk: {shown}: waiting for the monitor, which may serve another client");
            self.end = end;
            greeting = self.receive();
        }
        match greeting {
            Ok(greeting) if greeting.contains("QMP") => Ok(()),
            Ok(_) => Err(format!("{shown}: {NO_MONITOR}").into()),
            Err(Trouble::Other(text)) => Err(format!("{shown}: {text}").into()),
            Err(Trouble::NoTime) => Err(Failure {
                line: format!("{shown} is not a monitor: is it an export's socket?"),
                hint: Some(
                    "A monitor that serves another client answers later; --timeout SECONDS waits longer."
                        .into(),
                ),
                advice: None,
            }),
        }
    }

    /// Sends a command and waits for its reply, past any events. The inner error is the monitor's.
    fn ask(&mut self, command: &str, arguments: Map) -> Result<Result<Value, String>, Trouble> {
        let mut request = Map::from_iter([("execute", Value::from(command))]);
        if !arguments.is_empty() {
            request.insert("arguments", arguments);
        }
        let text = json::to_text(&Value::Map(request)) + "\r\n";
        self.stream.write_all(text.as_bytes())?;
        loop {
            let mut reply = self.receive()?;
            if let Some(value) = reply.take("return") {
                return Ok(Ok(value));
            }
            if let Some(error) = reply.get_path("error.desc") {
                return Ok(Err(error.as_str().unwrap_or_default().to_owned()));
            }
        }
    }

    /// The next message.
    fn receive(&mut self) -> Result<Map, Trouble> {
        loop {
            match self.framing.next_value() {
                Some(Ok(Value::Map(map))) => return Ok(map),
                Some(Ok(_)) => return Err(NO_MONITOR.to_owned().into()),
                Some(Err(error)) => return Err(error.into()),
                None => {}
            }
            let left = self.end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Trouble::NoTime);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err("the monitor has closed the connection".to_owned().into()),
                Ok(n) => self.framing.push(&buffer[..n]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Text as the JSON that a monitor wants: its types follow from how the values look.
fn typed(options: Map) -> Map {
    let pairs = options.into_iter().map(|(key, value)| {
        let value = typed_value(&key, value);
        (key, value)
    });
    pairs.collect()
}

fn typed_value(key: &str, value: Value) -> Value {
    match value {
        Value::Map(map) => Value::Map(typed(map)),
        Value::List(list) => {
            Value::List(list.into_iter().map(|value| typed_value(key, value)).collect())
        }
        Value::Text(text) if NAMES.contains(&key) => Value::Str(text),
        Value::Text(text) => match &*text {
            "on" | "yes" | "true" => Value::Bool(true),
            "off" | "no" | "false" => Value::Bool(false),
            "null" => Value::Null,
            _ => match (text.parse::<i64>(), size::parse(&text)) {
                (Ok(number), _) => Value::from(number),
                (_, Ok(bytes)) => Value::from(bytes),
                _ => Value::Str(text),
            },
        },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_get_the_type_that_they_look_like() {
        let parsed = keyval::parse("size=1G,n=-3,id=7,flat=on,mode=hard,addr.path=1,l.0=2", None);
        let text = json::to_text(&Value::Map(typed(parsed.unwrap().options)));
        let wanted = r#"{"size": 1073741824, "n": -3, "id": "7", "flat": true, "mode": "hard", "addr": {"path": "1"}, "l": [2]}"#;
        assert_eq!(text, wanted);
    }
}
