//! The tools on `nvme://`: `vublk io`, `convert`, `create` and `check`.
//!
//! The host then looks into the drives' files.

use super::{Drives, MIB, MORE_TIME, bound, lab, prelude};
use crate::guest::boot::Console;
use crate::guest::server::{outcome_of, output_of};
use serde_json::json;
use std::fs;
use std::os::unix::fs::MetadataExt;

/// 10.0 with namespaces of 512 and of 4096-byte blocks, few queues and interrupts; 11.0 with transfers
/// of 32 KiB at most and one queue; 12.0 with errors.
const CONTROLLERS: [&str; 8] = [
    "nvme-subsys,id=s0",
    "nvme,id=c0,serial=FIRST,subsys=s0,addr=0x10,max_ioqpairs=4,msix_qsize=5",
    "nvme-ns,bus=c0,drive=d0,nsid=1",
    "nvme-ns,bus=c0,drive=d1,nsid=2,logical_block_size=4096,physical_block_size=4096",
    "nvme-ns,bus=c0,drive=d3,nsid=3",
    "nvme-ns,bus=c0,drive=d4,nsid=4,logical_block_size=4096,physical_block_size=4096",
    "nvme,serial=SECOND,drive=d2,addr=0x11,mdts=3,max_ioqpairs=1,msix_qsize=2",
    "nvme,serial=THIRD,drive=bad,addr=0x12",
];

/// On each namespace the same, in the units that it has and in others.
const WORK: &str = r#"
    for disk in 0000:00:10.0/1 0000:00:10.0/2 0000:00:11.0/1; do
        $vublk io -f raw \
            -c 'write -P 1 0 64k' -c 'read -P 1 0 64k' \
            -c 'write -P 2 1M 3M' -c 'read -P 2 1M 3M' \
            -c 'write -P 3 5120 512' -c 'read -P 3 5120 512' -c 'read -P 1 5632 4k' \
            -c 'writev -P 4 4M 4k 512 8k 1536' -c 'readv -P 4 4M 512 8k 4k 1536' \
            -c 'write -z 2M 64k' -c 'read -P 0 2M 64k' \
            -c 'write -f -P 5 6M 4k' \
            -c 'write -P 6 8M 8M' -c flush -c 'discard 9M 6M' \
            -c 'aio_write -P 7 7M 256k' -c 'aio_write -P 8 7424k 256k' -c aio_flush \
            nvme://$disk >/tmp/said || { cat /tmp/said; exit 1; }
        grep -q -i 'verification failed\|error' /tmp/said && { cat /tmp/said; exit 1; }
        $vublk info nvme://$disk | sed "s|^|info $disk |"
    done
    ip link set lo up
    $vublk serve -f raw nvme://0000:00:10.0/1 --socket /tmp/disk.sock --metrics 127.0.0.1:9100 \
        >/tmp/served 2>&1 &
    for try in $(seq 600); do [ -S /tmp/disk.sock ] && break; sleep 0.1; done
    echo "serve: $([ -S /tmp/disk.sock ] && echo listens; grep -v '^ *-' /tmp/served | head -n 1)"
    for try in $(seq 100); do
        wget -q -O - http://127.0.0.1:9100/metrics | grep '^vublk_drive_[tsm]' && break
        sleep 0.1
    done
    kill $! && wait $!
    echo "served: $?"
    "#;

/// What the host finds in each drive after [`WORK`]: offset, length and byte.
const FOUND: [(u64, u64, u8); 11] = [
    (0, 5120, 1),
    (5120, 512, 3),
    (5632, 65536 - 5632, 1),
    (MIB, MIB, 2),
    (2 * MIB, 65536, 0),
    (2 * MIB + 65536, 2 * MIB - 65536, 2),
    (4 * MIB, 4096 + 512 + 8192 + 1536, 4),
    (6 * MIB, 4096, 5),
    (7 * MIB, 256 << 10, 7),
    (7424 << 10, 256 << 10, 8),
    (8 * MIB, MIB, 6),
];

/// Images in and out, and an image of its own format on the bare namespace.
const IMAGES: &str = r#"
    (
    set -e
    a=nvme://0000:00:10.0/3 b=nvme://0000:00:10.0/4
    $vublk create -f qcow2 /tmp/from.qcow2 24M >/dev/null
    $vublk io -c 'write -P 9 1M 2M' -c 'write -P 10 20M 64k' /tmp/from.qcow2 >/dev/null
    $vublk convert -O raw /tmp/from.qcow2 $a
    $vublk compare -F raw /tmp/from.qcow2 $a | sed 's/^/there /' || true
    $vublk convert -f raw -O qcow2 $a /tmp/back.qcow2
    $vublk io -c 'read -P 9 1M 2M' -c 'read -P 10 20M 64k' -c 'read -P 0 3M 17M' /tmp/back.qcow2 |
        grep -i 'fail' && exit 1
    $vublk create -f qcow2 $b 64M >/dev/null
    $vublk io -f qcow2 -c 'write -P 11 0 3M' -c 'write -P 12 63M 1M' -c 'write -z 1M 512k' $b >/dev/null
    $vublk io -f qcow2 -c 'read -P 11 0 1M' -c 'read -P 0 1M 512k' -c 'read -P 12 63M 1M' $b |
        grep -i 'fail' && exit 1
    $vublk check -f qcow2 $b | sed 's/^/check /'
    ) || exit 1
    "#;

/// Errors in a line each.
const REFUSALS: &str = r#"
    said() { echo "$1: $($vublk io -f raw -c 'read 0 512' "$2" 2>&1)"; }
    said namespace nvme://0000:00:10.0/7
    said zero nvme://0000:00:10.0/0
    said class nvme://0000:00:1f.2/1
    said absent nvme://0000:55:00.0/1
    said name nvme://here/1
    exec 3<>/dev/vfio/$(basename $(readlink /sys/bus/pci/devices/0000:00:10.0/iommu_group))
    said taken nvme://0000:00:10.0/1
    exec 3<&-
    ulimit -l 64
    chown 65534 /dev/vfio/[0-9]*
    user() { setpriv --reuid 65534 --clear-groups "$@"; }
    echo "memlock: $(user $vublk io -f raw -c 'read 0 512' nvme://0000:00:10.0/1 2>&1)"
    chown 0 /dev/vfio/[0-9]*
    echo "user: $(user $vublk io -f raw -c 'read 0 512' nvme://0000:00:10.0/1 2>&1)"
    $vublk nvme unbind 0000:00:10.0 >/dev/null
    said unbound nvme://0000:00:10.0/1
    "#;

/// A drive that fails some of what it is asked.
const ERRORS: &str = r#"
    io() { echo "$1: $($vublk io -f raw -c "$2" nvme://0000:00:12.0/1 2>&1 | tr '\n' ' ')"; }
    for time in first second; do
        $vublk io -f raw -c 'write -P 1 0 4k' -c flush nvme://0000:00:12.0/1 >/tmp/said 2>&1
        echo "$time: $? $(tr '\n' ' ' </tmp/said)"
    done
    io read 'read 1M 4k'
    io beside 'read 1028k 4k'
    io write 'write 2M 4k'
    io again 'write -P 1 0 1M'
    "#;

/// The options of QEMU's for that drive, over the last one.
fn bad_drive(drives: &Drives) -> [String; 4] {
    let options = json!({
        "driver": "blkdebug", "node-name": "bad", "image": "f5",
        "inject-error": [
            {"event": "none", "iotype": "read", "sector": 2048, "errno": 5, "once": false},
            {"event": "none", "iotype": "write", "sector": 4096, "errno": 28, "once": false},
            {"event": "none", "iotype": "flush", "errno": 5, "once": true},
        ],
    });
    let file = format!("driver=file,node-name=f5,filename={}", drives.path(5).display());
    ["-blockdev".into(), file, "-blockdev".into(), options.to_string()]
}

#[test]
fn the_tools_write_and_read_namespaces_of_all_kinds() {
    let drives = Drives::new(6, 32);
    let mut guest = drives.attach_some(lab(), 5);
    guest = guest.qemu(&bad_drive(&drives).each_ref().map(String::as_str));
    for device in CONTROLLERS {
        guest = guest.qemu(&["-device", device]);
    }
    let script = prelude() + &bound("0000:00:10.0 0000:00:11.0 0000:00:12.0");
    let console = guest.for_more(MORE_TIME).run(&(script + WORK + ERRORS + IMAGES + REFUSALS));
    check_work(&drives, &console);
    check_images(&drives, &console);
    // The address is the guest's, and so is what the drive says: QEMU's are all like this.
    for (name, value) in
        [("temperature_celsius", "50"), ("spare_ratio", "0"), ("media_errors_total", "0")]
    {
        let name = format!("vublk_drive_{name}{{drive=\"0000:00:10.0\"}}");
        assert_eq!(console.value(&name), value);
    }
    for (name, part) in [
        ("serve", "listens"),
        ("served", "0"),
        ("read", "read failed: Input/output error"),
        ("beside", "read 4096/4096"),
        ("write", "write failed: "),
        ("again", "wrote 1048576/1048576"),
        ("first", "1 wrote 4096/4096"),
        ("second", "0 wrote 4096/4096"),
        ("namespace", "namespace 7"),
        ("zero", "namespace 0"),
        ("class", "not an NVMe controller"),
        ("absent", "there is no such PCI device"),
        ("name", "is not a PCI address"),
        ("taken", "is used by another process"),
        ("memlock", "RLIMIT_MEMLOCK = 65536"),
        ("user", "no permission on /dev/vfio/"),
        ("unbound", "run `vublk nvme bind 0000:00:10.0`"),
    ] {
        let value = console.value(&format!("{name}:"));
        assert!(value.contains(part), "{name}: {value}");
    }
}

fn check_work(drives: &Drives, console: &Console) {
    for index in 0..3 {
        let bytes = fs::read(drives.path(index)).unwrap();
        for (offset, len, byte) in FOUND {
            let part = &bytes[offset as usize..][..len as usize];
            let wrong = part.iter().position(|&b| b != byte);
            assert_eq!(wrong, None, "drive {index}: {offset} is not {byte}\n{}", console.text());
        }
        let allocated = fs::metadata(drives.path(index)).unwrap().blocks() * 512;
        assert!(allocated < 8 * MIB, "drive {index}: {allocated} bytes after a discard of 6 MiB");
    }
    let bytes = fs::read(drives.path(5)).unwrap();
    assert!(bytes[..MIB as usize].iter().all(|&byte| byte == 1));
}

fn check_images(drives: &Drives, console: &Console) {
    assert!(console.text().contains("check No errors were found"), "{}", console.text());
    let (first, second) = (drives.path(3), drives.path(4));
    let (ok, said) = outcome_of("qemu-img", ["check", "-f", "qcow2", second.to_str().unwrap()]);
    assert!(ok, "{said}");
    for (path, format, reads) in [
        (&first, "raw", ["read -P 9 1M 2M", "read -P 10 20M 64k", "read -P 0 3M 17M"]),
        (&second, "qcow2", ["read -P 11 0 1M", "read -P 0 1M 512k", "read -P 12 63M 1M"]),
    ] {
        let commands = reads.iter().flat_map(|command| ["-c", command]);
        let arguments = ["-r", "-f", format].into_iter().chain(commands);
        let said = output_of("qemu-io", arguments.chain([path.to_str().unwrap()]));
        assert!(!said.contains("ailed"), "{said}");
    }
}
