//! `bench`: a simple benchmark of sequential requests.

use super::arguments::{self, FORCE_SHARE, IMAGE_OPTS, PLAIN_FORMAT, QUIET};
use super::{Context, Ended, Failed, Tool, outln};
use crate::cli::getopt::{Line, long_switch, long_valued, switch, valued};
use crate::options::Map;
use crate::tools::bench::{Bench, run as bench};
use crate::tools::{Cache, Wanted, output};
use std::time::Instant;

pub static TOOL: Tool = Tool {
    name: "bench",
    about: "Time sequential requests to an image",
    options: &[
        valued("c", "", "COUNT", "requests in all (75000)").newer(&["count"]),
        valued("d", "", "DEPTH", "requests in parallel (64)").newer(&["depth"]),
        PLAIN_FORMAT,
        long_valued("flush-interval", "N", "flush after every N writes"),
        valued("i", "", "threads|native|io_uring", "all mean io_uring here").newer(&["aio"]),
        switch("n", "", "short for -i native").newer(&["native"]),
        long_switch("no-drain", "flush without waiting for writes in flight"),
        valued("o", "", "OFFSET", "of the first request, in bytes").newer(&["offset"]),
        long_valued("pattern", "BYTE", "what is written (0)"),
        QUIET,
        valued("s", "", "SIZE", "of a request, in bytes (4096)").newer(&["buffer-size"]),
        valued("S", "", "STEP", "from one request to the next, in bytes (the size)")
            .newer(&["step-size"]),
        arguments::CACHE,
        switch("w", "", "write instead of reading").newer(&["write"]),
        FORCE_SHARE,
        IMAGE_OPTS,
    ],
    operands: "FILE",
    usage: "[-c count] [-d depth] [-f fmt] [--flush-interval=flush_interval] [-i aio] [-n] \
             [--no-drain] [-o offset] [--pattern=pattern] [-q] [-s buffer_size] [-S step_size] \
             [-t cache] [-w] [-U] filename",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

/// A plain number, decimal, octal or hexadecimal as C writes it.
fn plain(text: &str, what: &str, max: u64) -> Result<u64, Failed> {
    let mut map = Map::from_iter([("n", text)]);
    let number = map.take_number("n").ok().flatten().filter(|&n| n <= max);
    number.ok_or_else(|| Failed::from(format!("Invalid {what} specified")))
}

/// The values of the options, each checked when its turn comes.
fn parse(line: &Line) -> Result<Bench, Failed> {
    let mut asked = Bench {
        count: 75_000,
        depth: 64,
        size: 4096,
        step: None,
        offset: 0,
        write: line.has("w"),
        pattern: 0,
        flush_interval: 0,
        drain: !line.has("no-drain"),
    };
    let int = i32::MAX as u64;
    for (option, text) in line.iter() {
        match option {
            "c" => asked.count = plain(text, "request count", int)? as u32,
            "d" => asked.depth = plain(text, "queue depth", int)? as u32,
            "flush-interval" => {
                asked.flush_interval = plain(text, "flush interval", int)? as u32;
            }
            "o" => asked.offset = arguments::any_number(text, "offset")?,
            "pattern" => asked.pattern = plain(text, "pattern byte", 0xff)? as u8,
            "s" => asked.size = arguments::number(text, "buffer size", 0, int)?,
            "S" => asked.step = Some(arguments::number(text, "step_size", 0, int)?),
            "t" if Cache::parse(text).is_none() => return Err("Invalid cache mode".into()),
            "i" if !matches!(text, "threads" | "native" | "io_uring") => {
                return Err(format!("Invalid aio option: {text}").into());
            }
            _ => {}
        }
    }
    Ok(asked)
}

async fn run(context: &Context, line: Line) -> Ended {
    let asked = parse(&line)?;
    let name = arguments::one_operand(&line)?;
    if !asked.write && asked.flush_interval > 0 {
        return Err("--flush-interval is only available in write tests".into());
    }
    if asked.flush_interval > 0 && asked.flush_interval < asked.depth {
        return Err("Flush interval can't be smaller than depth".into());
    }
    if asked.depth == 0 {
        return Err("Invalid queue depth specified".into());
    }
    let cache = arguments::cache(&line, "t", "cache", Cache::WRITEBACK)?;
    if (line.has("n") || line.get("i") == Some("native")) && !cache.direct {
        return Err(format!(
            "Could not open '{name}': aio=native was specified, but it requires cache.direct=on, \
             which was not specified."
        )
        .into());
    }
    let wanted = arguments::wanted(&line, name, "f", "image-opts")?;
    let images = context.images();
    let image = images.open(&Wanted { writable: asked.write, cache, ..wanted }).await?;
    outln!(
        "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})",
        asked.count,
        if asked.write { "write" } else { "read" },
        asked.size,
        asked.depth,
        asked.offset,
        asked.step.unwrap_or(asked.size),
    );
    if asked.flush_interval > 0 {
        let how = if asked.drain { "" } else { "without draining " };
        outln!("Sending {how}flush every {} requests", asked.flush_interval);
    }
    output::flush();
    let begin = Instant::now();
    let image = std::rc::Rc::new(image);
    bench(&image, &asked).await.map_err(|errno| format!("Failed request: {errno}"))?;
    outln!("Run completed in {:.3} seconds.", begin.elapsed().as_secs_f64());
    if let Ok(image) = std::rc::Rc::try_unwrap(image) {
        images.close(image).await?;
    }
    images.end().await;
    Ok(0)
}
