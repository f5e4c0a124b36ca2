//! Options in every spelling that getopt_long accepts, and help texts that programs parse.
//!
//! Options of later versions of QEMU are among them.

use super::Place;
use std::collections::BTreeSet;
use std::os::unix::fs::symlink;
use std::process::Command;

/// The subcommands, and all long names that 7.2 has for their options.
const KNOWN: [(&str, &[&str]); 15] = [
    ("amend", &["object", "image-opts", "force"]),
    ("bench", &["image-opts", "flush-interval", "no-drain", "pattern", "force-share"]),
    (
        "bitmap",
        &[
            "object",
            "image-opts",
            "add",
            "remove",
            "clear",
            "enable",
            "disable",
            "merge",
            "granularity",
            "source-file",
            "source-format",
        ],
    ),
    ("check", &["object", "image-opts", "format", "force-share", "output", "repair"]),
    ("commit", &["object", "image-opts"]),
    ("compare", &["object", "image-opts", "force-share"]),
    (
        "convert",
        &[
            "object",
            "image-opts",
            "force-share",
            "target-image-opts",
            "target-is-zero",
            "bitmaps",
            "skip-broken-bitmaps",
            "salvage",
        ],
    ),
    ("create", &["object"]),
    ("dd", &["object", "image-opts", "force-share"]),
    ("info", &["object", "image-opts", "format", "force-share", "output", "backing-chain"]),
    (
        "map",
        &["object", "image-opts", "format", "force-share", "output", "start-offset", "max-length"],
    ),
    ("measure", &["object", "image-opts", "force-share", "output", "size"]),
    ("rebase", &["object", "image-opts", "force-share"]),
    ("resize", &["object", "image-opts", "preallocation", "shrink"]),
    ("snapshot", &["object", "image-opts", "force-share"]),
];

/// What a long option is cut short to: ways that may be ambiguous, and some that are not.
fn cut(name: &str) -> BTreeSet<&str> {
    [1, 2, 3, name.len() / 2, name.len() - 1, name.len()].map(|len| &name[..len]).into()
}

/// How a tool takes an option that stands alone.
#[derive(Debug, PartialEq)]
enum Taken {
    Unrecognized,
    WantsValue,
    Known,
}

fn taken(place: &Place, command: &str, option: &str) -> Taken {
    // resize takes its last word for the size.
    let end = if command == "resize" { " 1M" } else { "" };
    let said = place.run(&format!("qemu-img {command} {option}{end}")).stderr;
    // QEMU's measure says it in getopt's words.
    let unrecognized =
        ["unrecognized option", "doesn't allow an argument", "is ambiguous; possibilities"];
    let wants_value = ["missing argument for option", "requires an argument"];
    if unrecognized.iter().any(|words| said.contains(words)) {
        Taken::Unrecognized
    } else if wants_value.iter().any(|words| said.contains(words)) {
        Taken::WantsValue
    } else {
        Taken::Known
    }
}

#[test]
fn long_options_may_be_cut_short_as_far_as_in_qemu() {
    let places = [true, false].map(Place::new);
    let mut wrong = Vec::new();
    for (command, names) in KNOWN {
        let cuts: BTreeSet<&str> =
            names.iter().chain(["help"].iter()).flat_map(|name| cut(name)).collect();
        for spelled in cuts.into_iter().flat_map(|cut| [format!("--{cut}"), format!("--{cut}=1")]) {
            let [ours, theirs] = places.each_ref().map(|place| taken(place, command, &spelled));
            // What they refuse may be one of the names that are newer than they are.
            if ours != theirs && theirs != Taken::Unrecognized {
                wrong.push(format!("{command} {spelled}: {ours:?}, not {theirs:?}"));
            }
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn bitmaps_are_made_and_merged_by_long_options() {
    super::assert_same_disks(
        &[
            "qemu-img create -q -f qcow2 one.qcow2 1M",
            "qemu-img create -q -f qcow2 two.qcow2 1M",
            "qemu-img bitmap --add one.qcow2 from",
        ],
        &[
            "qemu-img bitmap --add --granularity 4096 two.qcow2 b",
            "qemu-img bitmap --add --gran=1M two.qcow2 b",
            "qemu-img bitmap --add --merge from --source-file one.qcow2 --source-format=qcow2 \
             two.qcow2 b",
            "qemu-img bitmap --add --granularity 5 two.qcow2 b",
            "qemu-img bitmap --add --source-format qcow2 two.qcow2 b",
        ],
    );
}

#[test]
fn names_that_later_versions_have_for_options_mean_the_same() {
    let place = Place::new(true);
    for (newer, older) in [
        ("create --quiet --format qcow2 a.qcow2 1M", "create -q -f qcow2 b.qcow2 1M"),
        (
            "create -q -f qcow2 --backing=a.qcow2 -B qcow2 --options cluster_size=4k c.qcow2",
            "create -q -f qcow2 -b b.qcow2 -F qcow2 -o cluster_size=4k d.qcow2",
        ),
        (
            "create -q -f qcow2 --backing-unsafe --backing no --backing-format raw e.qcow2 1M",
            "create -q -f qcow2 -u -b no -F raw f.qcow2 1M",
        ),
        (
            "rebase --backing-unsafe --backing a.qcow2 -B qcow2 e.qcow2",
            "rebase -u -b b.qcow2 -F qcow2 f.qcow2",
        ),
        ("rebase --compress --backing= c.qcow2", "rebase -c -b '' d.qcow2"),
        ("bitmap --add --granularity 4k a.qcow2 x", "bitmap --add -g 4k b.qcow2 x"),
        ("snapshot --create s e.qcow2", "snapshot -c s f.qcow2"),
        (
            "convert --source-format qcow2 --target-format=raw --snapshot s e.qcow2 a.raw",
            "convert -f qcow2 -O raw -l s f.qcow2 b.raw",
        ),
        (
            "convert -b a.qcow2 -F qcow2 -O qcow2 --compress c.qcow2 g.qcow2",
            "convert -B b.qcow2 -F qcow2 -O qcow2 -c d.qcow2 h.qcow2",
        ),
        ("snapshot --delete=s e.qcow2", "snapshot -d s f.qcow2"),
        ("resize --quiet --format qcow2 e.qcow2 2M", "resize -q -f qcow2 f.qcow2 2M"),
        (
            "compare --a-format qcow2 --b-format raw --quiet c.qcow2 a.raw",
            "compare -f qcow2 -F raw -q d.qcow2 b.raw",
        ),
        (
            "measure --target-format qcow2 --options cluster_size=4k a.qcow2",
            "measure -O qcow2 -o cluster_size=4k b.qcow2",
        ),
    ] {
        let [newer, older] = [newer, older].map(|line| place.run(&format!("qemu-img {line}")));
        assert_eq!((newer.code, &newer.stderr), (Some(0), &String::new()));
        assert_eq!(newer, older);
    }
    for (newer, older) in [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")] {
        let shown = |name: &str| {
            let info = place.run_theirs(&format!("qemu-img info {name}.qcow2")).stdout;
            let lines = info.lines().filter(|line| !line.starts_with("disk size"));
            let lines: Vec<_> =
                lines.map(|line| line.replace(&format!("{name}.qcow2"), "X")).collect();
            lines.join("\n").replace("b.qcow2", "a.qcow2")
        };
        assert_eq!(shown(newer), shown(older));
    }
}

#[test]
fn help_under_qemus_name_has_qemus_usage_lines() {
    let places = [true, false].map(Place::new);
    let usage = |text: &str| -> BTreeSet<String> {
        let lines = text.lines().skip_while(|line| *line != "Command syntax:").skip(1);
        lines.take_while(|line| !line.is_empty()).map(str::to_owned).collect()
    };
    let help = places.each_ref().map(|place| place.run("qemu-img --help"));
    assert_eq!((help[0].code, &*help[0].stderr), (Some(0), ""));
    let [ours, theirs] = help.each_ref().map(|help| usage(&help.stdout));
    assert_eq!(ours, theirs);
    assert_eq!(ours.len(), KNOWN.len());
    for (command, names) in KNOWN {
        // For what would be its operand, the last word is none.
        let last = if command == "resize" { " x" } else { "" };
        let said = places[0].run(&format!("qemu-img {command} --help{last}"));
        assert_eq!((said.code, &*said.stderr), (Some(0), ""), "{command}");
        let own = usage(&said.stdout);
        assert!(own.len() == 1 && theirs.is_superset(&own), "{command}: {own:?}");
        for name in names {
            for text in [&said.stdout, &help[0].stdout] {
                assert!(text.contains(&format!("--{name}")), "{command} --{name}");
            }
        }
    }
}

#[test]
fn a_link_named_as_a_program_that_is_not_there_fails() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["qemu-nbd", "qemu-pr-helper", "qemu-system-x86_64"] {
        let link = dir.path().join(name);
        symlink(super::VUBLK, &link).unwrap();
        for arguments in [&[][..], &["--help"], &["--version"], &["create", "-f", "raw", "x", "1M"]]
        {
            let output = Command::new(&link).args(arguments).current_dir(&dir).output().unwrap();
            assert_eq!(output.status.code(), Some(1), "{name} {arguments:?}");
            assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
            let said = String::from_utf8(output.stderr).unwrap();
            let begin = format!("{name}: vublk does not do this program's work: ");
            assert!(said.starts_with(&begin) && said.lines().count() == 1, "{said}");
        }
    }
    assert!(!dir.path().join("x").exists());
}
