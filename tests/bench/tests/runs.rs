//! Tests of the bench itself: it starts its servers, loads them, and prints its tables.
//!
//! No figure is judged here.

use std::process::Command;

#[test]
fn a_quick_run_over_two_servers_prints_a_row_for_each_on_each_load() {
    let out = Command::new(env!("CARGO_BIN_EXE_vublk-bench"))
        .args(["--quick", "--only", "qsd,stock", "--groups", "null"])
        .output()
        .unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
    let rows = |server: &str| -> Vec<&str> {
        let has = |line: &&str| line.starts_with("| 4 KiB random") && line.contains(server);
        text.lines().filter(has).collect()
    };
    let (qsd, stock) = (rows("| qemu-storage-daemon |"), rows("| stock backend |"));
    assert!(!qsd.is_empty(), "{text}");
    assert_eq!(qsd.len(), stock.len());
    assert!(text.contains("qemu-storage-daemon version"), "{text}");
}

#[test]
fn a_program_that_is_not_there_is_one_line_and_a_failure() {
    let out = Command::new(env!("CARGO_BIN_EXE_vublk-bench"))
        .args(["--quick", "--only", "vublk", "--groups", "null"])
        .args(["--vublk", "/nonexistent/vublk"])
        .output()
        .unwrap();
    assert!(!out.status.success());
    let text = String::from_utf8_lossy(&out.stderr);
    let last = text.lines().last().unwrap_or_default();
    assert!(last.starts_with("vublk-bench: ") && last.contains("/nonexistent/vublk"), "{text}");
}
