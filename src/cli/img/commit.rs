//! `commit`: writes what an image has into the one that it stands on.

use super::arguments::{self, CACHE, IMAGE_OPTS, OBJECT, PLAIN_FORMAT, PROGRESS, QUIET};
use super::{Context, Ended, Failed, Tool};
use crate::cli::getopt::{Line, switch, valued};
use crate::tools::{Cache, Progress, Wanted, extents};

pub static TOOL: Tool = Tool {
    name: "commit",
    about: "Write what an image has into its backing file",
    options: &[
        OBJECT,
        IMAGE_OPTS,
        QUIET,
        PLAIN_FORMAT,
        CACHE,
        valued("b", "", "FILE", "the image below it that is written to"),
        valued("r", "", "RATE", "bytes in a second, at most"),
        switch("d", "", "do not empty the image afterwards"),
        PROGRESS,
    ],
    operands: "FILE",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

async fn run(context: &Context, line: Line) -> Ended {
    line.get("r").map(|text| arguments::any_number(text, "rate limit")).transpose()?;
    let name = arguments::one_operand(&line)?;
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let cache = arguments::cache(&line, "t", "cache", Cache::WRITEBACK)?;
    let wanted = arguments::wanted(&line, name, "f", "image-opts")?;
    let images = context.images();
    let image = images.open(&Wanted { writable: true, unmap: true, cache, ..wanted }).await?;
    let progress = Progress::new(context.progress(&line));
    progress.set(0.0);
    let failed = match (line.get("b"), extents::backing(image.node())) {
        (Some(base), None) => {
            format!("Did not find '{base}' in the backing chain of '{name}'")
        }
        (None, None) => "Image does not have a backing file".to_owned(),
        (_, Some(_)) => {
            format!("commit is not available for images of format '{}'", image.format())
        }
    };
    let failed = Failed::from(failed);
    context.fail(&failed);
    progress.end();
    images.close(image).await?;
    images.end().await;
    Ok(failed.code)
}
