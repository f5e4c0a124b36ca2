//! NVMe controllers in a Linux guest with an IOMMU: bound, used, and given back.
//!
//! The host looks at the bytes in the drives' files. The guest sees this machine's programs and what cargo has built.

mod bind;
mod inside;
mod io;
mod page;
mod served;

use crate::cli::VUBLK;
use crate::guest::boot::Guest;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// These guests do more than others, one thing after another.
const MORE_TIME: Duration = Duration::from_secs(400);

/// A guest with an IOMMU in which this machine's programs and what cargo has built are at hand.
fn lab() -> Guest {
    with_programs(Guest::new().with_iommu())
}

fn with_programs(guest: Guest) -> Guest {
    let built = Path::new(VUBLK).parent().unwrap();
    guest.share(Path::new("/usr")).share(built)
}

/// What a script in the lab's guest begins with: the program's name, and the kernel's drivers.
fn prelude() -> String {
    format!("vublk={VUBLK}\nmodprobe nvme\nmodprobe vfio_iommu_type1\nmodprobe dm_mod\n")
}

/// The next part of a script: so many controllers given to vfio-pci.
fn bound(addresses: &str) -> String {
    format!("modprobe vfio-pci && $vublk nvme bind {addresses} || exit 1\n")
}

/// The files behind a guest's drives; QEMU knows them as d0, d1 and so on.
struct Drives {
    dir: TempDir,
    count: usize,
}

impl Drives {
    /// So many empty, sparse files of `mib` MiB.
    fn new(count: usize, mib: u64) -> Drives {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let drives = Drives { dir, count };
        for index in 0..count {
            File::create(drives.path(index)).unwrap().set_len(mib * MIB).unwrap();
        }
        drives
    }

    fn path(&self, index: usize) -> PathBuf {
        self.dir.path().join(format!("d{index}"))
    }

    /// A guest that has them, on no controllers yet.
    fn attach(&self, guest: Guest) -> Guest {
        self.attach_some(guest, self.count)
    }

    /// The same with the first `count` of them.
    fn attach_some(&self, mut guest: Guest, count: usize) -> Guest {
        for index in 0..count {
            let path = self.path(index);
            let drive =
                format!("if=none,id=d{index},format=raw,discard=unmap,file={}", path.display());
            guest = guest.qemu(&["-drive", &drive]);
        }
        guest
    }
}
