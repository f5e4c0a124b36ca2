//! `bitmap`: the persistent bitmaps of an image. No driver here keeps any yet.

use super::arguments::{self, IMAGE_OPTS, OBJECT, PLAIN_FORMAT};
use super::{Context, Ended, Failed, Tool};
use crate::cli::getopt::{Line, long_switch, long_valued, valued};
use crate::tools::Wanted;

pub static TOOL: Tool = Tool {
    name: "bitmap",
    about: "Add, remove and change an image's persistent bitmaps",
    options: &[
        valued("b", "", "FILE", "the image with the bitmaps that are merged"),
        PLAIN_FORMAT,
        valued("F", "", "FORMAT", "that image's format"),
        valued("g", "", "SIZE", "the granularity of a new bitmap"),
        OBJECT,
        IMAGE_OPTS,
        long_switch("add", "make the bitmap"),
        long_switch("remove", "remove the bitmap"),
        long_switch("clear", "forget what it has recorded"),
        long_switch("enable", "let it record"),
        long_switch("disable", "let it record no more"),
        long_valued("merge", "SOURCE", "add what another bitmap has recorded"),
    ],
    operands: "FILE BITMAP",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

const ACTIONS: [&str; 6] = ["add", "remove", "clear", "enable", "disable", "merge"];

async fn run(context: &Context, line: Line) -> Ended {
    let granularity = line.get("g").map(|text| arguments::any_number(text, "granularity"));
    let granularity = granularity.transpose()?;
    let mut actions = line.iter().filter(|(option, _)| ACTIONS.contains(option));
    let Some((action, _)) = actions.next() else {
        return Err(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge".into(),
        );
    };
    for (wrong, text) in [
        (granularity.is_some() && !line.has("add"), "granularity only supported with --add"),
        (line.has("F") && !line.has("b"), "-F only supported with -b"),
        (
            line.has("b") && !line.has("merge"),
            "Merge bitmap source file only supported with --merge",
        ),
    ] {
        if wrong {
            return Err(text.into());
        }
    }
    let [name, bitmap] = &*line.operands else {
        return Err("Expecting filename and bitmap name".into());
    };
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let wanted = arguments::wanted(&line, name, "f", "image-opts")?;
    let images = context.images();
    let image = images.open(&Wanted { writable: true, ..wanted }).await?;
    let node = image.node().name().to_owned();
    images.close(image).await?;
    images.end().await;
    let why = match (action, granularity) {
        ("add", Some(size)) if size < 512 || !size.is_power_of_two() => {
            "Granularity must be power of 2 and at least 512".to_owned()
        }
        ("add", _) => format!("Can't store persistent bitmaps to {node}: Operation not supported"),
        _ => format!("Dirty bitmap '{bitmap}' not found"),
    };
    Err(Failed::from(format!("Operation {action} on bitmap {bitmap} failed: {why}")))
}
