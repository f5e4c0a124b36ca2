//! Tests on a machine in a temporary folder, with a kernel that reacts to writes to its attributes.

use super::*;
use std::cell::RefCell;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::rc::Rc;

struct Fake {
    dir: tempfile::TempDir,
    machine: Machine,
    /// What was written, and to which attribute.
    written: Rc<RefCell<Vec<String>>>,
    /// The write that fails, and how.
    failing: Rc<RefCell<Option<(&'static str, i32)>>>,
}

const A: &str = "0000:01:00.0";
const B: &str = "0000:02:00.0";

impl Fake {
    /// Two controllers, 0000:01:00.0 and 0000:02:00.0, each in an IOMMU group of its own.
    fn new() -> Fake {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        let written = Rc::new(RefCell::new(Vec::new()));
        let failing = Rc::new(RefCell::new(None));
        let kernel = {
            let (root, written, failing) = (root.clone(), written.clone(), failing.clone());
            move |path: &Path, text: &str| {
                let name = path.strip_prefix(root.join("sys/bus/pci")).unwrap();
                let name = name.to_string_lossy().into_owned();
                if let Some((end, errno)) = *failing.borrow()
                    && name.ends_with(end)
                {
                    return Err(io::Error::from_raw_os_error(errno));
                }
                written.borrow_mut().push(format!("{text:?} to {name}"));
                act(&root, &name, text);
                Ok(())
            }
        };
        let machine = Machine::with_kernel(&root, kernel);
        let fake = Fake { dir, machine, written, failing };
        fake.put("proc/cpuinfo", "vendor_id\t: GenuineIntel\n");
        fake.put("proc/self/mountinfo", "");
        for driver in ["nvme", VFIO_PCI, "ahci"] {
            fake.put(&format!("sys/bus/pci/drivers/{driver}/unbind"), "");
        }
        fake.controller(A, 7, 0);
        fake.controller(B, 8, 1);
        fake
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    fn function(&self, address: &str, class: &str, group: u32, driver: &str) {
        let folder = format!("sys/bus/pci/devices/{address}");
        self.put(&format!("{folder}/class"), class);
        self.put(&format!("{folder}/driver_override"), "(null)\n");
        self.link(&format!("{folder}/driver"), &format!("../../drivers/{driver}"));
        let of_group = format!("sys/kernel/iommu_groups/{group}/devices");
        self.link(&format!("{of_group}/{address}"), "../../../..");
        self.link(
            &format!("{folder}/iommu_group"),
            &format!("../../../../kernel/iommu_groups/{group}"),
        );
    }

    /// A controller that the kernel has, with one namespace of 1 GiB: `nvme{number}n1`.
    fn controller(&self, address: &str, group: u32, number: u32) {
        self.function(address, "0x010802\n", group, "nvme");
        let folder = format!("sys/bus/pci/devices/{address}");
        self.put(&format!("{folder}/vendor"), "0x144d\n");
        self.put(&format!("{folder}/device"), "0xa80a\n");
        self.put(&format!("{folder}/nvme/nvme{number}/model"), "Fast Drive   \n");
        self.put(&format!("{folder}/nvme/nvme{number}/serial"), "S1\n");
        // One of the ways to the disk, as with several controllers.
        fs::create_dir(
            self.dir.path().join(format!("{folder}/nvme/nvme{number}/nvme{number}c0n1")),
        )
        .unwrap();
        let disk = format!("nvme{number}n1");
        self.put(&format!("sys/class/block/{disk}/nsid"), "1\n");
        self.put(&format!("sys/class/block/{disk}/dev"), &format!("259:{}\n", number * 16));
        self.put(&format!("sys/class/block/{disk}/size"), "2097152\n");
        self.put(&format!("sys/class/block/{disk}/queue/logical_block_size"), "4096\n");
        self.put(&format!("dev/{disk}"), "");
        self.put(&format!("dev/vfio/{group}"), "");
    }

    fn partition(&self, disk: &str) {
        self.put(&format!("sys/class/block/{disk}/{disk}p1/partition"), "1\n");
        self.put(&format!("sys/class/block/{disk}p1/dev"), "259:1\n");
    }

    fn at(&self, address: &str) -> Controller {
        Controller::at(&self.machine, address.parse().unwrap()).unwrap()
    }

    fn bind(&self, addresses: &[&str]) -> Result<(), String> {
        let addresses: Vec<_> = addresses.iter().map(|text| text.parse().unwrap()).collect();
        bind(&self.machine, &addresses).map(drop)
    }

    fn unbind(&self, address: &str) -> Result<(), String> {
        unbind(&self.machine, address.parse().unwrap()).map(drop)
    }

    /// Fails the test unless binding 0000:01:00.0 is refused with that reason, and nothing was changed.
    fn refuses(&self, reason: &str) {
        assert_eq!(self.bind(&[A]), Err(format!("{A}: {reason}")));
        assert_eq!(*self.written.borrow(), [""; 0]);
        assert_eq!(self.at(A).driver.as_deref(), Some("nvme"));
    }
}

/// What the kernel does when an attribute below `/sys/bus/pci` is written.
fn act(root: &Path, name: &str, text: &str) {
    let functions = root.join("sys/bus/pci/devices");
    let link = |address: &str| functions.join(address).join("driver");
    match name.split('/').collect::<Vec<_>>()[..] {
        ["devices", address, "driver_override"] => {
            let text = if text == "\n" { "(null)\n".to_owned() } else { format!("{text}\n") };
            fs::write(functions.join(address).join("driver_override"), text).unwrap();
        }
        ["devices", address, "driver", "unbind"] => {
            assert_eq!(address, text);
            fs::remove_file(link(address)).unwrap();
        }
        ["drivers_probe"] => {
            let chosen = fs::read_to_string(functions.join(text).join("driver_override")).unwrap();
            let driver = match chosen.trim() {
                "(null)" => "nvme",
                chosen => chosen,
            };
            if root.join("sys/bus/pci/drivers").join(driver).join("unbind").exists() {
                symlink(format!("../../drivers/{driver}"), link(text)).unwrap();
            }
        }
        ref other => panic!("{text:?} was written to {other:?}"),
    }
}

#[test]
fn controllers_are_found_with_their_drivers_groups_and_namespaces() {
    let fake = Fake::new();
    fake.function("0000:00:1f.2", "0x010601\n", 3, "ahci");
    let all = Controller::all(&fake.machine);
    let addresses: Vec<_> = all.iter().map(|c| c.address.to_string()).collect();
    assert_eq!(addresses, [A, B]);
    let first = &all[0];
    assert_eq!(first.ids, (0x144d, 0xa80a));
    assert_eq!(first.driver.as_deref(), Some("nvme"));
    assert_eq!(first.driver_override, None);
    assert_eq!(first.group.as_ref().unwrap().number, 7);
    assert_eq!(first.identity.as_ref().unwrap().model, "Fast Drive");
    let [namespace] = &*first.namespaces else { panic!("{:?}", first.namespaces) };
    assert_eq!((&*namespace.disk, namespace.id), ("nvme0n1", 1));
    assert_eq!((namespace.bytes, namespace.block_size), (1 << 30, 4096));
    assert!(uses(&fake.machine, first).is_empty());
    assert!(obstacles(&fake.machine, first, &[]).is_empty());
}

#[test]
fn a_controller_goes_to_vfio_pci_and_back_in_an_order_that_lets_no_other_driver_in_between() {
    let fake = Fake::new();
    fake.bind(&[A]).unwrap();
    assert!(fake.at(A).has_vfio());
    assert_eq!(fake.at(B).driver.as_deref(), Some("nvme"));
    let folder = format!("devices/{A}");
    assert_eq!(
        *fake.written.borrow(),
        [
            format!("\"vfio-pci\" to {folder}/driver_override"),
            format!("\"{A}\" to {folder}/driver/unbind"),
            format!("\"{A}\" to drivers_probe"),
        ]
    );
    fake.written.borrow_mut().clear();
    fake.bind(&[A]).unwrap();
    assert_eq!(*fake.written.borrow(), [""; 0], "it was bound already");
    fake.unbind(A).unwrap();
    assert_eq!(
        *fake.written.borrow(),
        [
            format!("\"\\n\" to {folder}/driver_override"),
            format!("\"{A}\" to {folder}/driver/unbind"),
            format!("\"{A}\" to drivers_probe"),
        ]
    );
    assert_eq!(fake.at(A).driver.as_deref(), Some("nvme"));
    assert_eq!(fake.at(A).driver_override, None);
    let error = fake.unbind(A);
    assert_eq!(error, Err(format!("{A}: vfio-pci does not have it (driver nvme)")));
}

#[test]
fn a_controller_with_a_mounted_partition_is_refused() {
    let fake = Fake::new();
    fake.partition("nvme0n1");
    fake.put(
        "proc/self/mountinfo",
        "36 35 259:1 / /mnt/my\\040data rw shared:1 - ext4 /dev/root rw\n",
    );
    fake.refuses("in use: nvme0n1p1 is mounted on /mnt/my data");
}

#[test]
fn a_mount_without_a_device_number_of_its_own_is_known_by_its_source() {
    let fake = Fake::new();
    fake.put("proc/self/mountinfo", "36 35 0:42 / /home rw - btrfs /dev/nvme0n1 rw\n");
    fake.refuses("in use: nvme0n1 is mounted on /home");
}

#[test]
fn a_controller_with_holders_or_in_a_btrfs_of_several_devices_is_refused() {
    let fake = Fake::new();
    fake.partition("nvme0n1");
    fake.link("sys/class/block/nvme0n1p1/holders/dm-0", "../../dm-0");
    fake.put("sys/class/block/dm-0/dm/name", "vg0-root\n");
    fake.link("sys/class/block/nvme0n1/holders/md127", "../../md127");
    fake.link("sys/fs/btrfs/4711/devices/nvme0n1", "../../../block/nvme0n1");
    fake.refuses(
        "in use: md127 stands on nvme0n1; btrfs 4711 stands on nvme0n1; dm-0 (vg0-root) stands on \
         nvme0n1p1",
    );
}

#[test]
fn a_controller_with_swap_space_is_refused() {
    let fake = Fake::new();
    let swaps = "Filename\tType\tSize\tUsed\tPriority\n/dev/nvme0n1 partition 1048572 0 -2\n";
    fake.put("proc/swaps", swaps);
    fake.refuses("in use: nvme0n1 is swap space");
}

#[test]
fn a_controller_that_a_process_has_open_is_refused() {
    let fake = Fake::new();
    fake.put("proc/77/comm", "qemu-system-x86\n");
    fake.link("proc/77/fd/9", "/dev/nvme0n1");
    fake.refuses("in use: process 77 (qemu-system-x86) has nvme0n1 open");
}

#[test]
fn a_controller_whose_users_cannot_be_seen_is_refused() {
    for missing in ["/dev/nvme0n1", "/proc/self/mountinfo"] {
        let fake = Fake::new();
        fs::remove_file(fake.machine.path(missing)).unwrap();
        fake.refuses(&format!(
            "in use: nvme0n1 may be mounted or open: without {missing} that cannot be seen"
        ));
    }
}

#[test]
fn a_controller_without_an_iommu_group_is_refused_with_the_cure() {
    let fake = Fake::new();
    fs::remove_file(fake.machine.function(A.parse().unwrap()).join("iommu_group")).unwrap();
    fake.refuses(
        "no IOMMU: add intel_iommu=on to the kernel's command line, and enable VT-d in the firmware",
    );
    fake.put("proc/cpuinfo", "vendor_id\t: AuthenticAMD\n");
    fake.refuses("no IOMMU: enable the IOMMU (AMD-Vi) in the firmware");
}

#[test]
fn without_vfio_pci_binding_is_refused_with_the_cure() {
    let fake = Fake::new();
    fs::remove_dir_all(fake.machine.driver(VFIO_PCI)).unwrap();
    fake.refuses("the kernel's module vfio-pci is not loaded: modprobe vfio-pci");
}

#[test]
fn a_group_with_another_function_in_use_by_a_driver_is_refused_but_bridges_are_let_be() {
    let fake = Fake::new();
    fake.function("0000:00:1c.0", "0x060400\n", 7, "pcieport");
    assert!(obstacles(&fake.machine, &fake.at(A), &[]).is_empty());
    fake.function("0000:01:00.1", "0x010601\n", 7, "ahci");
    fake.refuses(
        "group 7 also holds 0000:01:00.1 (driver ahci): unbind that, or move the controller to \
         another slot",
    );
}

#[test]
fn two_controllers_of_one_group_go_together_and_only_if_neither_is_in_use() {
    let fake = Fake::new();
    let second = "0000:01:00.1";
    fake.controller(second, 7, 2);
    fake.refuses(&format!(
        "group 7 also holds {second} (driver nvme): give both: vublk nvme bind {A} {second}"
    ));
    fake.put("proc/swaps", "Filename\n/dev/nvme2n1 partition 1 0 -2\n");
    let error = fake.bind(&[A, second]);
    assert_eq!(error, Err(format!("{second}: in use: nvme2n1 is swap space")));
    assert_eq!(*fake.written.borrow(), [""; 0]);
    fake.put("proc/swaps", "Filename\n");
    fake.bind(&[A, second]).unwrap();
    assert!(fake.at(A).has_vfio() && fake.at(second).has_vfio());
}

#[test]
fn what_is_not_an_nvme_controller_or_not_there_is_refused() {
    let fake = Fake::new();
    fake.function("0000:00:1f.2", "0x010601\n", 3, "ahci");
    let error = fake.bind(&["0000:00:1f.2"]).unwrap_err();
    assert_eq!(error, "0000:00:1f.2: not an NVMe controller (class 010601, wanted 010802)");
    let error = fake.bind(&["0000:09:00.0"]).unwrap_err();
    assert_eq!(error, "0000:09:00.0: no such PCI function (lspci -D lists them)");
}

#[test]
fn a_controller_of_another_userspace_driver_is_refused() {
    let fake = Fake::new();
    let link = fake.machine.function(A.parse().unwrap()).join("driver");
    fs::remove_file(&link).unwrap();
    symlink("../../drivers/uio_pci_generic", &link).unwrap();
    let error = fake.bind(&[A]).unwrap_err();
    let words = "driver uio_pci_generic has it: give it back to the kernel's nvme first";
    assert_eq!(error, format!("{A}: {words}"));
}

#[test]
fn without_permission_the_line_says_so_and_nothing_is_changed() {
    let fake = Fake::new();
    *fake.failing.borrow_mut() = Some(("driver_override", libc::EACCES));
    let error = fake.bind(&[A]).unwrap_err();
    assert!(error.ends_with("driver_override: permission denied: run this as root"), "{error}");
    assert_eq!(fake.at(A).driver.as_deref(), Some("nvme"));
}

#[test]
fn a_controller_that_vfio_pci_does_not_take_goes_back() {
    let fake = Fake::new();
    // The driver is there, and takes nothing.
    fs::remove_file(fake.machine.driver(VFIO_PCI).join("unbind")).unwrap();
    let error = fake.bind(&[A]).unwrap_err();
    assert_eq!(error, format!("{A}: vfio-pci did not take it: see dmesg"));
    assert_eq!(fake.at(A).driver.as_deref(), Some("nvme"));
    assert_eq!(fake.at(A).driver_override, None);
}

#[test]
fn when_the_second_controller_fails_the_first_goes_back_too() {
    let fake = Fake::new();
    *fake.failing.borrow_mut() = Some(("0000:02:00.0/driver/unbind", libc::EIO));
    let error = fake.bind(&[A, B]).unwrap_err();
    assert!(error.starts_with(B) && error.ends_with("Input/output error"), "{error}");
    for address in [A, B] {
        assert_eq!(fake.at(address).driver.as_deref(), Some("nvme"), "{address}");
        assert_eq!(fake.at(address).driver_override, None, "{address}");
    }
}

#[test]
fn a_controller_that_a_daemon_has_is_not_given_back() {
    let fake = Fake::new();
    fake.bind(&[A]).unwrap();
    fake.written.borrow_mut().clear();
    fake.put("proc/99/comm", "vublk\n");
    fake.link("proc/99/fd/5", "/dev/vfio/7");
    let error = fake.unbind(A).unwrap_err();
    assert_eq!(error, format!("{A}: in use: process 99 (vublk) has vfio/7 open"));
    assert_eq!(*fake.written.borrow(), [""; 0]);
}

#[test]
fn what_is_reserved_is_read_from_the_group() {
    let fake = Fake::new();
    let table = "0x0000000000000000 0x0000000000ffffff direct-relaxable\nnonsense\n\
        0x00000000fee00000 0x00000000feefffff msi\n";
    fake.put("sys/kernel/iommu_groups/7/reserved_regions", table);
    let regions = limits::reserved_regions(&fake.machine, 7);
    let wanted =
        [(0, 0xff_ffff, "direct-relaxable".into()), (0xfee0_0000, 0xfeef_ffff, "msi".into())];
    assert_eq!(regions, wanted);
}
