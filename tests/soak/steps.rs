//! The steps of the soak, each a disturbance of the guest or its daemon.
//!
//! A step ends when its effect has reached the guest.

use crate::world::{MIB, World, text, wait_event};
use fastrand::Rng;
use serde_json::{Value, json};
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// SIGKILL, and a new daemon.
    Kill,
    /// SIGTERM, and then a new daemon.
    Upgrade,
    /// A new daemon, and then SIGTERM to the old one.
    Overtake,
    /// Another size of the second disk.
    Resize,
    /// A disk that comes, is used, and goes.
    PlugDisk,
    /// Memory that comes, and sometimes goes.
    PlugMemory,
    /// The guest moves to another QEMU with another daemon.
    Migrate,
}

impl Step {
    pub const ALL: [Step; 7] = [
        Step::Kill,
        Step::Upgrade,
        Step::Overtake,
        Step::Resize,
        Step::PlugDisk,
        Step::PlugMemory,
        Step::Migrate,
    ];

    /// One of them; kills come most.
    pub fn any(random: &mut Rng) -> Step {
        if random.u8(..3) == 0 { Step::Kill } else { Step::ALL[random.usize(..Step::ALL.len())] }
    }

    pub fn run(self, world: &mut World, random: &mut Rng) {
        match self {
            Step::Kill => kill(world),
            Step::Upgrade => upgrade(world),
            Step::Overtake => overtake(world, random),
            Step::Resize => resize(world, random),
            Step::PlugDisk => plug_disk(world, random),
            Step::PlugMemory => plug_memory(world, random),
            Step::Migrate => migrate(world),
        }
    }
}

fn kill(world: &mut World) {
    world.daemon().kill();
    let next = world.next_daemon();
    world.replace_daemon(next);
    world.wait_connected();
    world.count("kills");
}

fn upgrade(world: &mut World) {
    world.daemon().end();
    let next = world.next_daemon();
    world.replace_daemon(next);
    world.wait_connected();
    world.count("upgrades, the old daemon ended first");
}

fn overtake(world: &mut World, random: &mut Rng) {
    let next = world.next_daemon();
    std::thread::sleep(Duration::from_millis(random.u64(..500)));
    world.daemon().end();
    world.replace_daemon(next);
    world.wait_connected();
    world.count("upgrades, the new daemon started first");
}

fn resize(world: &mut World, random: &mut Rng) {
    let size = random.u64(64..160) * MIB;
    let sectors = size / 512;
    let mut monitor = world.daemon().monitor();
    monitor.run("block_resize", json!({"node-name": "disk1", "size": size}));
    world.ask_guest(&format!(
        "until [ $(cat /sys/block/vdb/size) = {sectors} ]; do sleep 0.1; done"
    ));
    let last = sectors / 8 - 1;
    world.ask_guest(&format!(
        "dd if=/dev/urandom of=/tmp/block bs=4k count=1 && \
         dd if=/tmp/block of=/dev/vdb bs=4k seek={last} oflag=direct && \
         dd if=/dev/vdb bs=4k skip={last} iflag=direct 2>/dev/null | cmp - /tmp/block"
    ));
    world.count("resizes");
}

fn plug_disk(world: &mut World, random: &mut Rng) {
    let (node, export) = (world.node("hot"), world.export("hot", 2));
    let mut monitor = world.daemon().monitor();
    monitor.run("blockdev-add", node);
    monitor.run("block-export-add", export);
    drop(monitor);
    world.plugged = true;
    let path = text(&world.socket("hot"));
    let address = json!({"type": "unix", "data": {"path": path}});
    let socket = json!({"addr": address, "server": false, "reconnect": 1});
    let chardev = json!({"id": "hot", "backend": {"type": "socket", "data": socket}});
    let mut qmp = world.qmp();
    qmp.run("chardev-add", chardev);
    let device = json!({"driver": "vhost-user-blk-pci", "id": "hot", "chardev": "hot",
                        "bus": "slot1", "num-queues": 2});
    qmp.run("device_add", device);
    world.ask_guest("until [ -b /dev/vdc ]; do sleep 0.1; done");
    let found = world.ask_guest("sum /dev/vdc");
    if let Some(left) = world.unplugged_sum.take() {
        assert_eq!(found, left, "the disk is not what it was when it was unplugged");
    }
    let job = "fio --name=hot --filename=/dev/vdc --size=16m --rw=randwrite --bsrange=4k-64k \
               --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c --verify_fatal=1 \
               --randrepeat=0 --eta=never --output=/tmp/fio.hot";
    if random.bool() {
        world.ask_guest(&format!("{job} & echo $! >/tmp/hot.pid"));
        std::thread::sleep(Duration::from_millis(random.u64(..2000)));
        kill(world);
        // Not its child; what it found is asked for below.
        world.ask_guest("while kill -0 $(cat /tmp/hot.pid) 2>/dev/null; do sleep 0.2; done");
        world.ask_guest("grep -q 'err= 0' /tmp/fio.hot");
    } else {
        world.ask_guest(job);
    }
    world.unplugged_sum = Some(world.ask_guest("sum /dev/vdc"));
    qmp.run("device_del", json!({"id": "hot"}));
    wait_event(&mut qmp, "DEVICE_DELETED", "device", "hot");
    qmp.run("chardev-remove", json!({"id": "hot"}));
    let mut monitor = world.daemon().monitor();
    monitor.run("block-export-del", json!({"id": "hot"}));
    wait_event(&mut monitor, "BLOCK_EXPORT_DELETED", "id", "hot");
    monitor.run("blockdev-del", json!({"node-name": "hot"}));
    world.plugged = false;
    world.ask_guest("while [ -b /dev/vdc ]; do sleep 0.1; done");
    world.count("disks plugged and unplugged");
}

/// Modules that the machine has room for.
const MODULES: usize = 4;

fn plug_memory(world: &mut World, random: &mut Rng) {
    if world.modules.len() == MODULES || !world.modules.is_empty() && random.u8(..3) == 0 {
        return unplug_memory(world, random);
    }
    let number = world.next_module;
    world.next_module += 1;
    let before = total_memory(world);
    let size = 128 * MIB;
    let backend = json!({"qom-type": "memory-backend-memfd", "id": format!("memory{number}"),
                         "size": size, "share": true});
    let mut qmp = world.qmp();
    qmp.run("object-add", backend);
    let module = json!({"driver": "pc-dimm", "id": format!("module{number}"),
                        "memdev": format!("memory{number}")});
    qmp.run("device_add", module);
    world.modules.push(number);
    // Less what the kernel keeps for its own lists.
    let wanted = before + size * 9 / 10 / 1024;
    world.ask_guest(&format!(
        "until [ $(awk '/MemTotal/ {{ print $2 }}' /proc/meminfo) -ge {wanted} ]; do sleep 0.1; done"
    ));
    world.count("memory modules plugged");
}

/// The guest may say no: its memory is in use.
fn unplug_memory(world: &mut World, random: &mut Rng) {
    let place = random.usize(..world.modules.len());
    let number = world.modules[place];
    let id = format!("module{number}");
    let mut qmp = world.qmp();
    qmp.run("device_del", json!({"id": id}));
    let refused = loop {
        let event = qmp.event();
        match event["event"].as_str() {
            Some("DEVICE_DELETED") if event["data"]["device"] == id.as_str() => break false,
            Some("ACPI_DEVICE_OST") if is_refusal(&event["data"]["info"], &id) => break true,
            _ => {}
        }
    };
    if refused {
        return world.count("memory modules that the guest did not give back");
    }
    world.modules.remove(place);
    qmp.run("object-del", json!({"id": format!("memory{number}")}));
    world.count("memory modules unplugged");
}

/// What the guest says of an ejection (source 3: ACPI 6.4, section 6.3.5) other than that it has succeeded or
/// continues.
fn is_refusal(info: &Value, device: &str) -> bool {
    info["device"] == device
        && info["source"] == 3
        && !matches!(info["status"].as_u64(), Some(0 | 0x84))
}

fn migrate(world: &mut World) {
    // The other machine must have the modules where this one has them.
    let modules = world.qmp().run("query-memory-devices", json!({}));
    let modules = modules.as_array().expect("a list").iter().map(|module| &module["data"]);
    world.guest().plugged = modules.flat_map(module_options).collect();
    world.migrate();
    world.count("migrations");
}

/// How QEMU is told of a module that another has.
fn module_options(module: &Value) -> [String; 4] {
    let field = |name: &str| module[name].as_str().expect("text");
    let memory = field("memdev").trim_start_matches("/objects/");
    let (size, slot, address) = (&module["size"], &module["slot"], &module["addr"]);
    [
        "-object".into(),
        format!("memory-backend-memfd,id={memory},size={size},share=on"),
        "-device".into(),
        format!("pc-dimm,id={},memdev={memory},slot={slot},addr={address}", field("id")),
    ]
}

fn total_memory(world: &mut World) -> u64 {
    world.ask_guest("awk '/MemTotal/ { print $2 }' /proc/meminfo").parse().expect("a number")
}
