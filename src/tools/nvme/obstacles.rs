//! Obstacles to using a controller through vfio-pci, besides its users, with remedies.

use super::machine::text;
use super::{Address, Controller, Function, Machine, VFIO_PCI};
use std::fmt;
use std::os::unix::fs::MetadataExt;

/// Drivers of other functions in a group that leave it viable: they start no DMA of their own.
const HARMLESS: [&str; 3] = [VFIO_PCI, "pci-stub", "pcieport"];

/// One reason, as a line that says what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// The function is in no IOMMU group.
    NoIommu { processor: Processor },
    /// A function of its group has a driver that does not leave the group to one process.
    Shared { group: u32, controller: Address, function: Function },
    /// vfio-pci is not loaded.
    NoVfio,
    /// Another driver than the kernel's for NVMe has it.
    Driver { name: String },
    /// All namespaces that are to be seen are of a kind that cannot be used.
    Zoned { disk: String },
    /// The group's device node is not for this user.
    Permission { node: String },
}

/// The maker of the processor, which decides the name of the IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processor {
    Intel,
    Amd,
    Other,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::NoIommu { processor } => {
                let cure = match processor {
                    Processor::Intel => {
                        "add intel_iommu=on to the kernel's command line, and enable VT-d in the \
                         firmware"
                    }
                    Processor::Amd => "enable the IOMMU (AMD-Vi) in the firmware",
                    Processor::Other => "enable it in the firmware",
                };
                write!(f, "no IOMMU: {cure}")
            }
            Obstacle::Shared { group, controller, function } => {
                let Function { address, driver, .. } = function;
                let driver = driver.as_deref().unwrap_or("none");
                let cure = match function.is_controller() {
                    true => format!("give both: vublk nvme bind {controller} {address}"),
                    false => "unbind that, or move the controller to another slot".to_owned(),
                };
                write!(f, "group {group} also holds {address} (driver {driver}): {cure}")
            }
            Obstacle::NoVfio => {
                f.write_str("the kernel's module vfio-pci is not loaded: modprobe vfio-pci")
            }
            Obstacle::Driver { name } => {
                write!(f, "driver {name} has it: give it back to the kernel's nvme first")
            }
            Obstacle::Zoned { disk } => {
                write!(f, "{disk} is zoned: such namespaces cannot be used yet")
            }
            Obstacle::Permission { node } => write!(
                f,
                "no permission for /dev/{node}: run as root, or give it to your user (chown)"
            ),
        }
    }
}

/// What keeps a controller from being used, if the functions of `along` go to vfio-pci with it.
pub fn obstacles(machine: &Machine, controller: &Controller, along: &[Address]) -> Vec<Obstacle> {
    let mut found = Vec::new();
    match &controller.group {
        None => found.push(Obstacle::NoIommu { processor: processor(machine) }),
        Some(group) => {
            let others = group.functions.iter().filter(|function| {
                let itself = function.address == controller.address;
                let goes_too = function.is_controller() && along.contains(&function.address);
                !itself && !goes_too && !leaves_viable(function)
            });
            found.extend(others.map(|function| Obstacle::Shared {
                group: group.number,
                controller: controller.address,
                function: function.clone(),
            }));
        }
    }
    match controller.driver.as_deref() {
        Some(VFIO_PCI) => {
            let node = controller.node();
            let barred = node.filter(|node| !may_open(machine, node));
            found.extend(barred.map(|node| Obstacle::Permission { node }));
        }
        Some("nvme") | None if !machine.driver(VFIO_PCI).exists() => found.push(Obstacle::NoVfio),
        Some("nvme") | None => {}
        Some(name) => found.push(Obstacle::Driver { name: name.to_owned() }),
    }
    let zoned = controller.namespaces.iter().filter(|namespace| namespace.zoned);
    if controller.namespaces.iter().all(|namespace| namespace.zoned) {
        found.extend(zoned.map(|namespace| Obstacle::Zoned { disk: namespace.disk.clone() }));
    }
    found
}

/// Whether a function leaves its group to one process, as the kernel sees it: it has no driver, or one
/// that touches no memory by itself.
fn leaves_viable(function: &Function) -> bool {
    match function.driver.as_deref() {
        None => true,
        Some(driver) => HARMLESS.contains(&driver),
    }
}

fn processor(machine: &Machine) -> Processor {
    let reported = text(&machine.path("/proc/cpuinfo")).unwrap_or_default();
    if reported.contains("GenuineIntel") {
        Processor::Intel
    } else if reported.contains("AuthenticAMD") {
        Processor::Amd
    } else {
        Processor::Other
    }
}

/// Whether this process may open a device node for reading and writing. It is not tried: a group can be
/// open only once, and a daemon that starts just now would find it taken.
fn may_open(machine: &Machine, node: &str) -> bool {
    let Ok(node) = machine.path("/dev").join(node).metadata() else { return true };
    // The folder of a process belongs to its effective user.
    let Ok(myself) = std::fs::metadata("/proc/self") else { return true };
    if myself.uid() == 0 {
        return true;
    }
    let groups = text("/proc/self/status".as_ref()).unwrap_or_default();
    let groups = groups.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap_or_default();
    let in_group = myself.gid() == node.gid()
        || groups.split_whitespace().any(|gid| gid.parse() == Ok(node.gid()));
    let shift = match () {
        () if myself.uid() == node.uid() => 6,
        () if in_group => 3,
        () => 0,
    };
    (node.mode() >> shift) & 0o6 == 0o6
}
