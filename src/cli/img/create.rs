//! `create`: a new image.

use super::arguments::{self, OBJECT, PLAIN_FORMAT, QUIET};
use super::{Context, Ended, Failed, Tool, option_help, out, outln};
use crate::block::Error;
use crate::block::create::NewBacking;
use crate::cli::getopt::{Line, long_switch, switch, valued};
use crate::drivers;
use crate::options::{Map, Value, bytes, qemuopts};
use crate::tools::output;
use std::fs::File;
use std::path::PathBuf;

pub static TOOL: Tool = Tool {
    name: "create",
    about: "Make a new disk image",
    options: &[
        OBJECT,
        QUIET,
        PLAIN_FORMAT,
        valued("b", "", "FILE", "take unwritten bytes from this image").newer(&["backing"]),
        valued("F", "", "FORMAT", "the backing file's format").newer(&["B", "backing-format"]),
        switch("u", "", "do not look whether the backing file is there").newer(&["backing-unsafe"]),
        valued("o", "", "OPTIONS", "options of the format: NAME=VALUE,…; help lists them")
            .newer(&["options"]),
        long_switch("no-clobber", "fail if there is such a file already"),
    ],
    operands: "FILE [SIZE]",
    usage: "[--object objectdef] [-q] [-f fmt] [-b backing_file [-F backing_fmt]] [-u] [-o \
             options] filename [size]",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

async fn run(context: &Context, line: Line) -> Ended {
    let mut given = Map::new();
    let mut wants_help = false;
    for text in line.all("o") {
        arguments::check_option_list(text)?;
        let parsed = qemuopts::parse(text, None).map_err(|e| e.to_string())?;
        wants_help |= parsed.help;
        arguments::add_options(&mut given, parsed.options);
    }
    let format = line.get("f").unwrap_or("raw");
    if wants_help {
        option_help::print(context, format, line.operands.first().map(|name| &**name))?;
        return Ok(0);
    }
    let (filename, size) = match &*line.operands {
        [] => return Err(Failed::usage("Expecting image file name")),
        [filename] => (filename, None),
        [filename, size] => (filename, Some(arguments::any_number(size, "image size")?)),
        [_, _, more, ..] => return Err(Failed::usage(format!("Unexpected argument: {more}"))),
    };
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let at = |e: crate::block::Error| e.at(filename);
    let entry = drivers::registry().get(format).filter(|entry| entry.create.is_some());
    for (option, key, what) in
        [("b", "backing_file", "Backing file"), ("F", "backing_fmt", "Backing file format")]
    {
        let Some(value) = line.get(option) else { continue };
        if entry.is_some_and(|entry| !entry.records_backing()) {
            return Err(
                format!("{filename}: {what} not supported for file format '{format}'").into()
            );
        }
        given.insert(key, Value::Text(value.to_owned()));
    }
    let creation = drivers::creation(format, filename, given, size).map_err(at)?;
    let backing = if line.has("u") { NewBacking::Unseen } else { NewBacking::Opened };
    let creation = creation.check_backing(backing).await.map_err(at)?;
    let reserved = match line.has("no-clobber") {
        true => Some(Reserved::make(filename).map_err(at)?),
        false => None,
    };
    context.unfinished.begin(filename);
    let quiet = line.has("q");
    if !quiet {
        // The line ends when the image is there, as scripts know it from qemu-img.
        out!("{}", creation.describe());
        output::flush();
    }
    let made = creation.run().await;
    if !quiet {
        outln!();
        // In front of what is wrong.
        output::flush();
    }
    made.map_err(at)?;
    if let Some(reserved) = reserved {
        reserved.keep();
    }
    context.unfinished.end();
    Ok(0)
}

/// A file that was not there before, and is removed unless an image is made of it.
struct Reserved(PathBuf);

impl Reserved {
    /// Makes the file that an image's name is of.
    ///
    /// # Errors
    /// There is something of that name.
    fn make(name: &str) -> Result<Reserved, Error> {
        let mut named = drivers::registry().new_file(name)?;
        let path = bytes::path_of(&named.take_required_str("filename")?).into_owned();
        match File::create_new(&path) {
            Ok(_) => Ok(Reserved(path)),
            Err(error) => {
                Err(Error::os_at(format!("Could not create '{}'", path.display()), error, &path))
            }
        }
    }

    fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = std::fs::remove_file(&self.0);
    }
}
