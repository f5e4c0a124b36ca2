//! `dd`: copies blocks of an image to a new one.

use super::arguments::{self, FORCE_SHARE, IMAGE_OPTS, OBJECT, PLAIN_FORMAT};
use super::{Context, Ended, Failed, Tool, convert};
use crate::block::create_options;
use crate::cli::getopt::{Line, valued};
use crate::copy::{Copy, Part, Source, Trouble, copy};
use crate::drivers;
use crate::options::Map;
use crate::tools::{Images, Opened, Wanted};
use std::sync::Arc;

pub static TOOL: Tool = Tool {
    name: "dd",
    about: "Copy blocks of an image to a new image",
    options: &[
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
        PLAIN_FORMAT,
        valued("O", "", "FORMAT", "the new image's format (raw)").newer(&["output-format"]),
    ],
    operands: "[bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT of=OUTPUT",
    usage: "[--image-opts] [-U] [-f fmt] [-O output_fmt] [bs=block_size] [count=blocks] \
             [skip=blocks] if=input of=output",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

/// Pieces in flight at the same time.
const PARALLEL: usize = 8;

/// What the operands say.
struct Asked<'a> {
    /// Bytes in a block.
    block: u64,
    count: Option<u64>,
    skip: u64,
    input: &'a str,
    output: &'a str,
}

impl Asked<'_> {
    fn parse(line: &Line) -> Result<Asked<'_>, Failed> {
        let (mut block, mut count, mut skip) = (512, None, 0);
        let (mut input, mut output) = (None, None);
        for operand in &line.operands {
            let unknown = |name: &str| Failed::from(format!("unrecognized operand {name}"));
            let (name, value) = operand.split_once('=').ok_or_else(|| unknown(operand))?;
            match name {
                "bs" => block = arguments::number(value, "bs", 1, i32::MAX as u64)?,
                "count" => count = Some(arguments::any_number(value, "count")?),
                "skip" => skip = arguments::any_number(value, "skip")?,
                "if" => input = Some(value),
                "of" => output = Some(value),
                other => return Err(unknown(other)),
            }
        }
        let (Some(input), Some(output)) = (input, output) else {
            return Err("Must specify both input and output files".into());
        };
        Ok(Asked { block, count, skip, input, output })
    }
}

async fn run(context: &Context, line: Line) -> Ended {
    let asked = Asked::parse(&line)?;
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let images = context.images();
    let wanted = arguments::wanted(&line, asked.input, "f", "image-opts")?;
    let source = images.open(&wanted).await?;
    let ended = copy_to_new(context, &images, &line, &asked, &source).await;
    images.close(source).await?;
    images.end().await;
    ended
}

async fn copy_to_new(
    context: &Context,
    images: &Images,
    line: &Line,
    asked: &Asked<'_>,
    source: &Opened,
) -> Ended {
    let registry = drivers::registry();
    let format = line.get("O").unwrap_or("raw");
    let driver = registry.get(format).ok_or("Unknown file format")?;
    let mut file = registry.new_file(asked.output)?;
    let protocol = file.take_required_str("driver").map_err(|e| e.to_string())?;
    create_options(driver, registry.get(&protocol))?;
    // Counted from the input's start, what is skipped included.
    let most = asked.count.and_then(|count| count.checked_mul(asked.block));
    let end = most.map_or(source.len(), |most| most.min(source.len()));
    let start = asked.skip.checked_mul(asked.block).filter(|&start| start <= end);
    let len = start.map_or(0, |start| end - start);
    let at = |e: crate::block::Error| {
        e.at(format!("{}: error while creating output image", asked.output))
    };
    let creation = drivers::creation(format, asked.output, Map::new(), Some(len));
    context.unfinished.begin(asked.output);
    creation.map_err(at)?.run().await.map_err(at)?;
    let wanted =
        Wanted { name: asked.output, format: Some(format), writable: true, ..Wanted::default() };
    let target = images.open(&wanted).await?;
    let Some(start) = start else {
        context.error(&format!("{}: cannot skip to specified offset", asked.input));
        return Ok(0);
    };
    let work = Copy {
        sources: vec![Source { disk: source.disk(), from: start, len }],
        target: target.disk(),
        parallel: PARALLEL,
        in_order: true,
        compress: false,
        sparse: None,
        keeps_data: true,
        zero_from: u64::MAX,
        part: Part::Whole,
        salvage: false,
    };
    let (helpers, progress) = (convert::helpers(PARALLEL), Arc::new(context.progress(line)));
    let copied = copy(work, &helpers, convert::hooks(None, &progress)).await;
    drop(helpers);
    progress.end();
    copied.map_err(|trouble| match trouble {
        Trouble::Read(_, errno) | Trouble::Status(_, errno) => {
            format!("error while reading from input image file: {errno}")
        }
        Trouble::Write(_, errno) => format!("error while writing to output image file: {errno}"),
        other => other.to_string(),
    })?;
    images.close(target).await?;
    context.unfinished.end();
    Ok(0)
}
