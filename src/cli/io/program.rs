//! The program itself: its options, the image it opens, and the commands of `-c`.

use super::images::{ToOpen, check_aio, parse_cache, parse_discard};
use super::{COMMANDS, Session};
use crate::cli::getopt::{
    self, Line, Operands, Opt, Wrong, long_switch, long_valued, switch, valued,
};
use crate::cli::img::{Context, VERSION, add_object, outln, trace};
use crate::cli::tool_log;
use crate::io::{Worker, WorkerOptions};
use crate::options::bytes;
use crate::tools::{Cache, output};
use std::ffi::OsString;
use std::process::ExitCode;

/// What `vublk io` is for.
pub const ABOUT: &str = "Read and write an image with qemu-io's commands";

/// The program's options.
pub const OPTIONS: &[Opt] = &[
    long_valued("object", "OBJECT", "an object that the image needs, such as a secret"),
    long_switch("image-opts", "the image is named by a string of options (driver=raw,…)"),
    valued("c", "cmd", "COMMAND", "run a command; several run in the order given"),
    valued("f", "format", "FORMAT", "the image's format; guessed if not given"),
    switch("r", "read-only", "open the image for reading"),
    switch("s", "snapshot", "keep writes apart from the image"),
    switch("n", "nocache", "around the host's page cache, as -t none"),
    switch("C", "copy-on-read", "copy what is read from backing files"),
    switch("m", "misalign", "use memory that is not aligned"),
    switch("k", "native-aio", "as -i native"),
    valued("i", "aio", "threads|native|io_uring", "all mean io_uring here"),
    valued("t", "cache", "CACHE", "the image's cache mode"),
    valued("d", "discard", "unmap|ignore", "whether discards are passed on"),
    valued("T", "trace", "PATTERN", "trace events, of which there are none"),
    switch("U", "force-share", "open the image even while others write to it"),
    switch("V", "version", "show the version"),
];

/// Runs as `program` with the arguments behind its name.
pub fn run(program: &str, arguments: Vec<OsString>) -> ExitCode {
    let context = Context::new(program, false);
    let texts: Vec<String> = arguments.iter().map(|text| bytes::text_of_name(text)).collect();
    let line = match getopt::parse(program, OPTIONS, &texts, Operands::Anywhere) {
        Ok(line) => line,
        Err(wrong) => {
            context.error(&words(&wrong, &texts));
            print_help(program);
            output::flush();
            return ExitCode::FAILURE;
        }
    };
    tool_log::start(program);
    let code = if line.help {
        print_help(program);
        Ok(true)
    } else if line.has("version") {
        outln!("{program} {VERSION}");
        Ok(true)
    } else if line.operands.len() > 1 {
        print_help(program);
        Ok(false)
    } else {
        start(&context, line)
    };
    let good = code.unwrap_or_else(|text| {
        context.error(&text);
        false
    });
    output::flush();
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Whether all commands succeeded.
fn start(context: &Context, line: Line) -> Result<bool, String> {
    if line.get("trace").is_some_and(|value| trace(context, value)) {
        return Ok(true);
    }
    let wanted = to_open(&line)?;
    for text in line.all("object") {
        if add_object(text)? {
            return Ok(true);
        }
    }
    let options = WorkerOptions::default();
    let worker = Worker::start("io", options).map_err(|e| format!("cannot start a worker: {e}"))?;
    let context = context.clone();
    Ok(worker.block_on(move || session(context, wanted, line)))
}

async fn session(context: Context, wanted: Option<ToOpen>, line: Line) -> bool {
    let mut session = Session::new(context);
    session.misalign = line.has("misalign");
    if let Some(wanted) = wanted
        && session.open(wanted).await.is_none()
    {
        return false;
    }
    let mut good = true;
    if line.has("cmd") {
        for command in line.all("cmd") {
            good &= session.run_line(command).await.is_some();
            if session.quit {
                break;
            }
        }
    } else {
        good = session.interact().await;
    }
    session.close().await;
    session.images.end().await;
    good
}

/// The image that the options name, if they do.
fn to_open(line: &Line) -> Result<Option<ToOpen>, String> {
    let mut wanted = ToOpen {
        read_only: line.has("read-only"),
        force_share: line.has("force-share"),
        image_opts: line.has("image-opts"),
        format: line.get("format").map(str::to_owned),
        ..ToOpen::default()
    };
    for (option, text) in line.iter() {
        match option {
            "nocache" => wanted.cache = Cache { direct: true, ..Cache::WRITEBACK },
            "cache" => wanted.cache = parse_cache(text)?,
            "discard" => wanted.unmap = parse_discard(text)?,
            "aio" => check_aio(text)?,
            _ => {}
        }
    }
    if wanted.image_opts && wanted.format.is_some() {
        return Err("--image-opts and -f are mutually exclusive".into());
    }
    wanted.snapshot = line.has("snapshot");
    wanted.copy_on_read = line.has("copy-on-read");
    wanted.native = line.has("native-aio") || line.get("aio") == Some("native");
    let Some(name) = line.operands.first() else { return Ok(None) };
    wanted.name = name.clone();
    Ok(Some(wanted))
}

/// getopt's own messages about a wrong command line.
fn words(wrong: &Wrong, arguments: &[String]) -> String {
    let letter = |text: &str, known: bool| {
        let is_known = |c: &char| OPTIONS.iter().any(|option| option.short.starts_with(*c));
        text.chars().skip(1).find(|c| is_known(c) == known).unwrap_or('-')
    };
    match wrong {
        Wrong::Unrecognized(text) if text.starts_with("--") => {
            format!("unrecognized option '{text}'")
        }
        Wrong::Unrecognized(text) => {
            // The option itself, if getopt points at the argument before.
            let wrong = arguments.iter().find(|a| a.starts_with('-') && letter(a, false) != '-');
            format!("invalid option -- '{}'", letter(wrong.unwrap_or(text), false))
        }
        Wrong::MissingValue(text) if text.starts_with("--") => {
            format!("option '{text}' requires an argument")
        }
        Wrong::MissingValue(text) => {
            format!("option requires an argument -- '{}'", text.chars().last().unwrap_or('-'))
        }
    }
}

fn print_help(program: &str) {
    let (called, about) = match program {
        "qemu-io" => (program, "QEMU Disk exerciser"),
        _ => ("vublk io", ABOUT),
    };
    outln!("Usage: {called} [OPTIONS]... [-c STRING]... [file]");
    outln!("{about}\n");
    for option in OPTIONS {
        let flags: Vec<String> = option.flags().collect();
        let value = option.value.map(|value| format!(" {value}")).unwrap_or_default();
        outln!("  {:<28} {}", flags.join(", ") + &value, option.help);
    }
    let names: Vec<&str> = COMMANDS.iter().map(|command| command.name).collect();
    outln!("\nCommands (-c help describes them): {}", names.join(" "));
}
