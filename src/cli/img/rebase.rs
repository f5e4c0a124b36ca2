//! `rebase`: stands an image on another backing file.

use super::arguments::{
    self, CACHE, FORCE_SHARE, IMAGE_OPTS, OBJECT, PLAIN_FORMAT, PROGRESS, QUIET, SOURCE_CACHE,
};
use super::{Context, Ended, Failed, Tool};
use crate::cli::getopt::{Line, switch, valued};
use crate::drivers;
use crate::tools::{Cache, Images, Progress, Wanted};

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
        SOURCE_CACHE,
        PROGRESS,
        switch("u", "", "record the name, and nothing more"),
        valued("b", "", "FILE", "the new backing file; empty for none"),
        valued("F", "", "FORMAT", "the new backing file's format"),
    ],
    operands: "FILE",
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
    let progress = Progress::new(context.progress(&line));
    progress.set(0.0);
    let images = context.images();
    let ended = rebase(&images, &line, name).await;
    if let Err(failed) = &ended {
        context.fail(failed);
    }
    if ended.is_ok() || line.get("b") == Some("") {
        progress.set(100.0);
    }
    progress.end();
    images.end().await;
    Ok(ended.unwrap_or_else(|failed| failed.code))
}

async fn rebase(images: &Images, line: &Line, name: &str) -> Ended {
    let cache = arguments::cache(line, "t", "cache", Cache::WRITEBACK)?;
    let source_cache = arguments::cache(line, "T", "source cache", Cache::WRITEBACK)?;
    let (wanted, base) = (arguments::wanted(line, name, "f", "image-opts")?, line.get("b"));
    let no_backing = line.has("u");
    // The image itself is never shared: it is written to.
    let wanted = Wanted { writable: true, no_backing, cache, force_share: false, ..wanted };
    let image = images.open(&wanted).await?;
    let format = line.get("F");
    if let Some(format) = format
        && drivers::registry().get(format).is_none()
    {
        return Err(format!("Invalid format name: '{format}'").into());
    }
    if let (false, Some(base)) = (line.has("u"), base.filter(|base| !base.is_empty())) {
        let wanted = Wanted {
            name: base,
            format,
            cache: source_cache,
            force_share: line.has("force-share"),
            ..Wanted::default()
        };
        let opened = images.open(&wanted).await.map_err(|error| {
            let text = error.to_string();
            let inner = text.strip_prefix(&format!("Could not open '{base}': ")).unwrap_or(&text);
            Failed::from(format!("Could not open new backing file '{base}': {inner}"))
        })?;
        images.close(opened).await?;
    }
    let refused = refusal(base.unwrap_or_default(), format);
    images.close(image).await?;
    Err(refused)
}

/// No driver here can change its backing file yet.
fn refusal(base: &str, format: Option<&str>) -> Failed {
    let why = match format {
        None if !base.is_empty() => "backing format must be specified",
        _ => "Operation not supported",
    };
    Failed::from(format!("Could not change the backing file to '{base}': {why}"))
}
