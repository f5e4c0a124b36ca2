//! The help texts of the commands.

use super::{VUBLK, run};
use std::collections::BTreeSet;
use std::path::Path;

/// What `--help` or `-h` behind some words prints; it succeeds.
fn help(words: &[&str], flag: &str) -> String {
    let output = run(Path::new("."), &[&[VUBLK], words].concat(), &[flag]);
    assert!(output.status.success() && output.stderr.is_empty(), "{words:?} {flag}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The commands that a help text lists, and what it says of each.
fn listed(help: &str) -> Vec<(&str, &str)> {
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let lines = lines.take_while(|line| !line.is_empty());
    lines.filter_map(|line| line.trim().split_once(' ')).map(|(a, b)| (a, b.trim())).collect()
}

#[test]
fn the_help_of_every_command_describes_it_as_the_list_of_commands_does() {
    let mut known = BTreeSet::new();
    for above in [&[][..], &["nvme"]] {
        let list = help(above, "--help");
        let commands = listed(&list);
        assert!(commands.len() >= 3, "{list}");
        for (name, about) in commands.into_iter().filter(|(name, _)| *name != "help") {
            let words = [above, &[name]].concat();
            for flag in ["--help", "-h"] {
                let text = help(&words, flag);
                assert!(text.lines().any(|line| line == about), "no line '{about}':\n{text}");
                let usage = format!("sage: vublk {}", words.join(" "));
                assert!(text.contains(&usage), "no '{usage}':\n{text}");
            }
            assert!(known.insert(about.to_owned()), "two commands: {about}");
        }
    }
}
