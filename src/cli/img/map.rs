//! `map`: which parts of a disk are stored where.

use super::arguments::{self, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT};
use super::{Context, Ended, Failed, Tool, out, outln};
use crate::block::Status;
use crate::block::extents::{self, Run};
use crate::cli::getopt::{Line, valued};
use crate::tools::Opened;

pub static TOOL: Tool = Tool {
    name: "map",
    about: "List which parts of an image are stored where",
    options: &[
        OBJECT,
        IMAGE_OPTS,
        FORMAT,
        valued("s", "start-offset", "OFFSET", "where to begin, in bytes"),
        valued("l", "max-length", "LENGTH", "how far to look, in bytes"),
        OUTPUT,
        FORCE_SHARE,
    ],
    operands: "FILE",
    usage: "[--object objectdef] [--image-opts] [-f fmt] [--start-offset=offset] \
             [--max-length=len] [--output=ofmt] [-U] filename",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

async fn run(context: &Context, line: Line) -> Ended {
    let start = line.get("start-offset").map(|text| arguments::any_number(text, "start offset"));
    let start = start.transpose()?.unwrap_or(0);
    let most = line.get("max-length").map(|text| arguments::any_number(text, "max length"));
    let most = most.transpose()?;
    let json = arguments::json(&line)?;
    let name = arguments::one_operand(&line)?;
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let wanted = arguments::wanted(&line, name, "format", "image-opts")?;
    let images = context.images();
    let image = images.open(&wanted).await?;
    if !json {
        outln!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to");
    }
    let end = most.map_or(image.len(), |most| start.saturating_add(most).min(image.len()));
    let result = list(&image, start, end, json).await;
    images.close(image).await?;
    images.end().await;
    result.map(|()| 0)
}

async fn list(image: &Opened, start: u64, end: u64, json: bool) -> Result<(), Failed> {
    let mut at = start;
    let mut first = true;
    while at < end {
        let run = extents::run(image.node(), at, end - at).await;
        let run = run.map_err(|errno| format!("Failed to read image metadata: {errno}"))?;
        at += run.len;
        match json {
            true => print_json(Some(&run), start, first, at >= end),
            false => print_human(&run)?,
        }
        first = false;
    }
    if first && json {
        print_json(None, start, true, true);
    }
    Ok(())
}

/// A run as qemu-img's JSON has it, one on a line. Without a run, an empty one.
fn print_json(run: Option<&Run>, start: u64, first: bool, last: bool) {
    let has = |status| run.is_some_and(|run| run.has(status));
    out!(
        "{}{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \
         \"data\": {}",
        if first { "[" } else { "" },
        run.map_or(start, |run| run.start),
        run.map_or(0, |run| run.len),
        run.map_or(0, |run| run.depth),
        has(Status::ALLOCATED),
        has(Status::ZERO),
        has(Status::DATA),
    );
    if let Some(Run { file: Some((_, offset)), .. }) = run {
        out!(", \"offset\": {offset}");
    }
    outln!("{}", if last { "}]" } else { "}," });
}

/// A run that holds data, on a line.
fn print_human(run: &Run) -> Result<(), Failed> {
    if !run.has(Status::DATA) || run.has(Status::ZERO) {
        return Ok(());
    }
    let file = run.file.as_ref().and_then(|(node, at)| Some((node.driver().filename()?, at)));
    let Some((filename, offset)) = file else {
        return Err("File contains external, encrypted or compressed clusters.".into());
    };
    let hex = |number: u64| match number {
        0 => "0".to_owned(),
        number => format!("{number:#x}"),
    };
    outln!("{:<16}{:<16}{:<16}{filename}", hex(run.start), hex(run.len), hex(*offset));
    Ok(())
}
