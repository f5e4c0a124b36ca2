//! `vublk create`: qemu-img's create.

use crate::block::SECTOR;
use crate::block::create::{ValueType, create_options};
use crate::drivers;
use crate::io::{Worker, WorkerOptions};
use crate::options::{Map, qemuopts, size};
use std::io::Write;
use std::time::Duration;

/// Make a new disk image
#[derive(clap::Args)]
pub struct Create {
    /// The image's format
    #[arg(short, long, default_value = "raw")]
    format: String,
    /// The format's options: NAME=VALUE,…; `help` lists them
    #[arg(short, action = clap::ArgAction::Append, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Say nothing
    #[arg(short, long)]
    quiet: bool,
    /// The new file
    #[arg(value_name = "FILE", required_unless_present = "options")]
    filename: Option<String>,
    /// Bytes, or with a suffix: k, M, G, T, P, E
    #[arg(allow_hyphen_values = true)]
    size: Option<String>,
}

impl Create {
    pub fn run(self) -> super::Outcome {
        let mut given = Map::new();
        for text in &self.options {
            if matches!(&**text, "help" | "?") {
                return self.list_options();
            }
            let parsed = qemuopts::parse(text, None).map_err(|e| e.to_string())?;
            given.merge(parsed.options).map_err(|e| e.to_string())?;
        }
        let Some(filename) = &self.filename else {
            return Err("Expecting image file name".into());
        };
        let size = self.size.as_deref().map(parse_size).transpose()?;
        let at = |e: crate::block::Error| e.at(filename);
        let creation = drivers::creation(&self.format, filename, given, size).map_err(at)?;
        if !self.quiet {
            // The line ends when the image is there, as scripts know it from qemu-img.
            print!("{}", creation.describe());
            let _ = std::io::stdout().flush();
        }
        let options = WorkerOptions { poll_max: Duration::ZERO, cpu: None };
        let worker = Worker::start("create", options).map_err(|e| e.to_string())?;
        let made = worker.block_on(move || async move { creation.run().await });
        if !self.quiet {
            println!();
        }
        Ok(made.map_err(at)?)
    }

    fn list_options(&self) -> super::Outcome {
        let registry = drivers::registry();
        let format = registry.get(&self.format);
        let format = format.ok_or_else(|| format!("Unknown file format '{}'", self.format))?;
        let mut options = create_options(format, registry.get("file"))?;
        options.sort_by_key(|option| option.name);
        println!("Supported options:");
        for option in options {
            let value = match option.value {
                ValueType::Str => "str",
                ValueType::Bool => "bool (on/off)",
                ValueType::Size => "size",
                ValueType::Number => "num",
            };
            let head = format!("{}=<{value}>", option.name);
            println!("  {head:<22} - {}", option.help);
        }
        Ok(())
    }
}

/// A size as it is given by itself. The format rounds it up to whole sectors.
fn parse_size(text: &str) -> Result<u64, String> {
    match size::parse(text) {
        Ok(bytes) if bytes <= i64::MAX as u64 - SECTOR => Ok(bytes),
        _ => Err("Invalid image size specified. You may use k, M, G, T, P or E suffixes for \
                  kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
            .into()),
    }
}
