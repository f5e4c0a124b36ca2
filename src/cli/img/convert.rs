//! `convert`: copies one or several images to a new one, in any format.

use super::arguments::{
    self, CACHE, FORCE_SHARE, IMAGE_OPTS, OBJECT, PLAIN_FORMAT, PROGRESS, QUIET, SOURCE_CACHE,
};
use super::{Context, Ended, Failed, Tool, bitmap_copy, option_help};
use crate::block::create::Made;
use crate::block::{Error, Features, ZeroFlags, create_options, extents};

use crate::cli::getopt::{Line, long_switch, switch, valued};
use crate::copy::{Control, Copy, Hooks, Part, Source, Trouble, copy};
use crate::drivers;
use crate::io::{Worker, WorkerOptions};
use crate::options::{Map, Value, qemuopts};
use crate::tools::{Cache, Images, Opened, Progress, Wanted};
use std::sync::Arc;

pub static TOOL: Tool = Tool {
    name: "convert",
    about: "Copy images to a new one, in any format",
    options: &[
        OBJECT,
        IMAGE_OPTS,
        long_switch("target-image-opts", "the target is named by a string of options"),
        long_switch("target-is-zero", "the target, which exists, reads as zeroes"),
        long_switch("bitmaps", "copy the persistent bitmaps, too"),
        long_switch("skip-broken-bitmaps", "with --bitmaps, leave out inconsistent ones"),
        FORCE_SHARE,
        switch("C", "", "pass data on as it is, without a look for zeroes").newer(&["copy-range"]),
        switch("c", "", "compress").newer(&["compress"]),
        PROGRESS,
        QUIET,
        switch("n", "", "do not create the target: it exists").newer(&["no-create"]),
        PLAIN_FORMAT.newer(&["source-format", "format"]),
        CACHE.newer(&["target-cache", "cache"]),
        SOURCE_CACHE.newer(&["source-cache"]),
        valued("O", "", "FORMAT", "the new image's format (raw)").newer(&["target-format"]),
        valued("B", "", "FILE", "the new image's backing file").newer(&["b", "backing"]),
        valued("F", "", "FORMAT", "the backing file's format").newer(&["backing-format"]),
        valued("o", "", "OPTIONS", "options of the new image: NAME=VALUE,…; help lists them")
            .newer(&["options"]),
        valued("l", "", "SNAPSHOT", "the internal snapshot to copy").newer(&["snapshot"]),
        valued("S", "", "SIZE", "least run of zeroes that becomes a hole (4k); 0: none does")
            .newer(&["sparse-size"]),
        valued("r", "", "RATE", "bytes in a second, at most").newer(&["rate-limit"]),
        valued("m", "", "N", "pieces on their way at the same time (8)").newer(&["parallel"]),
        switch("W", "", "write in any order").newer(&["oob"]),
        long_switch("salvage", "what cannot be read becomes zeroes"),
    ],
    operands: "FILE… TARGET",
    usage: "[--object objectdef] [--image-opts] [--target-image-opts] [--target-is-zero] \
             [--bitmaps] [-U] [-C] [-c] [-p] [-q] [-n] [-f fmt] [-t cache] [-T src_cache] [-O \
             output_fmt] [-B backing_file [-F backing_fmt]] [-o options] [-l snapshot_param] [-S \
             sparse_size] [-r rate_limit] [-m num_coroutines] [-W] [--salvage] filename \
             [filename2 [...]] output_filename",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

/// Most images in flight at the same time.
const MOST_PARALLEL: u64 = 16;
/// Longest run that `-S` may ask for, in bytes.
const MOST_SPARSE: u64 = 16 << 20;
const NOT_COMPRESSED: &str = "Compression not supported for this file format";

/// What the options say of how to copy.
struct Asked {
    sparse: Option<u64>,
    rate: Option<u64>,
    parallel: usize,
    snapshot: Option<arguments::Snapshot>,
    /// Those of `-o`, as text.
    options: Map,
    wants_help: bool,
}

impl Asked {
    fn parse(line: &Line) -> Result<Asked, Failed> {
        let mut asked = Asked {
            sparse: Some(4096),
            rate: None,
            parallel: 8,
            snapshot: None,
            options: Map::new(),
            wants_help: false,
        };
        for (option, text) in line.iter() {
            match option {
                "o" => {
                    arguments::check_option_list(text)?;
                    let parsed = qemuopts::parse(text, None).map_err(|e| e.to_string())?;
                    asked.wants_help |= parsed.help;
                    arguments::add_options(&mut asked.options, parsed.options);
                }
                "l" => asked.snapshot = Some(arguments::Snapshot::parse(text)?),
                "S" => asked.sparse = parse_sparse(text)?,
                "r" => asked.rate = Some(arguments::any_number(text, "rate limit")?),
                "m" => {
                    let parallel = text.parse().ok().filter(|n| (1..=MOST_PARALLEL).contains(n));
                    asked.parallel = parallel.ok_or_else(|| {
                        format!(
                            "Invalid number of coroutines. Allowed number of coroutines is \
                             between 1 and {MOST_PARALLEL}"
                        )
                    })? as usize;
                }
                _ => {}
            }
        }
        Ok(asked)
    }
}

fn parse_sparse(text: &str) -> Result<Option<u64>, Failed> {
    let what = "buffer size for sparse output";
    let size = arguments::any_number(text, what)?;
    if size % 512 != 0 || size > MOST_SPARSE {
        return Err(format!(
            "Invalid {what} specified. Valid sizes are multiples of 512 up to {MOST_SPARSE}. \
             Select 0 to disable sparse detection (fully allocates output)."
        )
        .into());
    }
    Ok((size > 0).then_some(size))
}

/// Options that cannot be had together.
fn check_combinations(line: &Line) -> Result<(), Failed> {
    let has = |key| line.has(key);
    for (wrong, text) in [
        (
            has("skip-broken-bitmaps") && !has("bitmaps"),
            "Use of --skip-broken-bitmaps requires --bitmaps",
        ),
        (has("C") && has("S"), "Cannot enable copy offloading when -S is used"),
        (has("C") && has("c"), "Cannot enable copy offloading when -c is used"),
        (has("target-image-opts") && !has("n"), "--target-image-opts requires use of -n flag"),
        (has("target-is-zero") && !has("n"), "--target-is-zero requires use of -n flag"),
        (has("n") && has("o"), "-o has no effect when skipping image creation"),
        (has("C") && has("salvage"), "Cannot use copy offloading in salvaging mode"),
        (has("target-image-opts") && has("O"), "--image-opts and --format are mutually exclusive"),
    ] {
        if wrong {
            return Err(text.into());
        }
    }
    Ok(())
}

async fn run(context: &Context, line: Line) -> Ended {
    let asked = Asked::parse(&line)?;
    check_combinations(&line)?;
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let format = line.get("O").unwrap_or("raw");
    let target = if line.operands.len() > 1 { line.operands.last() } else { None };
    if asked.wants_help {
        option_help::print(context, format, target.map(|name| &**name))?;
        return Ok(0);
    }
    let Some((target, names)) = line.operands.split_last().filter(|(_, names)| !names.is_empty())
    else {
        return Err("Must specify image file name".into());
    };
    let images = context.images();
    let ended = convert(context, &images, &line, asked, names, target).await;
    images.end().await;
    ended
}

async fn convert(
    context: &Context,
    images: &Images,
    line: &Line,
    asked: Asked,
    names: &[String],
    target: &str,
) -> Ended {
    let cache = arguments::cache(line, "T", "source cache", Cache::WRITEBACK)?;
    if line.has("bitmaps") && names.len() > 1 {
        return Err("Copying bitmaps only possible with single source".into());
    }
    let mut sources = Vec::new();
    for name in names {
        let wanted = arguments::wanted(line, name, "f", "image-opts")?;
        sources.push(images.open(&Wanted { cache, exclusive: true, ..wanted }).await?);
    }
    let len = sources.iter().map(|source| source.len()).sum();
    if let Some(snapshot) = &asked.snapshot {
        if sources.len() > 1 {
            return Err("No support for concatenating multiple snapshot".into());
        }
        snapshot.load(&sources[0]).await?;
    }
    let Asked { sparse, rate, parallel, options, .. } = asked;
    let target = open_target(context, images, line, (target, options), len, &sources).await?;
    if line.has("bitmaps") {
        bitmap_copy::check_target(target.image.node())?;
    }
    if target.image.len() < len {
        return Err("output file is smaller than input file".into());
    }
    let zero_from = known_zeroes(line, &target, len, sparse.is_some()).await?;
    let Target { image: target, has_backing, .. } = target;
    let base = if has_backing { extents::backing(sources[0].node()) } else { None };
    let progress = Arc::new(context.progress(line));
    progress.set(0.0);
    let work = Copy {
        sources: sources.iter().map(|source| Source::whole(source.disk())).collect(),
        target: target.disk(),
        parallel,
        in_order: !line.has("W"),
        compress: line.has("c"),
        sparse,
        keeps_data: line.has("C"),
        zero_from,
        part: base.map_or(Part::Whole, Part::Above),
        salvage: line.has("salvage"),
    };
    let quiet = line.has("q");
    let (clone, shown) = (context.clone(), progress.clone());
    let salvaged = Box::new(move |at: u64, errno: crate::io::Errno| {
        if !quiet {
            let text = format!("error while reading offset {at}: {errno}");
            shown.aside(|| clone.warn(&text));
        }
    });
    let helpers = helpers(parallel);
    let hooks = Hooks { salvaged, ..hooks(rate, &progress) };
    let copied = copy(work, &helpers, hooks).await;
    drop(helpers);
    if copied.is_ok() {
        progress.set(100.0);
    }
    progress.end();
    copied.map_err(describe)?;
    if line.has("bitmaps") {
        bitmap_copy::copy(context, sources[0].node(), target.node()).await?;
    }
    for image in [target].into_iter().chain(sources) {
        images.close(image).await?;
    }
    context.unfinished.end();
    Ok(0)
}

/// Workers beside the one that the tool runs on.
pub(super) fn helpers(parallel: usize) -> Vec<Worker> {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    // One waits for the storage, or for another that writes to the same file; more would wait in turn.
    let count = (processors + 1).min(parallel) - 1;
    let options = WorkerOptions { may_block: true, ..WorkerOptions::default() };
    // Fewer are slower, and that is all.
    (0..count).map_while(|_| Worker::start("convert", options).ok()).collect()
}

/// The parameters and hooks of a tool's copy.
pub(super) fn hooks(rate: Option<u64>, progress: &Arc<Progress>) -> Hooks {
    let progress = progress.clone();
    Hooks {
        control: Arc::new(Control::with_rate(rate)),
        progress: Box::new(move |part, whole| progress.advance(part, whole)),
        salvaged: Box::new(|_, _| {}),
    }
}

pub(super) fn describe(trouble: Trouble) -> Failed {
    trouble.to_string().into()
}

/// Whether a backing file was named, in whichever of the two ways; of a target that exists it is taken
/// on trust.
fn check_backing(line: &Line, options: &Map, sources: &[Opened]) -> Result<bool, Failed> {
    let backing = match line.has("n") {
        true => line.get("B"),
        false => options.get("backing_file").and_then(Value::as_str),
    };
    let Some(name) = backing else { return Ok(false) };
    if sources.len() > 1 {
        return Err("Having a backing file for the target makes no sense when concatenating \
                    multiple input images"
            .into());
    }
    if !line.has("n") && !options.contains("backing_fmt") {
        return Err("Use of backing file requires explicit backing format".into());
    }
    if name.is_empty() {
        return Err("Expected backing file name, got empty string".into());
    }
    if line.has("target-is-zero") {
        let text = "Cannot use --target-is-zero when the destination image has a backing file";
        return Err(Failed::from(text).code(0));
    }
    Ok(true)
}

/// From which byte on the target is known to read as zeroes.
async fn known_zeroes(line: &Line, target: &Target, len: u64, sparse: bool) -> Result<u64, Failed> {
    if line.has("target-is-zero") {
        return Ok(0);
    }
    if target.made == Some(Made { reads_zeroes: true }) {
        let backing = extents::backing(target.image.node());
        return Ok(backing.map_or(0, |backing| backing.len()));
    }
    if !sparse || target.has_backing {
        return Ok(u64::MAX);
    }
    // All at once, where that is quick.
    let flags = ZeroFlags::UNMAP | ZeroFlags::NO_FALLBACK;
    match target.image.zero(0, len, flags).await {
        Ok(()) => Ok(0),
        Err(errno) if errno.is_unsupported() => Ok(u64::MAX),
        Err(errno) => Err(describe(Trouble::Write(0, errno))),
    }
}

/// The image that is written to.
struct Target {
    image: Opened,
    /// Its backing file supplies what the source takes from its own.
    has_backing: bool,
    /// What its driver reported, if it was made here.
    made: Option<Made>,
}

/// Makes the target, unless it exists, and opens it.
async fn open_target(
    context: &Context,
    images: &Images,
    line: &Line,
    (name, mut options): (&str, Map),
    len: u64,
    sources: &[Opened],
) -> Result<Target, Failed> {
    let registry = drivers::registry();
    let image_opts = line.has("target-image-opts");
    let format = (!image_opts).then(|| line.get("O").unwrap_or("raw"));
    if !line.has("n") {
        let format = format.unwrap_or("raw");
        let driver = arguments::format(format)?;
        let mut file = registry.new_file(name)?;
        let protocol = file.take_required_str("driver").map_err(|e| e.to_string())?;
        create_options(driver, registry.get(&protocol))?;
        for (option, key, what) in
            [("B", "backing_file", "Backing file"), ("F", "backing_fmt", "Backing file format")]
        {
            if let Some(value) = line.get(option) {
                if !driver.records_backing() {
                    return Err(format!("{what} not supported for file format '{format}'").into());
                }
                options.insert(key, Value::Text(value.to_owned()));
            }
        }
    }
    let has_backing = check_backing(line, &options, sources)?;
    if line.has("c") {
        let format = format.unwrap_or("raw");
        // The format that is to be made; the image, if it is there, says so itself when it is written.
        let features = registry.get(format).map_or(Features::empty(), |driver| driver.features);
        if !features.contains(Features::COMPRESSION) && !image_opts {
            return Err(NOT_COMPRESSED.into());
        }
        let encrypts = options.clone().take_opt_bool("encryption").map_err(Error::from)?;
        if encrypts == Some(true) || options.contains("encrypt.format") {
            return Err("Compression and encryption not supported at the same time".into());
        }
        if options.get("preallocation").is_some_and(|mode| mode.as_str() != Some("off")) {
            return Err("Compression and preallocation not supported at the same time".into());
        }
    }
    if options.get("keep_data_file").is_some_and(|keep| keep.as_str() != Some("off")) {
        // What a kept file has would show where nothing is written.
        return Err("A conversion makes its data file: keep_data_file cannot be on".into());
    }
    if line.has("bitmaps") {
        bitmap_copy::check_source(sources[0].node(), line.has("skip-broken-bitmaps"))?;
    }
    let cache = arguments::cache(line, "t", "cache", Cache::UNSAFE)?;
    let mut made = None;
    // What the new image is made with opens it.
    let keys = options.iter().filter(|(name, _)| name.ends_with("key-secret"));
    let more: Map = keys.map(|(name, value)| (name.to_owned(), value.clone())).collect();
    if let (false, Some(format)) = (line.has("n"), format) {
        options.take_size("size").map_err(Error::from)?;
        let creation = drivers::creation(format, name, options, Some(len))?;
        let at = |e: Error| e.at(format!("{name}: error while converting {format}"));
        context.unfinished.begin(name);
        made = Some(creation.run().await.map_err(at)?);
    }
    let wanted = Wanted {
        name,
        image_opts,
        format,
        writable: true,
        unmap: true,
        cache,
        more,
        ..Wanted::default()
    };
    let target = images.open(&wanted).await?;
    if line.has("c") && target.node().compression_unit().is_none() {
        return Err(NOT_COMPRESSED.into());
    }
    context.unfinished.begin(name);
    // Without a backing file nothing is supplied, whatever was said.
    let has_backing = has_backing && extents::backing(target.node()).is_some();
    Ok(Target { image: target, has_backing, made })
}
