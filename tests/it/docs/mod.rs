//! README and the pages of docs/: their commands run as written, and their promises hold.

pub mod page;
mod qmp;
mod session;

use crate::guest::boot;
use page::{Page, pages};
use session::{Guests, run};

/// The pages whose commands have a test of their own: one guest moves on the first, the other needs a guest with a
/// controller (`tests/it/nvme/page.rs`).
const OWN_TEST: [&str; 2] = ["docs/migration.md", "docs/nvme.md"];

#[test]
fn the_commands_in_readme_and_docs_work_as_written() {
    let pages = pages();
    let names: Vec<_> = pages.iter().map(|page| &*page.name).collect();
    assert!(OWN_TEST.iter().all(|name| names.contains(name)), "{names:?}");
    let failures: Vec<_> = pages
        .iter()
        .filter(|page| !OWN_TEST.contains(&&*page.name))
        .filter_map(|page| run(page, Guests::Stopped).err())
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn the_commands_of_the_page_on_migration_move_a_guest() {
    let _turn = boot::turn();
    boot::build_guest();
    if let Err(failure) = run(&Page::read("docs/migration.md"), Guests::Booted) {
        panic!("{failure}");
    }
}

#[test]
fn every_block_says_whether_it_is_run() {
    for Page { name, blocks, .. } in pages() {
        for block in blocks {
            let known = ["sh", "sh background", "text", "json", "ini", "yaml", "xml"];
            assert!(
                known.contains(&&*block.kind),
                "{name}, line {}: the fence says '{}', and not one of {known:?}",
                block.line,
                block.kind
            );
        }
    }
}

#[test]
fn readme_is_one_page() {
    let lines = Page::read("README.md").text.lines().count();
    assert!(lines <= 150, "README.md has {lines} lines");
}
