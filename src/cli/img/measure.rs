//! `measure`: computes the length of a new image's file.

use super::arguments::{self, FORCE_SHARE, IMAGE_OPTS, OBJECT, OUTPUT, PLAIN_FORMAT};
use super::{Context, Ended, Failed, Tool, outln};
use crate::block::{Error, Measurement};
use crate::cli::getopt::{Line, long_valued, valued};
use crate::drivers;
use crate::options::{Map, Value, json, qemuopts};
use crate::tools::Wanted;

pub static TOOL: Tool = Tool {
    name: "measure",
    about: "Tell the size that a new image's file would have",
    options: &[
        OUTPUT,
        valued("O", "", "FORMAT", "the new image's format: raw or qcow2 (raw)")
            .newer(&["target-format"]),
        valued("o", "", "OPTIONS", "options of the new image: NAME=VALUE,…").newer(&["options"]),
        long_valued("size", "N", "the size of a new, empty disk").newer(&["s"]),
        OBJECT,
        IMAGE_OPTS,
        PLAIN_FORMAT,
        valued("l", "", "SNAPSHOT", "the internal snapshot to convert").newer(&["snapshot"]),
        FORCE_SHARE,
    ],
    operands: "[FILE]",
    usage: "[--output=ofmt] [-O output_fmt] [-o options] [--size N | [--object objectdef] \
             [--image-opts] [-f fmt] [-l snapshot_param] filename]",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

async fn run(context: &Context, line: Line) -> Ended {
    for text in line.all("o") {
        arguments::check_option_list(text)?;
    }
    let snapshot = line.get("l").map(arguments::Snapshot::parse).transpose()?;
    let json = arguments::json(&line)?;
    let size = line.get("size").map(|text| arguments::any_number(text, "image size"));
    let size = size.transpose()?;
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let filename = match &*line.operands {
        [] => None,
        [name] => Some(name),
        _ => return Err("At most one filename argument is allowed.".into()),
    };
    if filename.is_none() && (line.has("image-opts") || line.has("f") || snapshot.is_some()) {
        return Err("--image-opts, -f, and -l require a filename argument.".into());
    }
    if filename.is_none() && size.is_none() {
        return Err("Either --size N or one filename must be specified.".into());
    }
    if filename.is_some() && size.is_some() {
        return Err("--size N cannot be used together with a filename.".into());
    }
    let images = context.images();
    let image = match filename {
        Some(name) => {
            let wanted = arguments::wanted(&line, name, "f", "image-opts")?;
            Some(images.open(&Wanted { exclusive: false, ..wanted }).await?)
        }
        None => None,
    };
    if let (Some(image), Some(snapshot)) = (&image, &snapshot) {
        snapshot.load(image).await?;
    }
    let format = line.get("O").unwrap_or("raw");
    let registry = drivers::registry();
    let driver = arguments::format(format)?;
    let refused = |kind: &str, name: &str| {
        Failed::from(format!("{kind} driver '{name}' does not support image creation"))
    };
    let Some(create) = driver.create else { return Err(refused("Format", format)) };
    let mut given = Map::new();
    for text in line.all("o") {
        let parsed = qemuopts::parse(text, None).map_err(|e| e.to_string())?;
        if parsed.help {
            return Err(format!(
                "Invalid parameter 'help'\nInvalid options for file format '{format}'"
            )
            .into());
        }
        arguments::add_options(&mut given, parsed.options);
    }
    let file = registry.of_files().ok();
    let known = crate::block::create_options(driver, file)?;
    let options = crate::block::create::take_options(&known, given).map_err(|error| {
        context.fail(&Failed::from(Error::from(error)));
        format!("Invalid options for file format '{format}'")
    })?;
    let Some(measure) = create.measure else {
        return Err(format!("Block driver '{format}' does not support size measurement").into());
    };
    let source = image.as_ref().map(|image| image.node());
    let measured = measure(options, size.unwrap_or_default(), source).await?;
    if let Some(image) = image {
        images.close(image).await?;
    }
    images.end().await;
    match json {
        true => outln!("{}", json::to_pretty_text(&to_json(&measured))),
        false => {
            outln!("required size: {}", measured.required);
            outln!("fully allocated size: {}", measured.fully_allocated);
            if let Some(bytes) = measured.bitmaps {
                outln!("bitmaps size: {bytes}");
            }
        }
    }
    Ok(0)
}

fn to_json(measured: &Measurement) -> Value {
    let mut map = Map::new();
    if let Some(bytes) = measured.bitmaps {
        map.insert("bitmaps", bytes);
    }
    map.insert("required", measured.required);
    map.insert("fully-allocated", measured.fully_allocated);
    Value::Map(map)
}
