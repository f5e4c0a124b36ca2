//! `amend`: changes the options that an image was made with, where its format can do that. None here
//! can yet.

use super::arguments::{self, CACHE, IMAGE_OPTS, OBJECT, PLAIN_FORMAT, PROGRESS, QUIET};
use super::{Context, Ended, Failed, Tool};
use crate::cli::getopt::{Line, long_switch, valued};
use crate::drivers;
use crate::options::qemuopts;
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
        valued("o", "", "OPTIONS", "NAME=VALUE,…"),
    ],
    operands: "FILE",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

async fn run(context: &Context, line: Line) -> Ended {
    let mut wants_help = false;
    for text in line.all("o") {
        arguments::check_option_list(text)?;
        let parsed = qemuopts::parse(text, None).map_err(|e| e.to_string())?;
        wants_help |= parsed.help;
    }
    if !line.has("o") {
        return Err(Failed::usage("Must specify options (-o)"));
    }
    let refused = |format: &str| {
        Failed::from(format!("Format driver '{format}' does not support option amendment"))
    };
    if let (true, Some(format)) = (wants_help, line.get("f")) {
        let driver = drivers::registry().get(format);
        driver.ok_or_else(|| format!("Unknown file format '{format}'"))?;
        return Err(refused(format));
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
    let image = images.open(&Wanted { writable: true, cache, ..wanted }).await?;
    let format = image.format();
    images.close(image).await?;
    images.end().await;
    Err(refused(format))
}
