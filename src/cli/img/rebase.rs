//! `rebase`: gives an image another backing file.

use super::arguments::{
    self, CACHE, FORCE_SHARE, IMAGE_OPTS, OBJECT, PLAIN_FORMAT, PROGRESS, QUIET, SOURCE_CACHE,
};
use super::{Context, Ended, Failed, Tool, convert};
use crate::block::Error;
use crate::cli::getopt::{Line, switch, valued};
use crate::copy::{Copy, Disk, Hooks, Part, STEP, Source, Trouble, copy};
use crate::drivers;
use crate::io::Errno;
use crate::options::filename;
use crate::tools::{Cache, Images, Opened, Progress, Wanted};
use std::sync::Arc;

/// Pieces in flight at the same time.
const PARALLEL: usize = 4;

pub static TOOL: Tool = Tool {
    name: "rebase",
    about: "Change the backing file of an image",
    options: &[
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
        QUIET,
        PLAIN_FORMAT,
        CACHE,
        SOURCE_CACHE.newer(&["backing-cache"]),
        PROGRESS,
        switch("u", "", "record the name, and nothing more").newer(&["backing-unsafe"]),
        switch("c", "", "compress what is copied into the image").newer(&["compress"]),
        valued("b", "", "FILE", "the new backing file; empty for none").newer(&["backing"]),
        valued("F", "", "FORMAT", "the new backing file's format").newer(&["B", "backing-format"]),
    ],
    operands: "FILE",
    usage: "[--object objectdef] [--image-opts] [-U] [-q] [-f fmt] [-t cache] [-T src_cache] \
             [-p] [-u] -b backing_file [-F backing_fmt] filename",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

async fn run(context: &Context, line: Line) -> Ended {
    let name = arguments::one_operand(&line)?;
    let unsafe_mode = line.has("u");
    if !unsafe_mode && !line.has("b") {
        return Err(Failed::usage("Must specify backing file (-b) or use unsafe mode (-u)"));
    }
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let progress = Arc::new(context.progress(&line));
    progress.set(0.0);
    let images = context.images();
    let ended = rebase(&images, &line, name, &progress).await;
    if let Err(failed) = &ended {
        progress.aside(|| context.fail(failed));
    }
    progress.end();
    images.end().await;
    Ok(ended.unwrap_or_else(|failed| failed.code))
}

async fn rebase(images: &Images, line: &Line, name: &str, progress: &Arc<Progress>) -> Ended {
    let cache = arguments::cache(line, "t", "cache", Cache::WRITEBACK)?;
    let source_cache = arguments::cache(line, "T", "source cache", Cache::WRITEBACK)?;
    let (wanted, base) = (arguments::wanted(line, name, "f", "image-opts")?, line.get("b"));
    let no_backing = line.has("u");
    // The image itself is never shared: it is written to.
    let wanted = Wanted { writable: true, no_backing, cache, force_share: false, ..wanted };
    let image = images.open(&wanted).await?;
    let compress = line.has("c");
    if compress && line.has("u") {
        return Err("Nothing is copied with -u that could be compressed".into());
    }
    if compress && image.node().compression_unit().is_none() {
        return Err("Compression not supported for this file format".into());
    }
    let format = line.get("F");
    if let Some(format) = format
        && drivers::registry().get(format).is_none()
    {
        return Err(format!("Invalid format name: '{format}'").into());
    }
    let base = base.filter(|base| !base.is_empty());
    let refused = |why: &str| {
        Failed::from(format!(
            "Could not change the backing file to '{}': {why}",
            base.unwrap_or_default()
        ))
    };
    // Only an image that can have a backing file is written to.
    let unfiltered = image.node().below_filters();
    let mut new = None;
    if !line.has("u") {
        new = match base {
            Some(base) => {
                let own = unfiltered.driver().filename().unwrap_or_default();
                let full = filename::resolve(&own, base).map_err(|e| e.to_string())?;
                Some(open_new(images, (base, &full), format, source_cache, line).await?)
            }
            None => None,
        };
        if unfiltered.driver().entry().has_backing() && (base.is_none() || format.is_some()) {
            keep_contents(&image, new.as_ref(), compress, progress).await?;
        }
    }
    progress.set(100.0);
    if base.is_some() && format.is_none() {
        drop(unfiltered);
        if let Some(new) = new {
            images.close(new).await?;
        }
        images.close(image).await?;
        return Err(refused("backing format must be specified"));
    }
    let unsupported = || Error::new("Operation not supported");
    let changed = match unfiltered.driver().image() {
        Some(driver) => {
            let node = new.as_ref().map(|new| new.node().below_filters());
            driver.set_backing(base, format, node.as_ref()).await
        }
        None => Err(unsupported()),
    };
    drop(unfiltered);
    if let Some(new) = new {
        images.close(new).await?;
    }
    images.close(image).await?;
    changed.map_err(|error| match error.errno() {
        Some(Errno::ENOSPC) => refused("No space left in the file header"),
        Some(errno) => refused(&errno.to_string()),
        None => refused(&error.to_string()),
    })?;
    Ok(0)
}

/// Writes into the image what it would show differently on `new`.
async fn keep_contents(
    image: &Opened,
    new: Option<&Opened>,
    compress: bool,
    progress: &Arc<Progress>,
) -> Result<(), Failed> {
    let work = Copy {
        sources: vec![Source::whole(Disk::new(image.node().below_filters()))],
        target: image.disk(),
        parallel: PARALLEL,
        in_order: true,
        compress,
        sparse: None,
        keeps_data: true,
        zero_from: u64::MAX,
        part: Part::Rebased(new.map(Opened::disk)),
        salvage: false,
    };
    // As QEMU tells it: in steps of one size, and none where the image has its own.
    let steps = image.len() / image.len().clamp(1, STEP);
    let shown = progress.clone();
    let progress_hook = Box::new(move |_, _| shown.step(1, steps));
    let hooks = Hooks { progress: progress_hook, ..convert::hooks(None, progress) };
    let helpers = convert::helpers(PARALLEL);
    let copied = copy(work, &helpers, hooks).await;
    drop(helpers);
    copied.map_err(describe)?;
    let flushed = image.node().flush().await;
    flushed.map_err(|errno| describe(Trouble::Write(0, errno)))
}

/// Opens the new backing file: as the image calls it, and as it is found from here.
async fn open_new(
    images: &Images,
    (base, full): (&str, &str),
    format: Option<&str>,
    cache: Cache,
    line: &Line,
) -> Result<Opened, Failed> {
    let force_share = line.has("force-share");
    let wanted = Wanted { name: full, format, cache, force_share, ..Wanted::default() };
    images.open(&wanted).await.map_err(|error| {
        let text = error.to_string();
        let inner = text.strip_prefix(&format!("Could not open '{full}': ")).unwrap_or(&text);
        let lines = format!("Could not open new backing file '{base}': {inner}");
        Failed { lines, ..Failed::from(error) }
    })
}

fn describe(trouble: Trouble) -> Failed {
    Failed::from(match trouble {
        Trouble::Status(_, errno) => format!("error while reading image metadata: {errno}"),
        Trouble::Read(_, errno) => format!("error while reading from old backing file: {errno}"),
        Trouble::ReadNew(_, errno) => format!("error while reading from new backing file: {errno}"),
        Trouble::Write(_, errno) => format!("Error while writing to COW image: {errno}"),
        Trouble::Memory | Trouble::Cancelled => trouble.to_string(),
    })
}
