//! A disk on an NVMe controller served over vhost-user, and faults of the controller meanwhile.
//!
//! The tests of [`super::inside`] do the work inside the guest.

use super::{Drives, MIB, MORE_TIME, bound, lab, prelude};
use crate::guest::boot::{Guest, RunningGuest};
use serde_json::json;
use std::fs;

/// The controller behind a root port: 01:00.0.
fn guest(drives: &Drives, controller: &str) -> Guest {
    let guest = drives.attach(lab().memory("1G").for_more(MORE_TIME));
    let port = "pcie-root-port,id=rp0,chassis=1,slot=1,addr=0x1c";
    guest.qemu(&["-device", port, "-device", &format!("nvme,id=c,serial=N,bus=rp0,{controller}")])
}

/// The script that runs tests of [`super::inside`], one after another.
fn inside(controllers: &str, tests: &[&str]) -> String {
    let program = std::env::current_exe().unwrap();
    let mut script = prelude() + &bound(controllers) + "export RUST_LOG=info\n";
    if let Ok(seed) = std::env::var("VUBLK_SEED") {
        script += &format!("export VUBLK_SEED={seed}\n");
    }
    for test in tests {
        let program = program.display();
        script += &format!(
            "{program} --ignored --exact --nocapture --test-threads=1 nvme::inside::{test} || exit 1\n\
             echo 'passed {test}'\n"
        );
    }
    script
}

#[test]
fn what_befalls_a_controller_costs_no_request_or_is_reported() {
    let drives = Drives::new(1, 64);
    let tests = [
        "killed_and_started_again",
        "reset_by_somebody_else",
        "gone_and_back",
        "copied_where_the_device_may_not_reach_guests_memory",
        "queues_of_two_workers",
        "memory_comes_and_goes",
        "asked_for_by_the_host",
    ];
    let lists = drives.dir.path().join("lists");
    let guest = guest(&drives, "drive=d0,mdts=5,max_ioqpairs=2");
    let trace = ["-D", lists.to_str().unwrap(), "-trace", "pci_nvme_map_sgl"];
    let mut guest = guest.qemu(&trace).boot(&inside("0000:01:00.0", &tests));
    guest.wait_for("unplug-me");
    guest.monitor().run("device_del", json!({"id": "c"}));
    guest.finish();
    let bytes = fs::read(drives.path(0)).unwrap();
    for number in 4..16u64 {
        let (at, len) = ((number * MIB) as usize, 512 << (number - 4));
        let mut wanted = vec![number as u8; len];
        if number == 15 {
            wanted[4096..8192].fill(0);
        }
        assert!(bytes[at..at + len] == wanted, "MiB {number}");
    }
    let lists = fs::read_to_string(lists).unwrap();
    assert!(lists.contains("pci_nvme_map_sgl"), "the controller was given no list");
}

#[test]
#[ignore = "half a minute more of guests: make test-nvme"]
fn a_drive_that_takes_too_long_costs_no_request() {
    let drives = Drives::new(1, 64);
    let path = drives.path(0);
    let file = format!("driver=file,node-name=f0,filename={}", path.display());
    let limits = "throttle-group,id=limits";
    let throttle = "driver=throttle,node-name=slow,throttle-group=limits,file=f0";
    let guest = lab().memory("1G").for_more(MORE_TIME).qemu(&[
        "-object",
        limits,
        "-blockdev",
        &file,
        "-blockdev",
        throttle,
        "-device",
        "pcie-root-port,id=rp0,chassis=1,slot=1,addr=0x1c",
        "-device",
        "nvme,serial=N,bus=rp0,drive=slow",
    ]);
    let mut guest = guest.boot(&inside("0000:01:00.0", &["requests_that_take_too_long"]));
    let limit = |guest: &RunningGuest, per_second: u64| {
        let limits = json!({"iops-total": per_second});
        let arguments = json!({"path": "/objects/limits", "property": "limits", "value": limits});
        guest.monitor().run("qom-set", arguments);
    };
    guest.wait_for("throttle-me");
    limit(&guest, 1);
    guest.wait_for("go-on-again");
    limit(&guest, 0);
    guest.finish();
}

#[test]
#[ignore = "half a minute more of guests: make test-nvme"]
fn a_guest_s_disk_goes_over_to_another_controller_of_its_namespace() {
    let drives = Drives::new(1, 64);
    let mut guest = drives.attach(lab().memory("1G").for_more(MORE_TIME));
    for device in [
        "nvme-subsys,id=s0",
        "nvme,id=c0,serial=N,subsys=s0,addr=0x10",
        "nvme,id=c1,serial=N,subsys=s0,addr=0x11",
        "nvme-ns,bus=c0,drive=d0,nsid=1,shared=on",
    ] {
        guest = guest.qemu(&["-device", device]);
    }
    guest.run(&inside("0000:00:10.0 0000:00:11.0", &["goes_over_to_another_controller"]));
}
