//! `resize`: sets the length of an image's disk.

use super::arguments::{self, IMAGE_OPTS, OBJECT, PLAIN_FORMAT, QUIET};
use super::{Context, Ended, Failed, Tool, outln};
use crate::block::Preallocation;
use crate::cli::getopt::{Line, long_switch, long_valued};
use crate::options::SIZE_HINT;
use crate::options::size::{self, BadSize};
use crate::tools::Wanted;

pub static TOOL: Tool = Tool {
    name: "resize",
    about: "Change the size of an image's disk",
    options: &[
        OBJECT,
        IMAGE_OPTS,
        PLAIN_FORMAT,
        long_valued("preallocation", "MODE", "how new space is allocated: off, falloc, full, …"),
        QUIET,
        long_switch("shrink", "allow losing the data beyond the new size"),
    ],
    operands: "FILE [+|-]SIZE",
    usage: "[--object objectdef] [--image-opts] [-f fmt] [--preallocation=prealloc] [-q] \
             [--shrink] filename [+ | -]size",
    takes_last: true,
    run: |context, line| Box::pin(run(context, line)),
};

async fn run(context: &Context, line: Line) -> Ended {
    let mode = line.get("preallocation").unwrap_or("off");
    let preallocation = Preallocation::parse(mode)
        .ok_or_else(|| Failed::from(format!("Invalid preallocation mode '{mode}'")))?;
    let [name, size] = &*line.operands else {
        return Err(Failed::usage("Expecting image file name and size"));
    };
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let change = Change::parse(size)?;
    let wanted = arguments::wanted(&line, name, "f", "image-opts")?;
    let images = context.images();
    let image = images.open(&Wanted { writable: true, resize: true, ..wanted }).await?;
    let old = image.len();
    let len = change.apply(old).filter(|&len| len > 0 && len <= i64::MAX as u64);
    let len = len.ok_or("New image size must be positive")?;
    if len <= old && preallocation != Preallocation::Off {
        return Err("Preallocation can only be used for growing images".into());
    }
    if len < old && !line.has("shrink") {
        context.error("Use the --shrink option to perform a shrink operation.");
        context.warn(
            "Shrinking an image will delete all data beyond the shrunken image's end. Before \
             performing such an operation, make sure there is no important data there.",
        );
        return Ok(1);
    }
    image.resize(len, preallocation).await?;
    images.close(image).await?;
    images.end().await;
    if !line.has("q") {
        outln!("Image resized.");
    }
    Ok(0)
}

/// The request.
enum Change {
    To(u64),
    By(u64),
    Down(u64),
}

impl Change {
    fn parse(text: &str) -> Result<Change, Failed> {
        let (make, digits): (fn(u64) -> Change, &str) = match text.as_bytes().first() {
            Some(b'+') => (Change::By, &text[1..]),
            Some(b'-') => (Change::Down, &text[1..]),
            _ => (Change::To, text),
        };
        match size::parse(digits) {
            Ok(bytes) => Ok(make(bytes)),
            Err(BadSize::OutOfRange) => {
                Err(format!("Value '{digits}' is out of range for parameter 'size'").into())
            }
            Err(BadSize::NotASize) => Err(Failed {
                hint: Some(SIZE_HINT.into()),
                ..Failed::from("Parameter 'size' expects a non-negative number below 2^64")
            }),
        }
    }

    fn apply(&self, old: u64) -> Option<u64> {
        match *self {
            Change::To(len) => Some(len),
            Change::By(more) => old.checked_add(more),
            Change::Down(less) => old.checked_sub(less),
        }
    }
}
