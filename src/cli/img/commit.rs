//! `commit`: writes the contents of an image into its backing file.

use super::arguments::{self, CACHE, IMAGE_OPTS, OBJECT, PLAIN_FORMAT, PROGRESS, QUIET};
use super::{Context, Ended, Tool, convert, outln};
use crate::block::{Error, extents};
use crate::cli::getopt::{Line, switch, valued};
use crate::copy::{Copy, Part, Source, copy};
use crate::io::Errno;
use crate::tools::chain::{self, Layers};
use crate::tools::{Cache, Images, Opened, Progress, Wanted};
use std::sync::Arc;

/// Pieces in flight at the same time.
const PARALLEL: usize = 8;

pub static TOOL: Tool = Tool {
    name: "commit",
    about: "Write what an image has into its backing file",
    options: &[
        OBJECT,
        IMAGE_OPTS,
        QUIET,
        PLAIN_FORMAT,
        CACHE,
        valued("b", "", "FILE", "the image below it that is written to").newer(&["base"]),
        valued("r", "", "RATE", "bytes in a second, at most").newer(&["rate-limit"]),
        switch("d", "", "do not empty the image afterwards").newer(&["drop"]),
        PROGRESS,
    ],
    operands: "FILE",
    usage: "[--object objectdef] [--image-opts] [-q] [-f fmt] [-t cache] [-b base] [-r \
             rate_limit] [-d] [-p] filename",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

async fn run(context: &Context, line: Line) -> Ended {
    let rate = line.get("r").map(|text| arguments::any_number(text, "rate limit")).transpose()?;
    let name = arguments::one_operand(&line)?;
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let cache = arguments::cache(&line, "t", "cache", Cache::WRITEBACK)?;
    let wanted = arguments::wanted(&line, name, "f", "image-opts")?;
    let wanted = Wanted { writable: true, unmap: true, cache, ..wanted };
    let images = context.images();
    let image = images.open(&wanted).await?;
    let progress = Arc::new(context.progress(&line));
    progress.set(0.0);
    // What is between the image and a base that was named stays where it was.
    let keeps_top = line.has("d") || line.has("b");
    let ended = commit(&images, image, &wanted, line.get("b"), (rate, keeps_top, &progress)).await;
    if let Err(failed) = &ended {
        progress.aside(|| context.fail(failed));
    } else {
        progress.set(100.0);
    }
    progress.end();
    images.end().await;
    if ended.is_ok() && !line.has("q") {
        outln!("Image committed.");
    }
    Ok(ended.unwrap_or_else(|failed| failed.code))
}

/// The order: what the base lacks is durable in it before the top gives up its own.
async fn commit(
    images: &Images,
    image: Opened,
    wanted: &Wanted<'_>,
    base: Option<&str>,
    (rate, keeps_top, progress): (Option<u64>, bool, &Arc<Progress>),
) -> Ended {
    let depth = match base {
        Some(base) => chain::find(images.graph().registry(), image.node(), base).ok_or_else(|| {
            format!("Did not find '{base}' in the backing chain of '{}'", wanted.name)
        }),
        None if extents::backing(image.node()).is_none() => {
            Err("Image does not have a backing file".to_owned())
        }
        None => Ok(0),
    };
    let depth = match depth {
        Ok(depth) => depth,
        Err(text) => {
            images.close(image).await?;
            return Err(text.into());
        }
    };
    let Layers { top, between, base } =
        chain::open_for_commit(images, image, wanted, depth).await?;
    let work = Copy {
        sources: vec![Source::whole(top.disk())],
        target: base.disk(),
        parallel: PARALLEL,
        in_order: false,
        compress: false,
        sparse: Some(4096),
        keeps_data: true,
        zero_from: u64::MAX,
        part: Part::Above(base.node().clone()),
        salvage: false,
    };
    let helpers = convert::helpers(PARALLEL);
    let copied = copy(work, &helpers, convert::hooks(rate, progress)).await;
    drop(helpers);
    copied.map_err(convert::describe)?;
    base.node().flush().await.map_err(|errno| format!("Could not flush the image: {errno}"))?;
    if !keeps_top {
        let empty = |error: Error| error.at(format!("Failed to empty {}", wanted.name));
        let driver = top.node().driver();
        match driver.image().ok_or("Operation not supported")?.make_empty().await {
            // As in QEMU: an image of a format that cannot give up its clusters keeps them, and shows what it did.
            Err(error) if error.errno() == Some(Errno::ENOTSUP) => {}
            emptied => emptied.map_err(empty)?,
        }
    }
    for image in [top].into_iter().chain(between).chain([base]) {
        images.close(image).await?;
    }
    Ok(0)
}
