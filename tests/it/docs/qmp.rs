//! The table of QMP commands in docs/qmp.md, against the program and qemu-storage-daemon.

use super::page::Page;
use crate::cli::VUBLK;
use crate::monitor::{Client, MONITOR};
use crate::vhost_user::Daemon;
use serde_json::json;
use std::collections::BTreeSet;

type Names = BTreeSet<String>;

/// The commands that a daemon lists, and its version.
fn commands(program: &[&str]) -> (Names, String) {
    let daemon = Daemon::start_in(tempfile::tempdir().unwrap(), program, &MONITOR);
    let mut client = Client::connect(&daemon.path("m.sock"));
    let listed = client.run("query-commands", json!({}));
    let names = listed.as_array().unwrap().iter();
    let names = names.map(|command| command["name"].as_str().unwrap().to_owned()).collect();
    let version = &client.greeting["QMP"]["version"]["qemu"];
    (names, format!("{}.{}", version["major"], version["minor"]))
}

/// What a column of the page's table has in backquotes.
fn column(page: &Page, number: usize) -> Names {
    let rows = page.text.lines().filter(|line| line.starts_with('|'));
    let cells = rows.filter_map(|row| row.split('|').nth(number));
    let names = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    names.map(str::to_owned).collect()
}

#[test]
fn the_page_on_qmp_lists_the_commands_that_there_are_and_those_that_there_are_not() {
    let page = Page::read("docs/qmp.md");
    let (here, missing) = (column(&page, 2), column(&page, 3));
    let (ours, _) = commands(&[VUBLK, "daemon"]);
    assert_eq!(here, ours);
    let (theirs, version) = commands(&["qemu-storage-daemon"]);
    // Later versions have more.
    if version == "7.2" {
        assert_eq!(missing, &theirs - &ours);
        let (all, have) = (theirs.len(), (&theirs & &ours).len());
        let sentence =
            format!("Of the {all} commands of qemu-storage-daemon 7.2, vublk has {have}");
        assert!(page.text.contains(&sentence), "docs/qmp.md does not say: {sentence}");
    }
}
