//! The rules of the source tree: arrows between folders, lengths, first lines, and unsafe code.

mod circles;

use std::path::{Path, PathBuf};

/// What the modules of the library may use of each other. `lib.rs` and `main.rs` join everything.
const ARROWS: &[(&str, &[&str])] = &[
    ("io", &["io"]),
    ("crypto", &["crypto", "io", "options"]),
    ("options", &["options"]),
    ("nbd", &["nbd", "io"]),
    ("block", &["block", "io", "options"]),
    ("copy", &["copy", "block", "io"]),
    ("job", &["job", "copy", "block", "io", "options"]),
    ("cow", &["cow", "block", "io"]),
    ("format", &["format", "cow", "crypto", "block", "io", "options"]),
    ("filter", &["filter", "block", "io", "options"]),
    ("protocol", &["protocol", "nbd", "block", "io", "options"]),
    ("drivers", &["format", "filter", "protocol", "block", "options"]),
    ("export", &["export", "nbd", "block", "io", "options"]),
    (
        "monitor",
        &["monitor", "service", "job", "sandbox", "export", "drivers", "block", "io", "options"],
    ),
    ("metrics", &["metrics", "service", "export", "block", "io"]),
    ("service", &["service", "job", "export", "drivers", "crypto", "block", "io", "options"]),
    ("tools", &["tools", "copy", "drivers", "block", "io", "options"]),
    ("sandbox", &["sandbox", "io"]),
    (
        "cli",
        &[
            "cli", "tools", "copy", "monitor", "metrics", "service", "sandbox", "export",
            "drivers", "crypto", "block", "io", "options",
        ],
    ),
];

/// Where unsafe code may be, and why it has to be there.
const UNSAFE: &[(&str, &str)] = &[
    ("src/io/", "the kernel's interfaces and memory shared with the guest"),
    ("src/block/bitmap/recorders.rs", "the list that the fast path reads without a lock"),
    ("src/block/child.rs", "the edge that the fast path reads without a lock"),
    ("src/block/memory.rs", "the promise that guest memory stays mapped"),
    ("src/block/driver/mapping.rs", "the promise that `Leaf::start` asks for"),
    ("src/block/graph/tests.rs", "implements `Leaf::start`"),
    ("src/protocol/null.rs", "implements `Leaf::start`"),
    ("src/protocol/nbd/connect.rs", "a descriptor from the command line"),
    ("src/protocol/nbd/link.rs", "sends and receives that the ring does meanwhile"),
    ("src/protocol/nbd/mod.rs", "implements `Leaf::start`"),
    ("src/protocol/nbd/receive.rs", "memory of a request that is being answered"),
    ("src/protocol/nbd/requests.rs", "memory of a request, on whichever worker"),
    ("src/protocol/nbd/submit.rs", "memory that a request borrows"),
    ("src/protocol/nvme/mod.rs", "implements `Leaf::start`; memory for a device"),
    ("src/protocol/nvme/submit.rs", "memory that a request borrows, for a device"),
    ("src/protocol/sim/", "implements `Leaf::start`"),
    ("src/protocol/file/", "implements `Leaf::start`; system calls on files"),
    ("src/export/core/", "sockets of ours, and poll(2) on them"),
    ("src/export/vhost_user_blk/", "guest memory and its rings"),
    ("src/crypto/", "calls of AWS-LC, and memory that the guest shares"),
    ("src/sandbox/", "what the kernel is asked to forbid, and the signal handlers of that"),
    ("src/monitor/poll.rs", "poll(2), accept4(2), and descriptors from the command line"),
    ("src/cli/", "what a process does once: signals, forking"),
    ("src/tools/nvme/passthrough.rs", "a command to a controller of the kernel's"),
    ("src/service/export_options.rs", "descriptors from the command line"),
    ("vfio/src/dma.rs", "memory that a device reads and writes"),
    ("vfio/src/mmio.rs", "a device's registers"),
    ("vfio/src/real.rs", "calls of VFIO that the crate for it lacks, and its promises on memory"),
    ("tests/", "fixtures that do what exports do"),
    ("vfio/tests/", "fixtures that do what exports do"),
];

const MOST_LINES: usize = 500;

struct Source {
    /// From the root of the tree.
    path: String,
    text: String,
}

impl Source {
    /// The lines without their comments and texts, and whether each is of a test.
    fn code(&self) -> Vec<(usize, String, bool)> {
        let folder = |folder: &str| self.path.split('/').any(|part| part == folder);
        let all_tests = folder("tests") || self.path.ends_with("tests.rs");
        let mut in_tests = false;
        let mut lines = Vec::new();
        for (n, line) in self.text.lines().enumerate() {
            // House style: the tests of a file are its end.
            in_tests |= line.trim() == "#[cfg(test)]";
            lines.push((n + 1, strip(line), all_tests || in_tests));
        }
        lines
    }

    /// The library's module that the file is part of.
    fn module(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src/")?;
        let name = inside.split('/').next()?;
        let name = name.strip_suffix(".rs").unwrap_or(name);
        (!matches!(name, "lib" | "main")).then_some(name)
    }
}

/// A line of code without what is in quotes or behind `//`.
fn strip(line: &str) -> String {
    let mut out = String::new();
    let mut chars = line.chars().peekable();
    let mut quoted = false;
    while let Some(c) = chars.next() {
        match c {
            '\\' if quoted => drop(chars.next()),
            // The quotation mark as a character.
            '\'' if !quoted && chars.peek() == Some(&'"') => drop(chars.next()),
            '"' => quoted = !quoted,
            '/' if !quoted && chars.peek() == Some(&'/') => break,
            _ if quoted => {}
            c => out.push(c),
        }
    }
    out
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn sources() -> Vec<Source> {
    let root = root();
    let mut found = Vec::new();
    let mut folders: Vec<_> = ["src", "tests", "vfio"].map(|name| root.join(name)).into();
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() && name != "target" && !name.starts_with('.') {
                folders.push(path);
            } else if name.ends_with(".rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let path = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
                found.push(Source { path, text });
            }
        }
    }
    assert!(found.len() > 30, "only {} files were found", found.len());
    found
}

/// Fails with all complaints at once.
fn report(complaints: Vec<String>) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn modules_use_only_what_lies_below_them() {
    let modules: Vec<_> = ARROWS.iter().map(|(name, _)| *name).collect();
    let mut complaints = Vec::new();
    for source in sources() {
        let Some(module) = source.module() else { continue };
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == module) else {
            complaints.push(format!("{}: the module has no place in ARROWS", source.path));
            continue;
        };
        for (line, code, test) in source.code() {
            for used in uses(&code, &modules) {
                // Tests may run what is below over simulated disks of the protocol layer.
                let for_tests = test && matches!(module, "format" | "filter" | "export");
                if !allowed.contains(&used) && !for_tests {
                    complaints.push(format!("{}:{line}: {module} uses {used}", source.path));
                }
            }
        }
    }
    report(complaints);
}

/// The modules that a line names after `crate::`, in braces too.
fn uses<'a>(code: &str, modules: &[&'a str]) -> Vec<&'a str> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let names = match rest.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap_or(list),
            None => rest.split([';', ' ', ',', '(', ')', '<', '>']).next().unwrap_or(rest),
        };
        for part in names.split(',') {
            let first = part.trim().split("::").next().unwrap_or_default();
            found.extend(modules.iter().find(|module| **module == first));
        }
    }
    found
}

/// Where the types of exports are known through their list alone.
const NAMES_NO_TRANSPORT: &[&str] =
    &["src/export/core/", "src/monitor/", "src/metrics/", "src/service/", "src/service.rs"];

#[test]
fn only_transports_and_command_lines_name_a_transport() {
    let mut complaints = Vec::new();
    for Source { path, text } in sources() {
        if !NAMES_NO_TRANSPORT.iter().any(|place| path.starts_with(place)) {
            continue;
        }
        for (n, line) in text.lines().enumerate() {
            let line = line.to_lowercase();
            let words = line.split(|c: char| !c.is_alphanumeric());
            let names =
                |word: &str| matches!(word, "vhost" | "virtio" | "virtqueue" | "vring" | "fuse");
            if words.into_iter().any(names) {
                complaints.push(format!("{path}:{}: {}", n + 1, line.trim()));
            }
        }
    }
    report(complaints);
}

/// The files that a text names, in its order: what is in backquotes, with a folder and an ending.
fn named_files(text: &str) -> Vec<&str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|name| name.contains('/') && name.ends_with(".rs")).collect()
}

#[test]
fn the_architecture_names_each_file_once_and_each_is_there() {
    let text = std::fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let named = named_files(&text);
    assert!(named.len() > 30, "only {} files are named", named.len());
    let mut complaints = Vec::new();
    for (n, name) in named.iter().enumerate() {
        if !root().join(name).is_file() {
            complaints.push(format!("docs/architecture.md: {name} is not there"));
        }
        if named[..n].contains(name) {
            complaints.push(format!("docs/architecture.md: {name} is named twice"));
        }
    }
    report(complaints);
}

#[test]
fn every_file_says_what_it_holds_and_is_not_too_long() {
    let mut complaints = Vec::new();
    for Source { path, text } in sources() {
        let lines = text.lines().count();
        if lines > MOST_LINES {
            complaints.push(format!("{path}: {lines} lines, more than {MOST_LINES}"));
        }
        if !text.starts_with("//! ") && !text.starts_with("#![") {
            complaints.push(format!("{path}: does not open with `//!`"));
        }
        if text.lines().nth(1).is_some_and(|line| line.starts_with("//! ")) {
            complaints.push(format!("{path}: its first sentence is longer than its first line"));
        }
    }
    report(complaints);
}

#[test]
fn nothing_unwraps_outside_tests() {
    let mut complaints = Vec::new();
    for source in sources() {
        for (line, code, test) in source.code() {
            if !test && code.contains(".unwrap()") {
                complaints.push(format!("{}:{line}: {}", source.path, code.trim()));
            }
        }
    }
    report(complaints);
}

#[test]
fn unsafe_code_lies_in_listed_files_and_says_why_it_is_sound() {
    let mut complaints = Vec::new();
    for source in sources() {
        let lines: Vec<_> = source.text.lines().collect();
        for (number, code, _) in source.code() {
            let words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
            if !words.into_iter().any(|word| word == "unsafe") {
                continue;
            }
            let place = format!("{}:{number}", source.path);
            if !UNSAFE.iter().any(|(prefix, _)| source.path.starts_with(prefix)) {
                complaints.push(format!("{place}: unsafe code outside the files listed"));
            }
            // A declaration says what its caller must promise; a block or an impl why it holds.
            if code.contains("unsafe fn") {
                continue;
            }
            let before = &lines[number.saturating_sub(8)..number];
            if !before.iter().any(|line| line.contains("// SAFETY:")) {
                complaints.push(format!("{place}: no `// SAFETY:` above"));
            }
        }
    }
    report(complaints);
}

#[test]
fn nothing_names_a_place_on_somebodys_machine() {
    // In two parts each, so that this file does not name them itself.
    let homes = [["/ho", "me/"], ["/ro", "ot/"], ["/Us", "ers/"]].map(|parts| parts.concat());
    let mut complaints = Vec::new();
    for Source { path, text } in sources() {
        for (n, line) in text.lines().enumerate() {
            if homes.iter().any(|home| line.contains(home.as_str())) {
                complaints.push(format!("{path}:{}: {}", n + 1, line.trim()));
            }
        }
    }
    report(complaints);
}

#[test]
fn the_rules_find_what_breaks_them() {
    let modules = ["io", "format"];
    assert_eq!(uses("use crate::format::raw;", &modules), ["format"]);
    assert_eq!(uses("use crate::{io::Errno, format};", &modules), ["io", "format"]);
    assert_eq!(uses("let a = crate::io::sleep(b);", &modules), ["io"]);
    assert_eq!(strip(r#"a("un\"safe // b") // c"#), "a() ");
    assert_eq!(strip("a('\"') // c"), "a() ".replace("()", "(')"));
    assert_eq!(named_files("`a/b.rs` c `d` e `f/g.rs`, `h/`"), ["a/b.rs", "f/g.rs"]);
}
