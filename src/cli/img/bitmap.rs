//! `bitmap`: the persistent bitmaps of an image.

use super::arguments::{self, IMAGE_OPTS, OBJECT, PLAIN_FORMAT};
use super::{Context, Ended, Failed, Tool};
use crate::block::{Error, NewBitmap, Node};
use crate::cli::getopt::{Line, long_switch, long_valued, valued};
use crate::tools::{Images, Opened, Wanted};
use std::sync::Arc;

pub static TOOL: Tool = Tool {
    name: "bitmap",
    about: "Add, remove and change an image's persistent bitmaps",
    options: &[
        valued("b", "source-file", "FILE", "the image with the bitmaps that are merged"),
        PLAIN_FORMAT,
        valued("F", "source-format", "FORMAT", "that image's format"),
        valued("g", "granularity", "SIZE", "the granularity of a new bitmap"),
        OBJECT,
        IMAGE_OPTS,
        long_switch("add", "make the bitmap"),
        long_switch("remove", "remove the bitmap"),
        long_switch("", "remove all bitmaps, whatever state they are in; none is named")
            .newer(&["remove-all"]),
        long_switch("clear", "forget what it has recorded"),
        long_switch("enable", "let it record"),
        long_switch("disable", "let it record no more"),
        long_valued("merge", "SOURCE", "add what another bitmap has recorded"),
    ],
    operands: "FILE [BITMAP]",
    usage: "(--merge SOURCE | --add | --remove | --clear | --enable | --disable)... [-b \
             source_file [-F source_fmt]] [-g granularity] [--object objectdef] [--image-opts | \
             -f fmt] filename bitmap",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

const ACTIONS: [&str; 6] = ["add", "remove", "clear", "enable", "disable", "merge"];

async fn run(context: &Context, line: Line) -> Ended {
    let granularity =
        line.get("granularity").map(|text| arguments::any_number(text, "granularity"));
    // None is asked for with 0; of others, QMP has 32 bits.
    let granularity = granularity.transpose()?.filter(|&size| size > 0);
    let granularity = granularity.map(|size| u64::from(size as u32));
    let acts = line.iter().any(|(option, _)| ACTIONS.contains(&option));
    let all = line.has("remove-all");
    if !acts && !all {
        return Err(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge".into(),
        );
    }
    for (wrong, text) in [
        (all && acts, "--remove-all cannot be combined with what is done to one bitmap"),
        (line.has("granularity") && !line.has("add"), "granularity only supported with --add"),
        (line.has("source-format") && !line.has("source-file"), "-F only supported with -b"),
        (
            line.has("source-file") && !line.has("merge"),
            "Merge bitmap source file only supported with --merge",
        ),
    ] {
        if wrong {
            return Err(text.into());
        }
    }
    let (name, bitmap) = match &*line.operands {
        [name] if all => (name, None),
        _ if all => return Err("Expecting a filename and no bitmap name".into()),
        [name, bitmap] => (name, Some(bitmap)),
        _ => return Err("Expecting filename and bitmap name".into()),
    };
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let images = context.images();
    let wanted = arguments::wanted(&line, name, "f", "image-opts")?;
    let image = images.open(&Wanted { writable: true, no_backing: true, ..wanted }).await?;
    let source = match open_source(&images, &line).await {
        Ok(source) => source,
        Err(error) => {
            images.close(image).await?;
            return Err(error.into());
        }
    };
    let ended = match bitmap {
        Some(bitmap) => change(&image, source.as_ref(), &line, bitmap, granularity).await,
        None => remove_all(image.node()).await,
    };
    // What came before a failure stays.
    let stored = store(image.node()).await;
    for opened in [Some(image), source].into_iter().flatten() {
        images.close(opened).await?;
    }
    images.end().await;
    ended?;
    stored?;
    Ok(0)
}

/// The image of `-b`.
async fn open_source(images: &Images, line: &Line) -> Result<Option<Opened>, Error> {
    let Some(name) = line.get("source-file") else { return Ok(None) };
    let format = line.get("source-format");
    let wanted = Wanted { name, format, exclusive: true, no_backing: true, ..Wanted::default() };
    images.open(&wanted).await.map(Some)
}

/// Does what the command line says, in its order.
async fn change(
    image: &Opened,
    source: Option<&Opened>,
    line: &Line,
    bitmap: &str,
    granularity: Option<u64>,
) -> Result<(), Failed> {
    let node = image.node();
    let actions = line.iter().filter(|(option, _)| ACTIONS.contains(option));
    for (action, value) in actions {
        let done = match action {
            "add" => {
                let name = bitmap.to_owned();
                let new = NewBitmap { name, granularity, persistent: true, disabled: false };
                node.add_bitmap(new).await
            }
            "remove" => node.remove_bitmap(bitmap).await,
            "clear" => node.clear_bitmap(bitmap).await,
            "enable" | "disable" => node.enable_bitmap(bitmap, action == "enable").await,
            _ => {
                let from = source.unwrap_or(image).node().clone();
                node.merge_bitmaps(bitmap, &[(from, value.to_owned())]).await
            }
        };
        done.map_err(|e| {
            Failed::from(e.at(format!("Operation {action} on bitmap {bitmap} failed")))
        })?;
    }
    Ok(())
}

async fn remove_all(node: &Node) -> Result<(), Failed> {
    for bitmap in node.bitmaps().all() {
        let name = bitmap.name();
        let failed = |e: Error| e.at(format!("Operation remove on bitmap {name} failed"));
        node.remove_bitmap(name).await.map_err(failed)?;
    }
    Ok(())
}

/// Stores an image's persistent bitmaps: before it is closed, so that a failure is known.
pub async fn store(node: &Arc<Node>) -> Result<(), Error> {
    match node.driver().bitmap_store() {
        Some(store) if !node.options().read_only => store.store().await,
        _ => Ok(()),
    }
}
