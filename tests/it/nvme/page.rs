//! The commands of docs/nvme.md, run as written in a guest.
//!
//! They go from `lspci` to a guest inside the guest on the controller, and back.

use super::{Drives, MIB, MORE_TIME, VUBLK, lab, prelude};
use crate::docs::page::Page;
use std::fs;
use std::path::Path;

#[test]
#[ignore = "minutes of a guest in a guest: make test-nvme"]
fn the_commands_of_the_page_lead_from_lspci_to_a_guest_on_the_controller_and_back() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let commands = Page::read("docs/nvme.md").commands();
    // The program in PATH, and the source tree as it is seen from a folder that can be written to.
    let begins = format!(
        "PATH=$PATH:{}\n\
         mkdir /tmp/here && cd /tmp/here && ln -s {} tests && ln -s {} target || exit 1\n\
         for try in $(seq 100); do [ -b /dev/nvme0n1 ] && break; sleep 0.1; done\n",
        Path::new(VUBLK).parent().unwrap().display(),
        source.join("tests").display(),
        target.display(),
    );
    // The lines of the guest in the guest are distinguished from its own.
    let does = format!("(\nset -e\n{commands}\n) 2>&1 | sed -u 's/^GUEST-/inner GUEST-/'\n");
    let ends = "echo \"driver $(basename $(readlink /sys/bus/pci/devices/0000:01:00.0/driver))\"\n";
    let script = [&*prelude(), &begins, &does, ends].concat();
    let drives = Drives::new(1, 64);
    let guest = lab().memory("1536M").share(&source.join("tests")).share(&target.join("guest"));
    let port = "pcie-root-port,id=rp0,chassis=1,slot=1,addr=0x1c";
    let guest = drives.attach(guest).for_more(2 * MORE_TIME);
    let guest = guest.qemu(&["-device", port, "-device", "nvme,serial=N,bus=rp0,drive=d0"]);
    let console = guest.run(&script);
    assert!(console.text().contains("the disk works"), "{}", console.text());
    assert_eq!(console.value("driver"), "nvme");
    let bytes = fs::read(drives.path(0)).unwrap();
    let wanted: Vec<u8> = b"vublk\n".iter().copied().cycle().take(8 * MIB as usize).collect();
    assert!(bytes[..wanted.len()] == wanted);
}
