//! `compare`: whether two images have the same contents.

use super::arguments::{
    self, FORCE_SHARE, IMAGE_OPTS, OBJECT, PLAIN_FORMAT, PROGRESS, QUIET, SOURCE_CACHE,
};
use super::{Context, Ended, Failed, Tool, outln};
use crate::cli::getopt::{Line, switch, valued};
use crate::tools::compare::{Trouble, Verdict, compare};
use crate::tools::{Cache, Images, Progress, Wanted};

pub static TOOL: Tool = Tool {
    name: "compare",
    about: "Compare the contents of two images",
    options: &[
        OBJECT,
        IMAGE_OPTS,
        PLAIN_FORMAT.newer(&["a-format", "format"]),
        valued("F", "", "FORMAT", "the second image's format; guessed if not given")
            .newer(&["b-format"]),
        SOURCE_CACHE.newer(&["cache", "source-cache"]),
        PROGRESS,
        QUIET,
        switch("s", "", "strict: sizes and what is stored must be equal, too").newer(&["strict"]),
        FORCE_SHARE,
    ],
    operands: "FILE1 FILE2",
    usage: "[--object objectdef] [--image-opts] [-f fmt] [-F fmt] [-T src_cache] [-p] [-q] [-s] \
             [-U] filename1 filename2",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

/// Exit codes beside 0 and 1.
const CANNOT_OPEN: u8 = 2;
const CANNOT_LOOK: u8 = 3;
const CANNOT_READ: u8 = 4;

async fn run(context: &Context, line: Line) -> Ended {
    let [first, second] = &*line.operands else {
        return Err(Failed::usage("Expecting two image file names"));
    };
    if arguments::objects(&line).map_err(|failed| failed.code(CANNOT_OPEN))? {
        return Ok(0);
    }
    let cache = arguments::cache(&line, "T", "source cache", Cache::WRITEBACK);
    let cache = cache.map_err(|failed| failed.code(CANNOT_OPEN))?;
    let progress = context.progress(&line);
    let images = context.images();
    let ended = compare_named(&images, &line, [first, second], cache, &progress).await;
    progress.end();
    images.end().await;
    ended
}

async fn compare_named(
    images: &Images,
    line: &Line,
    names: [&str; 2],
    cache: Cache,
    progress: &Progress,
) -> Ended {
    let quiet = line.has("q");
    let cannot_open = |failed: Failed| failed.code(CANNOT_OPEN);
    let mut disks = Vec::new();
    for (name, key) in names.into_iter().zip(["f", "F"]) {
        let wanted = arguments::wanted(line, name, key, "image-opts").map_err(cannot_open)?;
        let opened = images.open(&Wanted { cache, ..wanted }).await;
        disks.push(opened.map_err(|error| cannot_open(error.into()))?);
    }
    let say = |text: String| {
        if !quiet {
            progress.aside(|| outln!("{text}"));
        }
    };
    let mismatch = || say("Warning: Image size mismatch!".into());
    let verdict = compare([&disks[0], &disks[1]], line.has("s"), progress, mismatch).await;
    let trouble = |what: String, code| Err(Failed::from(what).code(code));
    match verdict {
        Ok(Verdict::Identical) => {
            say("Images are identical.".into());
            Ok(0)
        }
        Ok(Verdict::SizesDiffer) => {
            say("Strict mode: Image size mismatch!".into());
            Ok(1)
        }
        Ok(Verdict::StatusDiffers(at)) => {
            say(format!("Strict mode: Offset {at} block status mismatch!"));
            Ok(1)
        }
        Ok(Verdict::ContentsDiffer(at)) => {
            say(format!("Content mismatch at offset {at}!"));
            Ok(1)
        }
        Err(Trouble::Status(disk, _, _)) => {
            trouble(format!("Sector allocation test failed for {}", names[disk]), CANNOT_LOOK)
        }
        Err(Trouble::Read(disk, at, errno)) => trouble(
            format!("Error while reading offset {at} of {}: {errno}", names[disk]),
            CANNOT_READ,
        ),
        Err(Trouble::Memory) => trouble("Out of memory".into(), CANNOT_READ),
    }
}
