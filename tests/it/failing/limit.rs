//! A daemon with a limit on the length of files (`RLIMIT_FSIZE`).
//!
//! A request beyond it fails, and costs nothing else.

use super::write_of;
use crate::vhost_user::{Daemon, LIMIT, export_of, new_image};
use vublk_testkit::Options;
use vublk_testkit::spec::status;

#[test]
fn a_guests_write_past_the_limit_on_file_sizes_fails_alone() {
    let dir = tempfile::tempdir().unwrap();
    for number in 0..2 {
        new_image(&dir.path().join(format!("{number}.img")), 8 << 20);
    }
    let node = |number: usize| {
        format!("driver=raw,node-name=d{number},file.driver=file,file.filename=DIR/{number}.img")
    };
    let program = ["prlimit", "--fsize=1048576", env!("CARGO_BIN_EXE_vublk"), "daemon"];
    let [a, b] = [0, 1].map(node);
    let [to_a, to_b] =
        [0, 1].map(|number| export_of(&format!("d{number}"), number) + ",writable=on");
    let arguments = ["--blockdev", &a, "--blockdev", &b, "--export", &to_a, "--export", &to_b];
    let daemon = Daemon::start_in(dir, &program, &arguments);
    let options = Options { limit: LIMIT, ..Options::default() };
    let mut disks = [0, 1].map(|number| daemon.open_number(number, &options));
    // Block 300 is behind 1 MiB.
    let refused = disks[0].queue(0).run(&write_of(300)).unwrap();
    assert_eq!(refused.status, status::IOERR);
    for disk in &mut disks {
        assert_eq!(disk.queue(0).run(&write_of(1)).unwrap().status, status::OK);
    }
}
