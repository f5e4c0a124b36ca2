//! `vublk nvme list`, `bind` and `unbind` with a real kernel.
//!
//! A controller in use stays where it is, and one that is given back is as it was.

use super::{Drives, MORE_TIME, lab, prelude};
use crate::guest::boot::{Console, Guest};
use serde_json::{Value, json};

/// Controllers 10.0 with two namespaces, 11.0 and 11.1 in one IOMMU group, 12.0 with a zoned namespace.
const CONTROLLERS: [&str; 8] = [
    "nvme-subsys,id=s0",
    "nvme,id=c0,serial=FIRST,subsys=s0,addr=0x10",
    "nvme-ns,bus=c0,drive=d0,nsid=1",
    "nvme-ns,bus=c0,drive=d1,nsid=2,logical_block_size=4096,physical_block_size=4096",
    "nvme,serial=SECOND,drive=d2,addr=0x11.0,multifunction=on",
    "nvme,serial=THIRD,drive=d3,addr=0x11.1",
    "nvme,id=c3,serial=FOURTH,addr=0x12",
    "nvme-ns,bus=c3,drive=d4,nsid=1,zoned=on,zoned.zone_size=4M",
];

/// The lines that a command printed between `<name` and `name>`.
fn block(console: &Console, name: &str) -> String {
    let text = console.plain();
    let rest = text.split_once(&format!("<{name}\n")).map(|(_, rest)| rest);
    let block = rest.and_then(|rest| rest.split_once(&format!("{name}>\n")));
    block.unwrap_or_else(|| panic!("no {name:?} in\n{text}")).0.to_owned()
}

/// Everything is tried on 10.0, and its driver told after it.
const REFUSALS: &str = r#"
    a=0000:00:10.0
    driver() { basename $(readlink /sys/bus/pci/devices/$1/driver); }
    bind() {
        said=$($vublk nvme bind $2 2>&1)
        echo "$1: $said [$?, $(driver $a)]"
    }
    bind module $a
    modprobe vfio-pci
    echo '<list'; $vublk nvme list; echo 'list>'
    echo '<json'; $vublk nvme list --output json $a; echo 'json>'

    mke2fs -q /dev/nvme0n2
    mount /dev/nvme0n2 /mnt
    bind mount $a
    umount /mnt
    addpart /dev/nvme0n1 1 2048 20480
    mkswap /dev/nvme0n1p1 >/dev/null
    swapon /dev/nvme0n1p1
    bind swap $a
    swapoff /dev/nvme0n1p1
    echo '0 2048 linear /dev/nvme0n1p1 0' | dmsetup create some
    bind held $a
    dmsetup remove some
    delpart /dev/nvme0n1 1
    exec 3</dev/nvme0n1
    bind open $a 3<&-
    exec 3<&-
    # A mount that only another mount namespace knows, as a container's.
    mkfifo /tmp/fifo
    unshare --mount sh -c 'mount /dev/nvme0n2 /mnt && echo mounted >/tmp/fifo && exec sleep 1000' &
    read -r mounted </tmp/fifo
    bind container $a
    kill $!
    wait
    bind group 0000:00:11.0
    bind zoned 0000:00:12.0
    bind class 0000:00:1f.2
    bind nothing 0000:77:00.0
    bind nonsense ../../etc
    setpriv --reuid 65534 --clear-groups $vublk nvme bind $a 2>&1 | sed 's/^/user: /'
    "#;

const COMINGS_AND_GOINGS: &str = r#"
    set -e
    b=0000:00:11.0 c=0000:00:11.1
    echo 'what was written before' | dd of=/dev/nvme0n1 conv=sync,fsync 2>/dev/null
    echo "bind $($vublk nvme bind $a)"
    echo "bound $(driver $a) $(cat /sys/bus/pci/devices/$a/driver_override)"
    echo "again $($vublk nvme bind $a)"
    echo "list $($vublk nvme list $a | tail -n 1)"
    $vublk nvme list -v | sed 's/^ *health: /health /'
    echo "both $($vublk nvme bind $b $c)"
    echo "drivers $(driver $b) $(driver $c)"

    group=$(basename $(readlink /sys/bus/pci/devices/$a/iommu_group))
    exec 3<>/dev/vfio/$group
    echo "taken $($vublk nvme unbind $a 2>&1 || true)"
    echo "state $($vublk nvme list --output json $a | grep state)"
    exec 3<&-
    echo "unbind $($vublk nvme unbind $a)"
    echo "override $(cat /sys/bus/pci/devices/$a/driver_override)"
    echo "twice $($vublk nvme unbind $a 2>&1 || true)"
    $vublk nvme unbind $b $c
    for try in $(seq 100); do [ -b /dev/nvme0n1 ] && break; sleep 0.1; done
    echo "data $(head -c 23 /dev/nvme0n1)"
    "#;

#[test]
fn controllers_in_use_stay_with_the_kernel_and_others_come_and_go() {
    let drives = Drives::new(5, 16);
    let mut guest = drives.attach(lab());
    for device in CONTROLLERS {
        guest = guest.qemu(&["-device", device]);
    }
    let console = guest.for_more(MORE_TIME).run(&(prelude() + REFUSALS + COMINGS_AND_GOINGS));
    check_refusals(&console);
    check_comings_and_goings(&console);
}

fn check_refusals(console: &Console) {
    let found: Value = serde_json::from_str(&block(console, "json")).unwrap();
    let group = found[0]["iommu-group"].as_u64().unwrap();
    let list = format!(
        "\
        0000:00:10.0  QEMU NVMe Ctrl, serial FIRST, driver nvme, IOMMU group {group}\n    \
            namespace 1: nvme0n1, 16 MiB, blocks of 512 bytes\n    \
            namespace 2: nvme0n2, 16 MiB, blocks of 4096 bytes\n    \
            free: vublk nvme bind 0000:00:10.0\n"
    );
    assert!(block(console, "list").starts_with(&list), "{}", console.text());
    let namespaces = json!([
        {"nsid": 1, "disk": "nvme0n1", "size": 16 << 20, "block-size": 512, "zoned": false},
        {"nsid": 2, "disk": "nvme0n2", "size": 16 << 20, "block-size": 4096, "zoned": false},
    ]);
    assert_eq!(found[0]["namespaces"], namespaces, "{found}");
    assert_eq!(found[0]["state"], "free", "{found}");
    for (name, line) in [
        ("module", "the kernel's module vfio-pci is not loaded: modprobe vfio-pci"),
        ("mount", "in use: nvme0n2 is mounted on /mnt"),
        ("swap", "in use: nvme0n1p1 is swap space"),
        ("held", "in use: dm-0 (some) stands on nvme0n1p1"),
        (
            "container",
            "in use: nvme0n2 is claimed: a mount in another container, or a kernel's user",
        ),
    ] {
        let whole = format!("vublk: 0000:00:10.0: {line} [1, nvme]");
        assert_eq!(console.value(&format!("{name}:")), whole);
    }
    for (name, part) in [
        ("open", "in use: process "),
        (
            "group",
            " also holds 0000:00:11.1 (driver nvme): give both: vublk nvme bind 0000:00:11.0 0000:00:11.1",
        ),
        ("zoned", "nvme3n1 is zoned: such namespaces cannot be used yet"),
        ("class", "not an NVMe controller (class 010601, wanted 010802)"),
        ("nothing", "no such PCI function"),
        ("nonsense", "is not the address of a PCI function"),
        ("user", "driver_override: permission denied: run this as root"),
    ] {
        let values: Vec<_> = console.values(&format!("{name}:")).collect();
        assert!(values.iter().any(|value| value.contains(part)), "{name}\n{}", console.text());
    }
}

fn check_comings_and_goings(console: &Console) {
    for (name, value) in [
        ("bind", "0000:00:10.0: vfio-pci: nvme://0000:00:10.0/1"),
        ("bound", "vfio-pci vfio-pci"),
        ("again", "0000:00:10.0: vfio-pci: nvme://0000:00:10.0/1"),
        ("list", "    ready: nvme://0000:00:10.0/1"),
        ("drivers", "vfio-pci vfio-pci"),
        ("unbind", "0000:00:10.0: nvme"),
        ("override", "(null)"),
        ("twice", "vublk: 0000:00:10.0: vfio-pci does not have it (driver nvme)"),
        ("data", "what was written before"),
    ] {
        assert_eq!(console.value(name), value);
    }
    // One bound to vfio-pci, and three of the kernel's.
    let health: Vec<_> = console.values("health").collect();
    assert!(
        health.len() == 4 && health.iter().all(|line| line.starts_with("50 C, 0% used, ")),
        "{health:?}"
    );
    let taken = console.value("taken");
    let before = "vublk: 0000:00:10.0: in use: process ";
    assert!(taken.starts_with(before) && taken.contains(" has vfio/"), "{taken}");
    assert!(console.value("state").contains("in-use"), "{}", console.text());
}

#[test]
fn without_an_iommu_the_line_says_what_to_switch_on() {
    let drives = Drives::new(1, 16);
    let script = "
        modprobe vfio-pci
        echo \"list $($vublk nvme list | tail -n 1)\"
        echo \"bind $($vublk nvme bind 0000:00:10.0 2>&1)\"
        ";
    let console = drives
        .attach(lab_without_iommu())
        .qemu(&["-device", "nvme,serial=N,drive=d0,addr=0x10"])
        .run(&(prelude() + script));
    let reason = "no IOMMU: enable the IOMMU (AMD-Vi) in the firmware";
    assert_eq!(console.value("list"), format!("    {reason}"));
    assert_eq!(console.value("bind"), format!("vublk: 0000:00:10.0: {reason}"));
}

fn lab_without_iommu() -> Guest {
    super::with_programs(Guest::new())
}
