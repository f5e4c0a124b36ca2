//! `vublk create`: qemu-img's create.

use crate::block::create::{NewBacking, ValueType, create_options};
use crate::block::{Error, SECTOR};
use crate::drivers;
use crate::io::{Worker, WorkerOptions};
use crate::options::{Map, Value, qemuopts, size};
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
    /// Take unwritten bytes from this image
    #[arg(short = 'b', value_name = "FILE")]
    backing_file: Option<String>,
    /// The backing file's format
    #[arg(short = 'F', value_name = "FORMAT")]
    backing_format: Option<String>,
    /// Do not look whether the backing file is there
    #[arg(short = 'u')]
    unseen: bool,
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
        let at = |e: Error| e.at(filename);
        self.add_backing(&mut given).map_err(at)?;
        let creation = drivers::creation(&self.format, filename, given, size).map_err(at)?;
        let options = WorkerOptions { poll_max: Duration::ZERO, cpu: None };
        let worker = Worker::start("create", options).map_err(|e| e.to_string())?;
        let backing = if self.unseen { NewBacking::Unseen } else { NewBacking::Opened };
        let checked = worker.block_on(move || async move { creation.check_backing(backing).await });
        let creation = checked.map_err(at)?;
        if !self.quiet {
            // The line ends when the image is there, as scripts know it from qemu-img.
            print!("{}", creation.describe());
            let _ = std::io::stdout().flush();
        }
        let made = worker.block_on(move || async move { creation.run().await });
        if !self.quiet {
            println!();
        }
        Ok(made.map_err(at)?)
    }

    /// `-b` and `-F` are two of the options, for formats that have them.
    fn add_backing(&self, given: &mut Map) -> Result<(), Error> {
        let known = drivers::registry().get(&self.format).and_then(|entry| entry.create);
        let known = known.map_or(&[][..], |entry| entry.options);
        for (value, name, what) in [
            (&self.backing_file, "backing_file", "Backing file"),
            (&self.backing_format, "backing_fmt", "Backing format"),
        ] {
            let Some(value) = value else { continue };
            if !known.is_empty() && known.iter().all(|option| option.name != name) {
                return Err(Error::new(format!(
                    "{what} not supported for file format '{}'",
                    self.format
                )));
            }
            given.insert(name, Value::Text(value.clone()));
        }
        Ok(())
    }

    fn list_options(&self) -> super::Outcome {
        let registry = drivers::registry();
        let format = registry.get(&self.format);
        let format = format.ok_or_else(|| format!("Unknown file format '{}'", self.format))?;
        // The options of the file below are known when its name is.
        let protocol = match &self.filename {
            Some(name) => {
                let driver = drivers::registry().file_options(name).map_err(|e| e.at(name))?;
                driver.get("driver").and_then(Value::as_str).and_then(|name| registry.get(name))
            }
            None => None,
        };
        let mut options = create_options(format, protocol)?;
        options.sort_by_key(|option| option.name);
        match protocol {
            Some(_) => println!("Supported options:"),
            None => println!("Supported {} options:", self.format),
        }
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
        if protocol.is_none() {
            println!("\nThe protocol level may support further options.");
            println!("Specify the target filename to include those options.");
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
