//! The outcome of a command: a value, or an error with a class and a text, as replies carry them.

use crate::block::Error;
use crate::options::{self, Map, Value};

/// Why a command failed.
#[derive(Debug)]
pub struct CommandError {
    class: &'static str,
    text: String,
    advice: Option<String>,
}

impl CommandError {
    pub fn new(text: impl Into<String>) -> CommandError {
        CommandError { class: "GenericError", text: text.into(), advice: None }
    }

    pub fn not_found(text: impl Into<String>) -> CommandError {
        CommandError { class: "CommandNotFound", text: text.into(), advice: None }
    }

    /// The same with advice, which follows QEMU's sentence.
    pub fn with_advice(self, advice: Option<String>) -> CommandError {
        CommandError { advice, ..self }
    }

    /// As replies carry it.
    pub fn into_value(self) -> Value {
        let text = match self.advice {
            Some(advice) => format!("{}. {advice}", self.text),
            None => self.text,
        };
        object([("class", Value::from(self.class)), ("desc", Value::from(text))])
    }
}

impl From<Error> for CommandError {
    fn from(error: Error) -> CommandError {
        let advice = error.advice().map(str::to_owned);
        CommandError::new(error.to_string()).with_advice(advice)
    }
}

impl From<options::Error> for CommandError {
    fn from(error: options::Error) -> CommandError {
        let advice = error.advice().map(str::to_owned);
        CommandError::new(error.to_string()).with_advice(advice)
    }
}

/// What a command comes to.
pub type Outcome = Result<Value, CommandError>;

/// A JSON object.
pub fn object<const N: usize>(members: [(&str, Value); N]) -> Value {
    Value::Map(Map::from_iter(members))
}

/// The outcome of what returns nothing.
pub fn done(result: Result<(), Error>) -> Outcome {
    result?;
    Ok(Value::Map(Map::new()))
}
