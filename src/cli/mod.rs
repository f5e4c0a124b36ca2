//! The command lines.
//!
//! `vublk COMMAND …`, or one of QEMU's programs by the name under which it was called.

mod columns;
mod confine;
mod ctl;
mod daemon;
mod disk_names;
mod generate;
mod getopt;
mod img;
mod interruption;
mod io;
mod log;
mod looks;
mod manual;
mod manual_texts;
mod nvme;
mod outlet;
mod policy;
mod process;
mod secret;
mod serve;
mod signals;
mod sockets;
mod startup;
mod tool_log;
mod top;
mod vhost_user_block;

use crate::block::Error;
use crate::tools::output;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

/// A userspace storage backend for virtual machines.
#[derive(Parser)]
#[command(name = "vublk", version, about, disable_help_subcommand = true)]
struct Vublk {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve disks to virtual machines
    Serve(Box<serve::Serve>),
    /// Serve disks to virtual machines; the options are qemu-storage-daemon's
    #[command(disable_help_flag = true)]
    Daemon {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
        arguments: Vec<OsString>,
    },
    /// Ask or change a running daemon through its monitor
    Ctl(ctl::Ctl),
    Top(top::Top),
    Nvme(nvme::Nvme),
}

/// What a command came to.
type Outcome = Result<(), Failure>;

/// An error line, printed after the program's name, and advice, printed on a line of its own.
struct Failure {
    line: String,
    hint: Option<String>,
    /// A line that is printed under our own names alone.
    advice: Option<String>,
}

impl From<String> for Failure {
    fn from(line: String) -> Failure {
        Failure { line, hint: None, advice: None }
    }
}

impl From<&str> for Failure {
    fn from(line: &str) -> Failure {
        Failure::from(line.to_owned())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let [hint, advice] = [error.hint(), error.advice()].map(|text| text.map(str::to_owned));
        Failure { line: error.to_string(), hint, advice }
    }
}

/// Runs the command that the arguments name. The whole program.
pub fn main() -> ExitCode {
    signals::ignore_refusals();
    let mut arguments = std::env::args_os();
    let called = arguments.next().unwrap_or_else(|| "vublk".into());
    let called = Path::new(&called).file_name().unwrap_or("vublk".as_ref());
    if called == "qemu-storage-daemon" {
        return report(
            "qemu-storage-daemon",
            daemon::run("qemu-storage-daemon", arguments.collect()),
        );
    }
    if called == "vhost-user-block" {
        return report("vhost-user-block", vhost_user_block::run(arguments.collect()));
    }
    if called.as_encoded_bytes().starts_with(b"qemu-")
        && called != "qemu-img"
        && called != "qemu-io"
    {
        return unknown_program(called);
    }
    let rest: Vec<OsString> = arguments.collect();
    if called == "qemu-img" {
        return img::qemu_img(rest);
    }
    if called == "qemu-io" {
        return io::run("qemu-io", rest);
    }
    if rest.first().is_some_and(|name| name == "io") {
        return io::run("vublk", rest[1..].to_vec());
    }
    // For packages: users are not offered it.
    if rest.first().is_some_and(|name| name == "generate") {
        return report("vublk", generate::run(&rest[1..]));
    }
    if let [name, rest @ ..] = &*rest
        && let Some(tool) = name.to_str().and_then(img::find)
    {
        let context = img::Context::new("vublk", std::io::stderr().is_terminal());
        return img::run(&context, tool, rest.to_vec());
    }
    let parsed =
        command_line().try_get_matches().and_then(|matches| Vublk::from_arg_matches(&matches));
    let command = match parsed {
        Ok(Vublk { command }) => command,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    let outcome = match command {
        Command::Serve(serve) => serve.run(),
        Command::Daemon { arguments } => daemon::run("vublk daemon", arguments),
        Command::Ctl(ctl) => ctl.run(),
        Command::Top(top) => top.run(),
        Command::Nvme(nvme) => nvme.run(),
    };
    report("vublk", outcome)
}

/// A link named as one of QEMU's programs that this one cannot replace: its caller must not take what comes for its
/// answer.
fn unknown_program(called: &OsStr) -> ExitCode {
    let called = called.display().to_string();
    let line = "vublk does not do this program's work: it has qemu-img, qemu-io, qemu-storage-daemon and \
                vhost-user-block";
    report(&called, Err(line.into()))
}

/// The whole command line, as help texts, man pages and completions show it.
fn command_line() -> clap::Command {
    let io = getopt::command("io", io::ABOUT, io::OPTIONS, "FILE");
    Vublk::command().subcommands(img::TOOLS.iter().map(|tool| tool.command())).subcommand(io)
}

fn report(program: &str, outcome: Outcome) -> ExitCode {
    output::flush();
    ::log::logger().flush();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { line, hint, advice }) => {
            let advice = advice.filter(|_| program.starts_with("vublk"));
            log::report_failure(program, [Some(line), hint, advice].into_iter().flatten());
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The options of a command and of the commands under it that have no help text.
    fn unexplained(command: &clap::Command) -> Vec<String> {
        let options = command.get_arguments().filter(|arg| !arg.is_positional());
        let bare = options.filter(|arg| arg.get_help().is_none());
        let bare = bare.map(|arg| format!("{}: {}", command.get_name(), arg.get_id()));
        bare.chain(command.get_subcommands().flat_map(unexplained)).collect()
    }

    #[test]
    fn every_option_of_every_command_is_explained() {
        assert_eq!(unexplained(&generate::offered()), Vec::<String>::new());
    }
}
