//! Options in front of a subcommand: the program's own options, its version and its help.

use super::{Context, Failed, TOOLS, Tool, find, run, wrong};
use crate::block::Kind;
use crate::cli::getopt::{self, Operands, Opt, switch, usage, valued};
use crate::drivers;
use crate::options::bytes;
use crate::tools::output;
use std::ffi::OsString;
use std::process::ExitCode;

const OPTIONS: &[Opt] = &[
    switch("h", "help", "show the commands"),
    switch("V", "version", "show the version"),
    valued("T", "trace", "PATTERN", "trace events, of which there are none"),
];

/// What this stands in for.
pub const VERSION: &str = concat!("version 7.2.0 (vublk ", env!("CARGO_PKG_VERSION"), ")");

/// Runs as `qemu-img`, with the arguments behind the program's name.
pub fn qemu_img(arguments: Vec<OsString>) -> ExitCode {
    let context = Context::new("qemu-img", false);
    let texts: Vec<String> =
        arguments.iter().map(|argument| bytes::text_of_name(argument)).collect();
    let code = match choose(&context, &texts) {
        Ok(Some((tool, at))) => return run(&context, tool, arguments[at..].to_vec()),
        Ok(None) => ExitCode::SUCCESS,
        Err(failed) => {
            context.fail(&failed);
            ExitCode::from(failed.code)
        }
    };
    output::flush();
    code
}

/// The subcommand, and where its arguments begin; none if all is done.
fn choose(
    context: &Context,
    arguments: &[String],
) -> Result<Option<(&'static Tool, usize)>, Failed> {
    if arguments.is_empty() {
        return Err(Failed::usage("Not enough arguments"));
    }
    let line =
        getopt::parse("qemu-img", &OPTIONS[1..], arguments, Operands::Last).map_err(wrong)?;
    for (option, value) in line.iter() {
        if option == "version" {
            super::outln!("qemu-img {VERSION}");
            return Ok(None);
        }
        if trace(context, value) {
            return Ok(None);
        }
    }
    if line.help {
        print_help(context, None);
        return Ok(None);
    }
    let Some(name) = line.operands.first() else { return Ok(None) };
    let tool = find(name).ok_or_else(|| Failed::usage(format!("Command not found: {name}")))?;
    Ok(Some((tool, arguments.len() - line.operands.len() + 1)))
}

/// Takes what `-T` says: there are no events to trace. Whether a list of them was all that was
/// wanted.
pub fn trace(context: &Context, value: &str) -> bool {
    let first = value.split(',').next().unwrap_or_default();
    let pattern = first.strip_prefix("enable=").unwrap_or(first);
    let plain = !pattern.is_empty() && !pattern.contains(['*', '=']);
    if matches!(pattern, "help" | "?") {
        return true;
    }
    if plain {
        context.warn(&format!("trace event '{pattern}' does not exist"));
    }
    false
}

/// The help of the program, or of one subcommand.
pub fn print_help(context: &Context, tool: Option<&Tool>) {
    use super::outln;
    let program = &context.program;
    outln!("{program} {VERSION}");
    match (tool, context.is_qemu_img()) {
        (Some(tool), false) => {
            outln!("usage: {program} {}", usage(tool.name, tool.options, tool.operands));
            outln!("{}\n", tool.about);
            tool.options.iter().for_each(print_option);
        }
        (Some(tool), true) => print_as_qemu_img(&[tool]),
        (None, _) => print_as_qemu_img(TOOLS),
    }
    let is_listed = |kind| kind != Kind::Filter || context.is_qemu_img();
    let formats = drivers::registry().iter().filter(|entry| is_listed(entry.kind));
    let names: Vec<&str> = formats.map(|entry| entry.name).collect();
    outln!("\nSupported formats: {}", names.join(" "));
}

/// Under QEMU's name, its usage lines come first: programs read them to learn what can be asked for. What later
/// versions have besides is listed among the options.
fn print_as_qemu_img(tools: &[&Tool]) {
    use super::outln;
    outln!("usage: qemu-img [standard options] command [command options]");
    outln!("QEMU disk image utility\n");
    OPTIONS.iter().for_each(print_option);
    outln!("\nCommand syntax:");
    tools.iter().for_each(|tool| outln!("  {} {}", tool.name, tool.usage));
    for tool in tools {
        outln!("\n{}: {}", tool.name, tool.about);
        tool.options.iter().for_each(print_option);
    }
}

fn print_option(option: &Opt) {
    let flags: Vec<String> = option.flags().collect();
    let value = option.value.map(|value| format!(" {value}")).unwrap_or_default();
    super::outln!("  {:<34} {}", flags.join(", ") + &value, option.help);
}
