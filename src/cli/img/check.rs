//! `check`: finds and repairs what is wrong in an image's own records.

use super::arguments::{
    self, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, QUIET, SOURCE_CACHE,
};
use super::{Context, Ended, Failed, Tool, outln};
use crate::block::{CheckReport, Features, Fix};
use crate::cli::getopt::{Line, valued};
use crate::options::{Map, Value, json};
use crate::tools::output::errln;
use crate::tools::{Cache, Images, Opened, Wanted};

pub static TOOL: Tool = Tool {
    name: "check",
    about: "Check an image's own records, and repair them",
    options: &[
        OBJECT,
        IMAGE_OPTS,
        QUIET,
        FORMAT,
        OUTPUT,
        valued("r", "repair", "leaks|all", "repair leaked clusters, or all that is wrong"),
        SOURCE_CACHE.newer(&["cache", "source-cache"]),
        FORCE_SHARE,
    ],
    operands: "FILE",
    usage: "[--object objectdef] [--image-opts] [-q] [-f fmt] [--output=ofmt] [-r [leaks | \
             all]] [-T src_cache] [-U] filename",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

/// Exit codes beside 0 and 1.
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const NOT_SUPPORTED: u8 = 63;

async fn run(context: &Context, line: Line) -> Ended {
    let mut fix = Fix::Nothing;
    for text in line.all("repair") {
        fix = match text {
            "leaks" => Fix::Leaks,
            "all" => Fix::All,
            other => {
                return Err(Failed::usage(format!(
                    "Unknown option value for -r (expecting 'leaks' or 'all'): {other}"
                )));
            }
        };
    }
    let name = arguments::one_operand(&line)?;
    let json = arguments::json(&line)?;
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let cache = arguments::cache(&line, "T", "source cache", Cache::WRITEBACK)?;
    let wanted = arguments::wanted(&line, name, "format", "image-opts")?;
    let writable = fix != Fix::Nothing;
    let images = context.images_to_check();
    let image = images.open(&Wanted { writable, cache, no_backing: true, ..wanted }).await?;
    let ended = check(&images, image, &line, fix, json).await;
    images.end().await;
    ended
}

async fn check(images: &Images, image: Opened, line: &Line, fix: Fix, json: bool) -> Ended {
    let say = |text: String| {
        if !line.has("q") {
            outln!("{text}");
        }
    };
    let mut report = run_check(&image, fix).await?;
    if report.corruptions_fixed > 0 || report.leaks_fixed > 0 {
        let (leaks, corruptions) = (report.leaks_fixed, report.corruptions_fixed);
        if !json {
            say(format!(
                "The following inconsistencies were found and repaired:\n\n    {leaks} leaked \
                 clusters\n    {corruptions} corruptions\n\nDouble checking the fixed image now..."
            ));
        }
        let again = run_check(&image, Fix::Nothing).await?;
        report = CheckReport { leaks_fixed: leaks, corruptions_fixed: corruptions, ..again };
    }
    match json {
        true => {
            let value = Value::Map(to_json(&image, &report));
            say(json::to_pretty_text(&value));
        }
        false => human(&report).iter().for_each(|text| say(text.clone())),
    }
    images.close(image).await?;
    Ok(match report {
        CheckReport { check_errors: 1.., .. } => return Err("Check failed".to_owned().into()),
        CheckReport { corruptions: 1.., .. } => CORRUPT,
        CheckReport { leaks: 1.., .. } => LEAKS,
        _ => 0,
    })
}

/// One check. Its findings are printed on standard error.
async fn run_check(image: &Opened, fix: Fix) -> Result<CheckReport, Failed> {
    let driver = image.node().driver();
    let wanted = if fix == Fix::Nothing { Features::CHECKS } else { Features::REPAIRS };
    let Some(whole) = driver.image().filter(|_| driver.entry().features.contains(wanted)) else {
        let unsupported = Failed::from("This image format does not support checks");
        return Err(unsupported.code(NOT_SUPPORTED));
    };
    let mut say = |line: &str| errln!("{line}");
    Ok(whole.check(fix, &mut say).await?)
}

fn human(report: &CheckReport) -> Vec<String> {
    let mut lines = Vec::new();
    let CheckReport { corruptions, leaks, check_errors, .. } = *report;
    if corruptions == 0 && leaks == 0 && check_errors == 0 {
        lines.push("No errors were found on the image.".into());
    }
    if corruptions > 0 {
        lines.push(format!(
            "\n{corruptions} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it."
        ));
    }
    if leaks > 0 {
        lines.push(format!(
            "\n{leaks} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data."
        ));
    }
    if check_errors > 0 {
        lines.push(format!("\n{check_errors} internal errors have occurred during the check."));
    }
    let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
    let CheckReport { total_clusters: total, allocated_clusters: allocated, .. } = *report;
    if total > 0 && allocated > 0 {
        lines.push(format!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(report.fragmented_clusters, allocated),
            percent(report.compressed_clusters, allocated),
        ));
    }
    if report.image_end_offset > 0 {
        lines.push(format!("Image end offset: {}", report.image_end_offset));
    }
    lines
}

/// As ImageCheck of QMP, its keys in qemu-img's order; what is nothing is left out, as there.
fn to_json(image: &Opened, report: &CheckReport) -> Map {
    let mut map = Map::new();
    let some = |map: &mut Map, key: &str, count: u64| {
        if count > 0 {
            map.insert(key, count);
        }
    };
    some(&mut map, "image-end-offset", report.image_end_offset);
    some(&mut map, "compressed-clusters", report.compressed_clusters);
    some(&mut map, "total-clusters", report.total_clusters);
    some(&mut map, "corruptions-fixed", report.corruptions_fixed);
    some(&mut map, "corruptions", report.corruptions);
    map.insert("check-errors", report.check_errors);
    some(&mut map, "leaks-fixed", report.leaks_fixed);
    some(&mut map, "leaks", report.leaks);
    some(&mut map, "allocated-clusters", report.allocated_clusters);
    map.insert("filename", &*image.name);
    map.insert("format", image.format());
    some(&mut map, "fragmented-clusters", report.fragmented_clusters);
    map
}
