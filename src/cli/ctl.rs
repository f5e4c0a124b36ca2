//! `vublk ctl`: one command to a running daemon's monitor, for people.

use super::img::outln;
use super::sockets;
use crate::monitor::Framing;
use crate::options::{Map, Value, json, keyval, size};
use crate::service::SOCKET_PATIENCE;
use crate::tools::output::errln;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// Ask or change a running daemon through its monitor
#[derive(clap::Args)]
pub struct Ctl {
    /// The monitor's socket
    #[arg(short, long, value_name = "PATH")]
    socket: PathBuf,
    /// The command; query-commands lists all
    command: String,
    /// Its arguments: KEY=VALUE,… or a JSON object
    arguments: Option<String>,
}

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
        let shown = self.socket.display();
        let failed = |error: std::io::Error| format!("{shown}: {error}");
        // Nothing keeps a signal from ending this program.
        let stream = sockets::connect(&self.socket, || false).map_err(failed)?;
        let mut connection = Connection { stream, framing: Framing::default() };
        let at = |error: String| format!("{shown}: {error}");
        connection.wait_for_greeting(&shown.to_string()).map_err(failed)?;
        let greeting = connection.receive().map_err(at)?;
        if !greeting.contains("QMP") {
            return Err(format!("{shown}: not a QMP monitor").into());
        }
        connection.ask("qmp_capabilities", Map::new()).map_err(at)??;
        let answer = connection.ask(&self.command, arguments).map_err(at)??;
        outln!("{}", json::to_pretty_text(&answer));
        Ok(())
    }
}

struct Connection {
    stream: UnixStream,
    framing: Framing,
}

impl Connection {
    /// Waits for the first bytes of the monitor, and says so where they take long.
    fn wait_for_greeting(&mut self, shown: &str) -> std::io::Result<()> {
        self.stream.set_read_timeout(Some(SOCKET_PATIENCE))?;
        let mut buffer = [0; 4096];
        let result = loop {
            match self.stream.read(&mut buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    errln!(
                        "vublk: {shown}: waiting for the monitor, which may serve another client"
                    );
                    break Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
                // At the end of the stream, the next call says so.
                Ok(n) => {
                    self.framing.push(&buffer[..n]);
                    break Ok(());
                }
            }
        };
        self.stream.set_read_timeout(None)?;
        result
    }

    /// Sends a command and waits for its reply, past any events. The inner error is the monitor's.
    fn ask(&mut self, command: &str, arguments: Map) -> Result<Result<Value, String>, String> {
        let mut request = Map::from_iter([("execute", Value::from(command))]);
        if !arguments.is_empty() {
            request.insert("arguments", arguments);
        }
        let text = json::to_text(&Value::Map(request)) + "\r\n";
        self.stream.write_all(text.as_bytes()).map_err(|e| e.to_string())?;
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

    fn receive(&mut self) -> Result<Map, String> {
        loop {
            match self.framing.next_value() {
                Some(Ok(Value::Map(map))) => return Ok(map),
                Some(Ok(_)) => return Err("not a QMP monitor".into()),
                Some(Err(error)) => return Err(error),
                None => {}
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer).map_err(|e| e.to_string())? {
                0 => return Err("the monitor has closed the connection".into()),
                n => self.framing.push(&buffer[..n]),
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
