//! Circles of files that use each other: none but those listed and explained here.

use std::collections::{BTreeMap, BTreeSet};

use super::{Source, report, sources};

/// The circles there are: the folder or the files' common beginning that holds each, and why it is one.
///
/// A file may always use what the file above it defines (`queue/slow.rs` uses `queue.rs`): a type is declared there,
/// and its parts are below.
const CIRCLES: &[(&str, &str)] = &[
    ("src/block/", "a node owns its driver, drivers own edges to nodes, and the graph opens both"),
    (
        "src/cow/",
        "the state of the tables holds that of batches, journal and suspects, which work on tables",
    ),
    (
        "src/export/core/",
        "a disk owns its hand-over and the watch over it, which report on the disk",
    ),
    (
        "src/export/nbd/",
        "a server begins handshakes that find its exports, and an export starts connections that work on its disk",
    ),
    (
        "src/export/vhost_user_blk/device.rs src/export/vhost_user_blk/queue",
        "a device owns its queues, and requests in flight belong to the device",
    ),
    (
        "src/export/vhost_user_blk/inflight.rs src/export/vhost_user_blk/ring/",
        "a ring tracks its chains in the region, and the region is as long as rings may be",
    ),
    (
        "src/export/vhost_user_blk/options.rs src/export/vhost_user_blk/server.rs",
        "options create the server that keeps them",
    ),
    (
        "src/format/qcow2/create src/format/qcow2/measure.rs",
        "an image is measured by creating it in memory, and creation tells how much it takes",
    ),
    (
        "src/format/qcow2/extensions.rs src/format/qcow2/header.rs",
        "a header holds extensions, which depend on its bits",
    ),
    (
        "src/format/qcow2/",
        "metadata lends every part to the others: space counts references of tables, and tables lie in space",
    ),
    (
        "src/format/qed/",
        "an unclean image is checked when it is opened, and a check reads what opening reads",
    ),
    (
        "src/format/vmdk/",
        "the content ID of a parent is read as opening reads it, and a sparse extent owns the space that it takes from",
    ),
    (
        "src/io/",
        "a worker owns its ring, sources, timers and tasks, and each of them is used through the worker's handle",
    ),
    (
        "src/protocol/file/",
        "the entry names the driver and its options, and the driver asks the entry how files grow",
    ),
    (
        "src/protocol/nbd/",
        "an export's shared state has the links of its workers, which take connections from it and give them back",
    ),
    (
        "src/protocol/nvme/",
        "an entry makes the shared state of a controller, which is made from the entry's options",
    ),
];

/// A file of the library.
struct Module {
    path: String,
    /// The names that lines of `use` bring in, each with its whole path.
    uses: Vec<Import>,
}

struct Import {
    path: Vec<String>,
    name: String,
}

type Modules = BTreeMap<Vec<String>, Module>;

fn modules() -> Modules {
    let library = sources().into_iter().filter(|source| {
        source.path.starts_with("src/")
            && source.path != "src/main.rs"
            && !source.path.split(['/', '_']).any(|part| part == "tests" || part == "tests.rs")
    });
    library.map(|source| (place(&source.path), module(&source))).collect()
}

/// The module that a file holds: `src/io/ring.rs` is `io::ring`.
fn place(path: &str) -> Vec<String> {
    let path = path.trim_start_matches("src/").trim_end_matches(".rs");
    let mut place: Vec<String> = path.split('/').map(str::to_owned).collect();
    if matches!(place.last().map(String::as_str), Some("mod" | "lib")) {
        place.pop();
    }
    place
}

fn module(source: &Source) -> Module {
    let lines = source.code().into_iter().filter(|(_, _, is_test)| !is_test);
    let code: String = lines.map(|(_, line, _)| line + "\n").collect();
    let here = place(&source.path);
    let mut uses = Vec::new();
    for statement in code.split(';') {
        let lines = statement.lines().map(str::trim);
        let mut lines = lines.skip_while(|line| !starts_use(line));
        let Some(first) = lines.next() else { continue };
        let tree: String =
            first.split_once("use ").map(|(_, tree)| tree.to_owned()).unwrap_or_default()
                + &lines.collect::<String>();
        flatten(&here, &mut Vec::new(), &tree, &mut uses);
    }
    Module { path: source.path.clone(), uses }
}

fn starts_use(line: &str) -> bool {
    line.starts_with("use ") || line.starts_with("pub") && line.contains(" use ")
}

/// The names of a tree such as `super::{a, b::{C, D as E}}`.
fn flatten(here: &[String], before: &mut Vec<String>, tree: &str, uses: &mut Vec<Import>) {
    let tree = tree.trim();
    if let Some(inside) = tree.strip_prefix('{') {
        let inside = inside.trim_end().strip_suffix('}').unwrap_or(inside);
        let (mut depth, mut start) = (0, 0);
        for (at, c) in inside.char_indices().chain([(inside.len(), ',')]) {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    if !inside[start..at].trim().is_empty() {
                        flatten(here, &mut before.clone(), &inside[start..at], uses);
                    }
                    start = at + 1;
                }
                _ => {}
            }
        }
        return;
    }
    if let Some((first, rest)) = tree.split_once("::") {
        before.push(first.trim().to_owned());
        return flatten(here, before, rest, uses);
    }
    let (own, name) = tree.split_once(" as ").unwrap_or((tree, tree));
    if own != "self" {
        before.push(own.trim().to_owned());
    }
    let name = if own == "self" { before.last().cloned() } else { Some(name.trim().to_owned()) };
    let Some(path) = whole(here, before) else { return };
    uses.extend(name.map(|name| Import { path, name }));
}

/// A path from the library's root. A path that begins with a plain name is one into a part of `here`, or into another
/// crate, which has no file here.
fn whole(here: &[String], path: &[String]) -> Option<Vec<String>> {
    let ups = path.iter().take_while(|part| *part == "super").count();
    let (base, rest) = match path.first()?.as_str() {
        "crate" => (&here[..0], &path[1..]),
        "self" => (here, &path[1..]),
        "super" => (&here[..here.len().checked_sub(ups)?], &path[ups..]),
        _ => (here, path),
    };
    Some([base, rest].concat())
}

/// The module that defines what a path names; names that a module only hands on lead to where they come from.
fn definition(modules: &Modules, path: &[String], steps: usize) -> Option<Vec<String>> {
    let length = (1..=path.len()).rev().find(|&length| modules.contains_key(&path[..length]))?;
    let (module, rest) = path.split_at(length);
    let handed_on = rest.first().and_then(|name| {
        let import = modules[module].uses.iter().find(|import| import.name == *name)?;
        (import.path != path && steps > 0).then(|| definition(modules, &import.path, steps - 1))?
    });
    Some(handed_on.unwrap_or_else(|| module.to_vec()))
}

/// What each file uses, but what the files above it define.
fn arrows(modules: &Modules) -> BTreeMap<&str, BTreeSet<&str>> {
    let arrows = modules.iter().map(|(here, module)| {
        let used = module.uses.iter().filter_map(|import| definition(modules, &import.path, 8));
        let used = used.filter(|used| !here.starts_with(used));
        (module.path.as_str(), used.map(|used| modules[&used].path.as_str()).collect())
    });
    arrows.collect()
}

/// All files that can be reached from one.
fn reach<'a>(arrows: &BTreeMap<&'a str, BTreeSet<&'a str>>, from: &str) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut next: Vec<&str> = arrows[from].iter().copied().collect();
    while let Some(file) = next.pop() {
        if reached.insert(file) {
            next.extend(&arrows[file]);
        }
    }
    reached
}

#[test]
fn files_use_each_other_in_listed_circles_only() {
    let modules = modules();
    let arrows = arrows(&modules);
    let reached: BTreeMap<&str, BTreeSet<&str>> =
        arrows.keys().map(|&file| (file, reach(&arrows, file))).collect();
    let mut complaints = Vec::new();
    let mut met = BTreeSet::new();
    for (&file, its_reach) in &reached {
        let circle: Vec<&str> =
            its_reach.iter().copied().filter(|other| reached[other].contains(file)).collect();
        if circle.first() != Some(&file) {
            continue;
        }
        let holds = |beginnings: &str| {
            circle.iter().all(|file| beginnings.split(' ').any(|start| file.starts_with(start)))
        };
        match CIRCLES.iter().position(|(beginnings, _)| holds(beginnings)) {
            Some(listed) => drop(met.insert(listed)),
            None => complaints.push(format!("these use each other: {}", circle.join(" "))),
        }
    }
    let gone = CIRCLES.iter().enumerate().filter(|(listed, _)| !met.contains(listed));
    complaints.extend(gone.map(|(_, (files, _))| format!("{files}: no circle is there any more")));
    report(complaints);
}
