//! The image tools: `vublk info`, `vublk convert`, …, and all of them under the name `qemu-img`.
//!
//! One file per subcommand, which parses and prints; the work is in [`crate::tools`]. Results, words
//! of errors and exit codes are qemu-img's (7.2), so that scripts need not know which one they call.

mod amend;
mod arguments;
mod bench;
mod bitmap;
mod bitmap_copy;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod info;
mod map;
mod measure;
mod object;
mod option_help;
mod personality;
mod rebase;
mod resize;
mod snapshot;
mod snapshot_list;

pub use info::print_specific;
pub use personality::{VERSION, qemu_img, trace};

use super::getopt::{self, Line, Operands, Opt, Wrong};
use super::interruption::Unfinished;
use super::tool_log;
use crate::block::{Error, Graph, LocalFuture};
use crate::drivers;
use crate::io::sync::Mutex;
use crate::io::{Worker, WorkerOptions};
use crate::options::bytes;
use crate::service::holder_of;
use crate::tools::output::{err, errln};
use crate::tools::{Images, output};
use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;

/// The subcommands, in the order of their names.
pub const TOOLS: &[&Tool] = &[
    &amend::TOOL,
    &bench::TOOL,
    &bitmap::TOOL,
    &check::TOOL,
    &commit::TOOL,
    &compare::TOOL,
    &convert::TOOL,
    &create::TOOL,
    &dd::TOOL,
    &info::TOOL,
    &map::TOOL,
    &measure::TOOL,
    &rebase::TOOL,
    &resize::TOOL,
    &snapshot::TOOL,
];

/// One subcommand.
pub struct Tool {
    pub name: &'static str,
    pub about: &'static str,
    pub options: &'static [Opt],
    pub operands: &'static str,
    /// What stands behind the name in qemu-img's usage line, which programs look for to learn what it can do.
    pub usage: &'static str,
    /// The last argument is an operand, whatever it looks like.
    pub takes_last: bool,
    pub run: for<'a> fn(&'a Context, Line) -> LocalFuture<'a, Ended>,
}

impl Tool {
    /// The definition that man pages and completions are made from.
    pub fn command(&self) -> clap::Command {
        getopt::command(self.name, self.about, self.options, self.operands)
    }
}

/// The exit code, or why there is no result.
type Ended = Result<u8, Failed>;

/// The end of a tool that could not do what was asked: error lines, each printed behind the
/// program's name, a hint printed as it is, and the exit code.
#[derive(Debug)]
pub struct Failed {
    lines: String,
    hint: Option<String>,
    /// Printed as it is, but not under QEMU's name.
    advice: Option<String>,
    code: u8,
}

impl Failed {
    /// The same with another exit code.
    fn code(self, code: u8) -> Failed {
        Failed { code, ..self }
    }

    /// A wrong command line: the help is pointed to.
    fn usage(line: impl Into<String>) -> Failed {
        Failed { hint: Some(TRY_HELP.into()), ..Failed::from(line.into()) }
    }
}

/// Stands for the line that points to the help, which names the program.
const TRY_HELP: &str = "\0";

impl From<String> for Failed {
    fn from(lines: String) -> Failed {
        Failed { lines, hint: None, advice: None, code: 1 }
    }
}

impl From<&str> for Failed {
    fn from(lines: &str) -> Failed {
        Failed::from(lines.to_owned())
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Failed {
        let [hint, advice] = [error.hint(), error.advice()].map(|text| text.map(str::to_owned));
        let advice = advice.or_else(|| {
            let holder = holder_of(error.locked_file()?)?;
            Some(format!("It is held by {holder}"))
        });
        Failed { hint, advice, ..Failed::from(error.to_string()) }
    }
}

/// In which program a tool runs.
#[derive(Clone)]
pub struct Context {
    /// In front of error lines.
    program: Arc<str>,
    /// Long work draws a bar without being asked to.
    draws_bars: bool,
    /// What its tools have opened.
    graphs: Arc<Mutex<Vec<Graph>>>,
    /// The image that a tool is making.
    unfinished: Unfinished,
}

impl Context {
    /// `draws_bars`: standard error is a terminal, and the program is not one of QEMU's.
    pub fn new(program: &str, draws_bars: bool) -> Context {
        let (graphs, unfinished) = Default::default();
        Context { program: program.into(), draws_bars, graphs, unfinished }
    }

    /// Runs under QEMU's name.
    fn is_qemu_img(&self) -> bool {
        &*self.program == "qemu-img"
    }

    /// What an interactive program asks for commands with.
    pub fn prompt(&self) -> String {
        format!("{}>", self.program)
    }

    /// Prints error lines.
    pub fn error(&self, lines: &str) {
        for line in lines.split('\n') {
            errln!("{}: {line}", self.program);
        }
    }

    /// Prints a warning.
    pub fn warn(&self, text: &str) {
        errln!("{}: warning: {text}", self.program);
    }

    fn fail(&self, failed: &Failed) {
        self.error(match self.is_qemu_img() {
            true => &failed.lines,
            false => said_once(&failed.lines),
        });
        match failed.hint.as_deref() {
            Some(TRY_HELP) => errln!("Try '{} --help' for more information", self.program),
            // Its line does not end there, either.
            Some(hint) if self.is_qemu_img() && hint.starts_with("Detected format") => {
                err!("{hint}");
            }
            Some(hint) => errln!("{hint}"),
            None => {}
        }
        if let Some(advice) = failed.advice.as_deref().filter(|_| !self.is_qemu_img()) {
            errln!("{advice}");
        }
    }

    /// The images that a tool opens.
    pub fn images(&self) -> Images {
        self.close_at_end(Images::new(drivers::registry(), self.warner()))
    }

    /// An image that is opened to be checked.
    pub fn images_to_check(&self) -> Images {
        self.close_at_end(Images::for_check(drivers::registry(), self.warner()))
    }

    /// Images that are opened to tell about them.
    pub fn images_to_tell(&self) -> Images {
        self.close_at_end(Images::for_info(drivers::registry(), self.warner()))
    }

    fn close_at_end(&self, images: Images) -> Images {
        self.graphs.lock().push(images.graph().clone());
        images
    }

    /// Closes what a tool that has failed left open: only then has its image given back what it reserved.
    async fn close_images(&self) {
        let graphs = std::mem::take(&mut *self.graphs.lock());
        for graph in graphs {
            graph.close().await;
        }
    }

    fn warner(&self) -> impl Fn(&str) + 'static {
        let program = self.program.clone();
        move |text| {
            // What QEMU's block layer says itself stands without the program's name.
            match text.starts_with("WARNING: ") {
                true => errln!("{text}"),
                false => errln!("{program}: warning: {text}"),
            }
        }
    }
}

/// Writes to standard output.
macro_rules! out {
    ($($text:tt)*) => { $crate::tools::output::write(format_args!($($text)*)) };
}
/// Writes a line to standard output.
macro_rules! outln {
    () => { $crate::tools::output::write(format_args!("\n")) };
    ($($text:tt)*) => {{
        $crate::tools::output::write(format_args!($($text)*));
        $crate::tools::output::write(format_args!("\n"));
    }};
}
pub(in crate::cli) use {out, outln};

/// Makes the object that `--object` describes, for other programs. Whether it asked for help.
pub fn add_object(text: &str) -> Result<bool, String> {
    object::add(text).map_err(|failed| failed.lines)
}

/// The subcommand of this name.
pub fn find(name: &str) -> Option<&'static Tool> {
    TOOLS.iter().copied().find(|tool| tool.name == name)
}

/// Runs a subcommand with the arguments behind its name. The rest of the program.
pub fn run(context: &Context, tool: &'static Tool, arguments: Vec<OsString>) -> ExitCode {
    super::signals::answer_usr1();
    tool_log::start(&context.program);
    let ended = parse(context, tool, arguments).and_then(|line| {
        if line.help {
            personality::print_help(context, Some(tool));
            return Ok(0);
        }
        if !context.is_qemu_img() {
            context.unfinished.watch(&context.program);
        }
        // How long requests take beside each other can be told only if each is waited for by itself.
        let may_block = tool.name != bench::TOOL.name;
        let options = WorkerOptions { may_block, ..WorkerOptions::default() };
        let worker =
            Worker::start(tool.name, options).map_err(|e| format!("cannot start a worker: {e}"))?;
        let context = context.clone();
        worker.block_on(move || async move {
            let ended = (tool.run)(&context, line).await;
            context.close_images().await;
            ended
        })
    });
    let code = match ended {
        Ok(code) => code,
        Err(failed) => {
            context.fail(&failed);
            failed.code
        }
    };
    output::flush();
    ExitCode::from(code)
}

fn parse(context: &Context, tool: &Tool, arguments: Vec<OsString>) -> Result<Line, Failed> {
    let text = |argument: &OsString| bytes::text_of_name(argument);
    let mut arguments: Vec<String> = arguments.iter().map(text).collect();
    let ends_with_help = arguments.last().is_some_and(|last| last == "-h" || last == "--help");
    let last = match tool.takes_last {
        // qemu-img takes even this for an operand.
        true if ends_with_help && !context.is_qemu_img() => None,
        true if arguments.len() < 2 => return Err(Failed::usage("Not enough arguments")),
        true => arguments.pop(),
        false => None,
    };
    let line = getopt::parse(tool.name, tool.options, &arguments, Operands::Anywhere);
    let mut line = line.map_err(|error| {
        let advice = match &error {
            Wrong::Unrecognized(option) => getopt::advice(tool.options, option),
            Wrong::MissingValue(_) => None,
        };
        Failed { advice, ..wrong(error) }
    })?;
    line.operands.extend(last);
    Ok(line)
}

/// An error without the part in front that it begins with twice: QEMU's block layer and its tools both say it.
fn said_once(lines: &str) -> &str {
    let twice = lines.match_indices("': ").find_map(|(at, end)| {
        let (first, rest) = lines.split_at(at + end.len());
        rest.starts_with(first).then_some(rest)
    });
    twice.unwrap_or(lines)
}

fn wrong(wrong: Wrong) -> Failed {
    Failed::usage(match wrong {
        Wrong::Unrecognized(option) => format!("unrecognized option '{option}'"),
        Wrong::MissingValue(option) => format!("missing argument for option '{option}'"),
    })
}
