//! `info`: describes an image and, if asked, its backing chain.

use super::arguments::{self, CACHE, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT};
use super::{Context, Ended, Failed, Tool, outln, snapshot_list};
use crate::block::{Image, ImageInfo, Listed, Traits};
use crate::cli::getopt::{Line, long_switch};
use crate::options::{Map, Value, filename, json, size};
use crate::tools::{Cache, Images, Opened, Wanted};

/// How buffers are aligned that tools make themselves, in bytes.
const BUFFER_ALIGN: u32 = 4096;

pub static TOOL: Tool = Tool {
    name: "info",
    about: "Tell about an image",
    options: &[
        OBJECT,
        IMAGE_OPTS,
        FORMAT,
        OUTPUT,
        long_switch("backing-chain", "describe all images below it, too"),
        long_switch("", "show the limits and alignments of requests").newer(&["limits"]),
        CACHE,
        FORCE_SHARE,
    ],
    operands: "FILE",
    usage: "[--object objectdef] [--image-opts] [-f fmt] [--output=ofmt] [--backing-chain] [-U] \
             filename",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

async fn run(context: &Context, line: Line) -> Ended {
    let json = arguments::json(&line)?;
    let name = arguments::one_operand(&line)?;
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let images = context.images_to_tell();
    let cache = arguments::cache(&line, "t", "cache", Cache::WRITEBACK)?;
    let top = arguments::wanted(&line, name, "format", "image-opts")?;
    let chain = line.has("backing-chain");
    let all = collect(&images, Wanted { cache, ..top }, chain).await;
    images.end().await;
    let mut all = all?;
    if !line.has("limits") {
        all.iter_mut().for_each(|about| about.limits = None);
    }
    if json {
        let values = all.iter().map(|about| Value::Map(about.json()));
        let value = match chain {
            true => Value::List(values.collect()),
            false => values.into_iter().next().unwrap_or(Value::Null),
        };
        outln!("{}", json::to_pretty_text(&value));
    } else {
        for (index, about) in all.iter().enumerate() {
            if index > 0 {
                outln!();
            }
            about.print();
        }
    }
    Ok(0)
}

/// The description of one image.
struct About {
    filename: String,
    format: &'static str,
    virtual_size: u64,
    /// Bytes on the disk, if that is known.
    actual_size: Option<u64>,
    /// Where the backing file is, seen from here.
    full_backing: Option<String>,
    /// Whether the driver describes itself at all.
    known: bool,
    info: ImageInfo,
    limits: Option<Map>,
}

async fn collect(images: &Images, top: Wanted<'_>, chain: bool) -> Result<Vec<About>, Failed> {
    let mut all: Vec<About> = Vec::new();
    let mut seen = vec![top.name.to_owned()];
    let mut next = Some((top.name.to_owned(), top.format.map(str::to_owned)));
    while let Some((name, format)) = next.take() {
        let wanted = Wanted {
            name: &name,
            // Only the first one is named by the user.
            image_opts: top.image_opts && all.is_empty(),
            format: format.as_deref(),
            force_share: top.force_share,
            cache: top.cache,
            no_backing: true,
            ..Wanted::default()
        };
        let image = images.open(&wanted).await?;
        let about = About::of(&image).await;
        images.close(image).await?;
        if let Some(backing) = about.full_backing.as_ref().filter(|_| chain) {
            if seen.contains(backing) {
                return Err(format!("Backing file '{backing}' creates an infinite loop.").into());
            }
            seen.push(backing.clone());
            next = Some((backing.clone(), about.info.backing_format.clone()));
        }
        all.push(about);
    }
    Ok(all)
}

impl About {
    async fn of(image: &Opened) -> About {
        let driver = image.node().driver();
        let (info, actual_size) = match driver.image() {
            Some(reported) => (reported.info(), reported.allocated().await.ok()),
            None => (ImageInfo::default(), Some(0)),
        };
        let filename = image.filename();
        let full_backing = info.backing_filename.as_ref().map(|backing| {
            let own = driver.filename().unwrap_or_default();
            filename::resolve(&own, backing).unwrap_or_else(|_| backing.clone())
        });
        let known = actual_size.is_some() && driver.image().is_some_and(Image::has_info);
        About {
            filename,
            format: image.format(),
            virtual_size: image.len(),
            actual_size,
            full_backing,
            known,
            info,
            limits: Some(limits(&image.node().traits())),
        }
    }

    fn print(&self) {
        outln!("image: {}", self.filename);
        outln!("file format: {}", self.format);
        outln!("virtual size: {} ({} bytes)", size::human(self.virtual_size), self.virtual_size);
        match self.actual_size {
            Some(bytes) => outln!("disk size: {}", size::human(bytes)),
            None => outln!("disk size: unavailable"),
        }
        let info = &self.info;
        if info.is_encrypted {
            outln!("encrypted: yes");
        }
        if let Some(bytes) = info.cluster_size {
            outln!("cluster_size: {bytes}");
        }
        if info.is_dirty {
            outln!("cleanly shut down: no");
        }
        if let Some(backing) = &info.backing_filename {
            let full = self.full_backing.as_ref().filter(|full| *full != backing);
            match full {
                Some(full) => outln!("backing file: {backing} (actual path: {full})"),
                None => outln!("backing file: {backing}"),
            }
            if let Some(format) = &info.backing_format {
                outln!("backing file format: {format}");
            }
        }
        if !info.snapshots.is_empty() {
            snapshot_list::print(&info.snapshots);
        }
        if let Some(specific) = &info.specific {
            print_specific(specific);
        }
        if let Some(limits) = &self.limits {
            outln!("Block limits:");
            print_value(&Value::Map(limits.clone()), 1);
        }
    }

    fn json(&self) -> Map {
        let listed = Listed {
            filename: &self.filename,
            format: self.format,
            len: self.virtual_size,
            allocated: self.actual_size,
            full_backing: self.full_backing.as_deref(),
            is_known: self.known,
            info: &self.info,
        };
        let mut map = listed.to_value();
        if let Some(limits) = &self.limits {
            map.insert("limits", Value::Map(limits.clone()));
        }
        map
    }
}

/// BlockLimitsInfo of QMP. What knows no limit of its own is left out.
fn limits(traits: &Traits) -> Map {
    let most = |n: u64| (n < Traits::MAX_TRANSFER.into()).then_some(n);
    let align = |n: u32| (n > traits.request_align).then_some(n.into());
    let optimal = (traits.optimal_io > 0).then_some(traits.optimal_io.into());
    let all: [(&str, Option<u64>); 10] = [
        ("request-alignment", Some(traits.request_align.into())),
        ("max-discard", most(traits.max_discard)),
        ("discard-alignment", align(traits.discard_align)),
        ("max-write-zeroes", most(traits.max_zero)),
        ("write-zeroes-alignment", align(traits.zero_align)),
        ("opt-transfer", optimal),
        ("max-transfer", most(traits.max_transfer.into())),
        ("max-iov", Some(traits.max_segments.into())),
        ("min-mem-alignment", Some(traits.buffer_align.into())),
        ("opt-mem-alignment", Some(traits.buffer_align.max(BUFFER_ALIGN).into())),
    ];
    all.into_iter().filter_map(|(key, limit)| Some((key, limit?))).collect()
}

/// What only one format has to tell.
pub fn print_specific(specific: &Value) {
    if let Value::Map(specific) = specific
        && let Some(data) = specific.get("data")
    {
        outln!("Format specific information:");
        print_value(data, 1);
    }
}

/// Values on lines of their own, four blanks to a level, the names of keys as people read them.
fn print_value(value: &Value, depth: usize) {
    let indent = "    ".repeat(depth);
    let line = |name: String, value: &Value| match value {
        Value::Map(_) | Value::List(_) => {
            outln!("{indent}{name}:");
            print_value(value, depth + 1);
        }
        plain => outln!("{indent}{name}: {}", plain_text(plain)),
    };
    match value {
        Value::Map(map) => {
            map.iter().for_each(|(key, value)| line(key.replace('-', " "), value));
        }
        Value::List(list) => {
            list.iter().enumerate().for_each(|(index, value)| line(format!("[{index}]"), value));
        }
        plain => outln!("{indent}{}", plain_text(plain)),
    }
}

fn plain_text(value: &Value) -> String {
    match value {
        Value::Bool(value) => value.to_string(),
        Value::Int(number) => number.to_string(),
        Value::Num(number) => number.to_string(),
        Value::Text(text) | Value::Str(text) => text.clone(),
        _ => "null".into(),
    }
}
