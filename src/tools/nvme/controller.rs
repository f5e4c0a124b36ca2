//! A controller: its driver, its IOMMU group, and the namespaces that the kernel's driver shows.

use super::machine::{link_name, names, number, text};
use super::{Address, Machine};

/// PCI class code of an NVM Express I/O controller: mass storage, non-volatile memory, NVMe.
const NVME_CLASS: u64 = 0x01_08_02;

/// The driver that hands a PCI function to a process.
pub const VFIO_PCI: &str = "vfio-pci";

/// An NVMe controller.
#[derive(Debug)]
pub struct Controller {
    pub address: Address,
    /// PCI vendor and device.
    pub ids: (u16, u16),
    /// The driver that has it.
    pub driver: Option<String>,
    /// The only driver that may have it, if that is set.
    pub driver_override: Option<String>,
    pub group: Option<Group>,
    /// Its description, while the kernel's driver has it.
    pub identity: Option<Identity>,
    /// Its namespaces, while the kernel's driver has it.
    pub namespaces: Vec<Namespace>,
    pub numa_node: Option<u64>,
}

/// The description of a controller.
#[derive(Debug)]
pub struct Identity {
    pub model: String,
    pub serial: String,
    pub firmware: String,
}

/// A namespace as a disk of the kernel's.
#[derive(Debug)]
pub struct Namespace {
    /// The disk's name: `nvme0n1`. Where several controllers lead to it, the one that stands for all.
    pub disk: String,
    pub id: u64,
    pub bytes: u64,
    pub block_size: u64,
    pub zoned: bool,
}

/// Functions that the IOMMU cannot tell apart: one user has all of them.
#[derive(Debug)]
pub struct Group {
    pub number: u32,
    pub functions: Vec<Function>,
}

/// A PCI function in a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    pub address: Address,
    /// Class, subclass and programming interface.
    pub class: u64,
    pub driver: Option<String>,
}

impl Controller {
    /// All controllers of a machine, by address.
    pub fn all(machine: &Machine) -> Vec<Controller> {
        let mut addresses: Vec<Address> = names(&machine.path("/sys/bus/pci/devices"))
            .iter()
            .filter_map(|name| name.parse().ok())
            .collect();
        addresses.sort();
        addresses.into_iter().filter_map(|address| Controller::at(machine, address).ok()).collect()
    }

    /// The controller at an address.
    pub fn at(machine: &Machine, address: Address) -> Result<Controller, String> {
        let folder = machine.function(address);
        let Some(function) = Function::at(machine, address) else {
            return Err(format!("{address}: no such PCI function (lspci -D lists them)"));
        };
        if function.class != NVME_CLASS {
            let class = function.class;
            return Err(format!(
                "{address}: not an NVMe controller (class {class:06x}, wanted {NVME_CLASS:06x})"
            ));
        }
        let id = |name: &str| number(&folder.join(name)).unwrap_or_default() as u16;
        let (mut identity, mut namespaces) = (None, Vec::new());
        for name in names(&folder.join("nvme")) {
            let controller = folder.join("nvme").join(name);
            let reported = |name: &str| text(&controller.join(name)).unwrap_or_default();
            identity = Some(Identity {
                model: reported("model"),
                serial: reported("serial"),
                firmware: reported("firmware_rev"),
            });
            let disks = names(&controller);
            namespaces.extend(disks.iter().filter_map(|name| Namespace::named(machine, name)));
        }
        namespaces.sort_by_key(|namespace| namespace.id);
        let driver_override = text(&folder.join("driver_override"));
        Ok(Controller {
            address,
            ids: (id("vendor"), id("device")),
            driver: function.driver,
            driver_override: driver_override.filter(|name| !name.is_empty() && name != "(null)"),
            group: Group::of(machine, address),
            identity,
            namespaces,
            // -1 where there is none.
            numa_node: number(&folder.join("numa_node")),
        })
    }

    /// Whether vfio-pci has it.
    pub fn has_vfio(&self) -> bool {
        self.driver.as_deref() == Some(VFIO_PCI)
    }

    /// The device node through which a process gets it, if it has an IOMMU group.
    pub fn node(&self) -> Option<String> {
        self.group.as_ref().map(|group| format!("vfio/{}", group.number))
    }
}

impl Namespace {
    /// The namespace whose folder below its controller has that name, if it is one of a namespace.
    fn named(machine: &Machine, name: &str) -> Option<Namespace> {
        let disk = head(name)?;
        let folder = machine.path("/sys/class/block").join(&disk);
        Some(Namespace {
            id: number(&folder.join("nsid"))?,
            // Counted in units of 512 bytes, whatever the disk's blocks are.
            bytes: number(&folder.join("size")).unwrap_or_default() * 512,
            block_size: number(&folder.join("queue/logical_block_size")).unwrap_or_default(),
            zoned: text(&folder.join("queue/zoned")).is_some_and(|zoned| zoned != "none"),
            disk,
        })
    }

    /// The disk and its partitions.
    pub fn devices(&self, machine: &Machine) -> Vec<String> {
        let folder = machine.path("/sys/class/block").join(&self.disk);
        let partitions =
            names(&folder).into_iter().filter(|name| folder.join(name).join("partition").exists());
        [self.disk.clone()].into_iter().chain(partitions).collect()
    }
}

/// The disk for a folder of that name: `nvme0n1` for itself and for `nvme0c1n1`, one of the ways to
/// it; `None` if the name is no namespace's.
fn head(name: &str) -> Option<String> {
    let rest = name.strip_prefix("nvme")?;
    let (before, namespace) = rest.split_once('n')?;
    let subsystem = before.split_once('c').map_or(before, |(subsystem, _)| subsystem);
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    (digits(subsystem) && digits(namespace)).then(|| format!("nvme{subsystem}n{namespace}"))
}

impl Group {
    fn of(machine: &Machine, address: Address) -> Option<Group> {
        let link = machine.function(address).join("iommu_group");
        let number = link_name(&link)?.parse().ok()?;
        let mut functions: Vec<_> = names(&link.join("devices"))
            .iter()
            .filter_map(|name| Function::at(machine, name.parse().ok()?))
            .collect();
        functions.sort_by_key(|function| function.address);
        Some(Group { number, functions })
    }
}

impl Function {
    fn at(machine: &Machine, address: Address) -> Option<Function> {
        let folder = machine.function(address);
        let class = number(&folder.join("class"))?;
        Some(Function { address, class, driver: link_name(&folder.join("driver")) })
    }

    pub fn is_controller(&self) -> bool {
        self.class == NVME_CLASS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ways_to_a_disk_stand_for_the_disk() {
        assert_eq!(head("nvme0n1").as_deref(), Some("nvme0n1"));
        assert_eq!(head("nvme3c12n7").as_deref(), Some("nvme3n7"));
        for other in ["ng0n1", "hwmon0", "nvme0", "nvme-subsys0", "nvmen1", "nvme0n", "nvme0n1p1"] {
            assert_eq!(head(other), None, "{other}");
        }
    }
}
