//! `amend`: changes the options that an image was made with, where its format can do that.

use super::arguments::{self, CACHE, IMAGE_OPTS, OBJECT, PLAIN_FORMAT, PROGRESS, QUIET};
use super::{Context, Ended, Failed, Tool, option_help};
use crate::block::create::take_options;
use crate::block::{CreateOption, DriverEntry};
use crate::cli::getopt::{Line, long_switch, valued};
use crate::options::qemuopts;
use crate::options::{Map, Value};
use crate::tools::{Cache, Wanted};

pub static TOOL: Tool = Tool {
    name: "amend",
    about: "Change the options that an image was made with",
    options: &[
        OBJECT,
        IMAGE_OPTS,
        PROGRESS,
        QUIET,
        PLAIN_FORMAT,
        CACHE,
        long_switch("force", "allow what is not safe"),
        valued("o", "", "OPTIONS", "NAME=VALUE,…; help lists them").newer(&["options"]),
    ],
    operands: "FILE",
    usage: "[--object objectdef] [--image-opts] [-p] [-q] [-f fmt] [-t cache] [--force] -o \
             options filename",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

async fn run(context: &Context, line: Line) -> Ended {
    let mut wants_help = false;
    let mut given = Map::new();
    for text in line.all("o") {
        arguments::check_option_list(text)?;
        let parsed = qemuopts::parse(text, None).map_err(|e| e.to_string())?;
        wants_help |= parsed.help;
        arguments::add_options(&mut given, parsed.options);
    }
    if !line.has("o") {
        return Err(Failed::usage("Must specify options (-o)"));
    }
    if let (true, Some(format)) = (wants_help, line.get("f")) {
        let driver = arguments::format(format)?;
        option_help::print_amend(context, format, changeable(driver)?);
        return Ok(0);
    }
    let name = match &*line.operands {
        [name] => name,
        _ => return Err("Expecting one image file name".into()),
    };
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let cache = arguments::cache(&line, "t", "cache", Cache::WRITEBACK)?;
    let wanted = arguments::wanted(&line, name, "f", "image-opts")?;
    let images = context.images();
    let image = images.open(&Wanted { writable: true, resize: true, cache, ..wanted }).await?;
    let entry = image.node().driver().entry();
    let options = changeable(entry)?;
    if wants_help {
        option_help::print_amend(context, entry.name, options);
    } else {
        if line.has("force") && options.iter().any(|option| option.name == "force") {
            given.insert("force", Value::Text("on".into()));
        }
        let changes = changes(entry, options, given)?;
        let progress = context.progress(&line);
        progress.set(0.0);
        let amended = match image.node().driver().image() {
            Some(image) => image.amend(changes).await,
            None => return Err(refused(entry)),
        };
        if amended.is_ok() {
            progress.set(100.0);
        }
        progress.end();
        amended?;
    }
    images.close(image).await?;
    images.end().await;
    Ok(0)
}

fn refused(entry: &DriverEntry) -> Failed {
    Failed::from(format!("Format driver '{}' does not support option amendment", entry.name))
}

/// The options of a format that can be changed.
fn changeable(entry: &DriverEntry) -> Result<&'static [CreateOption], Failed> {
    match entry.create.map_or(&[][..], |create| create.amend) {
        [] => Err(refused(entry)),
        options => Ok(options),
    }
}

/// What was given, in types; options of new images alone are distinguished from unknown ones.
fn changes(entry: &DriverEntry, options: &[CreateOption], given: Map) -> Result<Map, Failed> {
    let hint =
        |lines: String, hint: &str| Failed { hint: Some(hint.into()), ..Failed::from(lines) };
    let is_known = |all: &[CreateOption], name: &str| all.iter().any(|o| o.name == name);
    let at_creation = given.iter().find(|(name, _)| {
        !is_known(options, name)
            && entry.create.is_some_and(|create| is_known(create.options, name))
    });
    if let Some((name, _)) = at_creation {
        return Err(hint(
            format!("Invalid parameter '{name}'"),
            "This option is only supported for image creation",
        ));
    }
    let changes = take_options(options, given).map_err(crate::block::Error::from)?;
    if changes.iter().any(|(name, _)| name.starts_with("backing_")) {
        return Err(hint(
            "Cannot amend the backing file".into(),
            "You can use 'qemu-img rebase' instead.",
        ));
    }
    Ok(changes)
}
