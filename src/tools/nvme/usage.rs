//! The users of a controller.
//!
//! A controller in use is not taken away, and in doubt it is in use. The kernel's own claim on a disk decides,
//! because mounts may be in other namespaces than ours.

use super::machine::{names, text};
use super::{Controller, Machine, Namespace};
use std::fmt;
use std::path::{Path, PathBuf};

/// One use of a controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// A file system of the device is mounted.
    Mounted {
        device: String,
        at: String,
    },
    Swap {
        device: String,
    },
    /// Another device (LVM, dm-crypt, md, bcache) or a file system of several devices uses it.
    Held {
        device: String,
        by: String,
    },
    /// A process has the device open.
    Open {
        device: String,
        pid: u32,
        program: String,
    },
    /// The kernel gives it to nobody else; its user is not visible from here.
    Claimed {
        device: String,
    },
    /// Mounts and open files cannot be seen, because the kernel's file that shows them is missing.
    Unseen {
        device: String,
        missing: PathBuf,
    },
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Use::Mounted { device, at } => write!(f, "{device} is mounted on {at}"),
            Use::Swap { device } => write!(f, "{device} is swap space"),
            Use::Held { device, by } => write!(f, "{by} stands on {device}"),
            Use::Open { device, pid, program } => {
                write!(f, "process {pid} ({program}) has {device} open")
            }
            Use::Claimed { device } => {
                write!(f, "{device} is claimed: a mount in another container, or a kernel's user")
            }
            Use::Unseen { device, missing } => {
                let missing = missing.display();
                write!(f, "{device} may be mounted or open: without {missing} that cannot be seen")
            }
        }
    }
}

/// All uses of a controller that are to be seen.
pub fn uses(machine: &Machine, controller: &Controller) -> Vec<Use> {
    let mut uses = Vec::new();
    for namespace in &controller.namespaces {
        uses.extend(uses_of(machine, namespace));
    }
    if controller.has_vfio() {
        for node in vfio_nodes(machine, controller) {
            uses.extend(open(machine, &node));
        }
    }
    uses
}

/// The nodes through which a process has a controller that vfio-pci has: the group's, and the device's
/// own on newer kernels.
fn vfio_nodes(machine: &Machine, controller: &Controller) -> Vec<String> {
    let devices = names(&machine.function(controller.address).join("vfio-dev"));
    let devices = devices.into_iter().map(|name| format!("vfio/devices/{name}"));
    controller.node().into_iter().chain(devices).collect()
}

fn uses_of(machine: &Machine, namespace: &Namespace) -> Vec<Use> {
    let devices = namespace.devices(machine);
    let mut uses = mounts(machine, &devices);
    uses.extend(swaps(machine, &devices));
    for device in &devices {
        uses.extend(holders(machine, device));
        uses.extend(open(machine, device));
    }
    // The character device through which commands are passed: ng0n1 beside nvme0n1.
    uses.extend(open(machine, &namespace.disk.replacen("nvme", "ng", 1)));
    if uses.is_empty() {
        let claimed = devices.into_iter().filter(|device| machine.is_claimed(device));
        uses.extend(claimed.map(|device| Use::Claimed { device }));
    }
    if uses.is_empty()
        && let Some(missing) = machine.lacks(&namespace.disk)
    {
        uses.push(Use::Unseen { device: namespace.disk.clone(), missing });
    }
    uses
}

fn open(machine: &Machine, node: &str) -> Vec<Use> {
    let openers = machine.openers(node).into_iter();
    openers.map(|(pid, program)| Use::Open { device: node.to_owned(), pid, program }).collect()
}

/// Mounts by device number and, for file systems that have a number of their own, by name.
fn mounts(machine: &Machine, devices: &[String]) -> Vec<Use> {
    let table = text(&machine.path("/proc/self/mountinfo")).unwrap_or_default();
    let number = |device: &str| text(&machine.path("/sys/class/block").join(device).join("dev"));
    let numbers: Vec<_> = devices.iter().map(|device| number(device)).collect();
    let mut uses = Vec::new();
    for line in table.lines() {
        // "36 35 98:0 /root /mount/point options… - type source options"
        let fields: Vec<_> = line.split(' ').collect();
        let (Some(&mounted), Some(at)) = (fields.get(2), fields.get(4)) else { continue };
        let source = fields.iter().skip_while(|&&field| field != "-").nth(2);
        let source = source.map(|source| last_part(source));
        for (device, number) in devices.iter().zip(&numbers) {
            if number.as_deref() == Some(mounted) || source == Some(device) {
                uses.push(Use::Mounted { device: device.clone(), at: unescape(at) });
            }
        }
    }
    uses
}

fn swaps(machine: &Machine, devices: &[String]) -> Vec<Use> {
    let table = text(&machine.path("/proc/swaps")).unwrap_or_default();
    let mut uses = Vec::new();
    for line in table.lines().skip(1) {
        let name = line.split_whitespace().next().map(last_part);
        let used = devices.iter().find(|device| name == Some(device));
        uses.extend(used.map(|device| Use::Swap { device: device.clone() }));
    }
    uses
}

/// Devices and file systems that use a device.
fn holders(machine: &Machine, device: &str) -> Vec<Use> {
    let block = machine.path("/sys/class/block");
    let mut by: Vec<_> = names(&block.join(device).join("holders"))
        .into_iter()
        .map(|holder| match text(&block.join(&holder).join("dm/name")) {
            Some(name) => format!("{holder} ({name})"),
            None => holder,
        })
        .collect();
    let btrfs = machine.path("/sys/fs/btrfs");
    let of_btrfs = names(&btrfs).into_iter();
    let of_btrfs = of_btrfs
        .filter(|id| btrfs.join(id).join("devices").join(device).symlink_metadata().is_ok());
    by.extend(of_btrfs.map(|id| format!("btrfs {id}")));
    by.into_iter().map(|by| Use::Held { device: device.to_owned(), by }).collect()
}

fn last_part(path: &str) -> &str {
    Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or(path)
}

/// Mount points have white space and backslashes written as `\` and three octal digits.
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let code = (*first == b'\\').then(|| after.get(..3)).flatten();
        let code = code.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
