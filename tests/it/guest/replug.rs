//! Unplugging and replugging a disk, whose front end keeps its connection and negotiates again.

use super::boot::Guest;
use super::images;
use super::server::vublk_serve;
use serde_json::json;

/// Rounds of plugging the disk in and out.
const ROUNDS: usize = 4;

#[test]
fn a_disk_is_plugged_in_again_and_again_on_one_connection() {
    let (_dir, [image]) = images(["disk"], 64);
    let mut server = vublk_serve(&[&image], &["-v"]).start();
    let chardev = format!("socket,id=hot,path={}", server.socket(0).display());
    let script = format!(
        r#"
        for round in $(seq {ROUNDS}); do
            echo "plug"
            until [ -b /dev/vda ]; do sleep 0.1; done
            [ "$round" = 1 ] || dd if=/dev/vda bs=1M count=8 iflag=direct 2>/dev/null | cmp - /tmp/kept || exit 1
            dd if=/dev/urandom of=/tmp/kept bs=1M count=8 2>/dev/null
            dd if=/tmp/kept of=/dev/vda bs=1M oflag=direct conv=fsync 2>/dev/null || exit 1
            echo "unplug"
            while [ -b /dev/vda ]; do sleep 0.1; done
        done
        echo "errors $(dmesg | grep -c 'I/O error')"
        "#
    );
    let mut guest = Guest::new()
        .cpus(2)
        .qemu(&["-chardev", &chardev])
        .qemu(&["-device", "pcie-root-port,id=slot1,chassis=1,slot=1,bus=pcie.0,addr=10"])
        .boot(&script);
    for _ in 0..ROUNDS {
        guest.wait_for("plug");
        let mut qmp = guest.monitor();
        let device = json!({"driver": "vhost-user-blk-pci", "id": "hot", "chardev": "hot",
                            "bus": "slot1"});
        qmp.run("device_add", device);
        guest.wait_for("unplug");
        qmp.run("device_del", json!({"id": "hot"}));
        while !matches!(qmp.event(), event if event["event"] == "DEVICE_DELETED"
                                            && event["data"]["device"] == "hot")
        {}
    }
    let console = guest.finish();
    assert_eq!(console.value("errors"), "0");
    server.wait_for("front end disconnected", 1);
    let log = server.stop();
    assert_eq!(log.matches("front end connected").count(), 1, "{log}");
}
