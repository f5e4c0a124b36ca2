//! `vublk io`: qemu-io's commands, which read and write images for tests and repairs.
//!
//! The rule held here: a command that fails is reported and the next one runs; the program's exit code says whether
//! any failed.

mod breaks;
mod commands;
mod images;
mod program;
mod reopen;
mod transfer;
mod words;

pub use program::{ABOUT, OPTIONS, run};

use crate::block::{Preallocation, Precision, Status};
use crate::cli::img::{Context, outln};
use crate::io::{offload, sleep};
use crate::tools::output::errln;
use crate::tools::{Images, Opened, output};
use commands::{COMMANDS, Command, find};
use images::ToOpen;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;
use words::{Words, human};

/// What a command came to: none if it failed, of which it has told.
type Said = Option<()>;

/// The state of one run.
pub struct Session {
    context: Context,
    images: Images,
    /// What is open, and how it was asked for.
    image: Option<(Rc<Opened>, ToOpen)>,
    /// Buffers are not aligned.
    misalign: bool,
    /// Requests that nobody has waited for.
    pending: Rc<Cell<usize>>,
    /// What requests at breakpoints are called.
    tags: BTreeSet<String>,
    /// The command that runs.
    command: Option<&'static Command>,
    quit: bool,
}

impl Session {
    fn new(context: Context) -> Session {
        let images = context.images();
        Session {
            context,
            images,
            image: None,
            misalign: false,
            pending: Rc::default(),
            tags: BTreeSet::new(),
            command: None,
            quit: false,
        }
    }

    fn image(&self) -> Option<&Rc<Opened>> {
        self.image.as_ref().map(|(image, _)| image)
    }

    /// How the command is used.
    fn usage(&self) -> Said {
        if let Some(command) = self.command {
            outln!("{}", command.usage());
        }
        None
    }

    fn check_writable(&self) -> Said {
        if self.image()?.is_writable() {
            return Some(());
        }
        self.context.error("Block node is read-only");
        None
    }

    /// Runs one line.
    async fn run_line(&mut self, line: &str) -> Said {
        let all = words::split(line);
        let Some((&name, rest)) = all.split_first() else { return Some(()) };
        let Some(command) = find(name) else {
            errln!("command \"{name}\" not found");
            return None;
        };
        self.command = Some(command);
        if !command.without_image && self.image.is_none() {
            errln!("no file open, try 'help open'");
            return None;
        }
        if let Some(text) = command.wrong_count(rest.len()) {
            errln!("{text}");
            return None;
        }
        let Some(words) = words::parse(command.name, command.options, rest) else {
            return self.usage();
        };
        self.act(command.name, &words).await
    }

    async fn act(&mut self, name: &str, words: &Words<'_>) -> Said {
        match name {
            "read" => self.read(words, false).await,
            "readv" => self.read(words, true).await,
            "write" => self.write(words, false).await,
            "writev" => self.write(words, true).await,
            "aio_read" => self.aio_read(words).await,
            "aio_write" => self.aio_write(words).await,
            "aio_flush" => {
                self.await_pending().await;
                Some(())
            }
            "discard" => self.discard(words).await,
            "flush" => match transfer::flush(self.image()?).await {
                Ok(()) => Some(()),
                Err(_) => None,
            },
            "truncate" => self.truncate(words).await,
            "length" => {
                outln!("{}", human(self.image()?.len() as f64));
                Some(())
            }
            "info" => self.info(),
            "alloc" => self.alloc(words).await,
            "map" => self.map().await,
            "open" => self.open_again(words).await,
            "reopen" => self.reopen(words).await,
            "close" => {
                self.close().await;
                Some(())
            }
            "help" => help(words),
            "quit" => {
                self.quit = true;
                Some(())
            }
            "sleep" => {
                let text = words.operands.first()?;
                let Ok(milliseconds) = text.parse() else {
                    outln!("{text} is not a valid number");
                    return None;
                };
                sleep(Duration::from_millis(milliseconds)).await;
                Some(())
            }
            "sigraise" => {
                let signal = words::number(words.operands.first()?)?;
                output::flush();
                super::signals::raise(signal as i32);
                Some(())
            }
            "abort" => std::process::abort(),
            _ => self.breakpoint(name, words).await,
        }
    }

    /// Waits for all requests that were started and not waited for.
    async fn await_pending(&self) {
        while self.pending.get() > 0 {
            sleep(Duration::from_micros(50)).await;
        }
    }

    async fn close(&mut self) {
        self.forget_breaks();
        self.await_pending().await;
        if let Some((image, _)) = self.image.take()
            && let Ok(image) = Rc::try_unwrap(image)
            && let Err(error) = self.images.close(image).await
        {
            self.context.error(&error.to_string());
        }
    }

    async fn truncate(&mut self, words: &Words<'_>) -> Said {
        let mode = words.get('m').unwrap_or("off");
        let Some(preallocation) = Preallocation::parse(mode) else {
            self.context.error(&format!("Invalid preallocation mode '{mode}'"));
            return None;
        };
        let [text] = *words.operands else { return self.usage() };
        let len = words::number(text)?;
        self.check_writable()?;
        let image = self.image()?;
        let result = match image.allow_resize(true) {
            Ok(()) => image.truncate(len, preallocation).await,
            refused => refused,
        };
        let result = result.and(image.allow_resize(false));
        if let Err(error) = result {
            self.context.error(&error.to_string());
            return None;
        }
        Some(())
    }

    fn info(&self) -> Said {
        let image = self.image()?;
        let info = image.node().driver().image().map(|whole| whole.info()).unwrap_or_default();
        outln!("format name: {}", image.format());
        outln!("cluster size: {}", human(info.cluster_size.unwrap_or(0) as f64));
        outln!("vm state offset: {}", human(info.vm_state_offset as f64));
        if let Some(specific) = &info.specific {
            crate::cli::img::print_specific(specific);
        }
        Some(())
    }

    /// Whether the image itself has the bytes from `at` on, and for how many of `len` that holds.
    async fn allocated(&self, at: u64, len: u64) -> Option<(bool, u64)> {
        let node = self.image()?.node();
        let looked = node.status(at, len, Precision::Allocation).await;
        match looked {
            Ok(extent) => Some((extent.status.contains(Status::ALLOCATED), extent.len)),
            Err(errno) => {
                outln!("is_allocated failed: {errno}");
                None
            }
        }
    }

    async fn alloc(&self, words: &Words<'_>) -> Said {
        let [start, count @ ..] = &*words.operands else { return None };
        let start = words::number(start)?;
        let count = match count.first() {
            Some(text) => words::number(text)?,
            None => 512,
        };
        let end = start.saturating_add(count).min(self.image()?.len());
        let (mut at, mut sum) = (start, 0);
        while at < end {
            let (has, len) = self.allocated(at, end - at).await?;
            sum += if has { len } else { 0 };
            at += len;
        }
        let count = end.saturating_sub(start);
        outln!("{sum}/{count} bytes allocated at offset {}", human(start as f64));
        Some(())
    }

    async fn map(&self) -> Said {
        let (mut at, end) = (0, self.image()?.len());
        while at < end {
            let (has, mut len) = self.allocated(at, end - at).await?;
            while at + len < end {
                match self.allocated(at + len, end - at - len).await? {
                    (next, more) if next == has => len += more,
                    _ => break,
                }
            }
            outln!(
                "{} ({len:#x}) bytes {} at offset {} ({at:#x})",
                human(len as f64),
                if has { "    allocated" } else { "not allocated" },
                human(at as f64)
            );
            at += len;
        }
        Some(())
    }

    /// Reads commands until there are none left.
    async fn interact(&mut self) -> bool {
        let mut good = true;
        while !self.quit {
            crate::cli::img::out!("{} ", self.context.prompt());
            output::flush();
            let line = offload(|| {
                let mut line = String::new();
                std::io::stdin().read_line(&mut line).map(|count| (count > 0).then_some(line))
            });
            match line.await {
                Ok(Some(line)) => {
                    good &= self.run_line(line.trim_end_matches('\n')).await.is_some()
                }
                _ => break,
            }
        }
        good
    }
}

fn help(words: &Words<'_>) -> Said {
    match words.operands.first() {
        Some(name) => match find(name) {
            Some(command) => outln!("{}", command.usage()),
            None => {
                outln!("command {name} not found");
                return None;
            }
        },
        None => {
            COMMANDS.iter().for_each(|command| outln!("{}", command.usage()));
            outln!("\nUse 'help commandname' for extended help.");
        }
    }
    Some(())
}
