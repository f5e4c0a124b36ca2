//! A device bound to vfio-pci: the kernel's VFIO, with a container and a group.
//!
//! What `vfio-ioctls` lacks is here: mapping the registers, what addresses the IOMMU takes, bus
//! mastering, and errors that say what to do.

use crate::dma::HostRange;
use crate::function::{PciFunction, Registers};
use crate::mmio::Mmio;
use crate::{Error, PciAddress};
use std::fs;
use std::io::ErrorKind;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};
use vmm_sys_util::eventfd::EventFd;

/// The command register of the configuration space, and its bits.
const COMMAND: u64 = 4;
const MEMORY: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
/// NVM Express controllers: mass storage, NVM, NVMe.
const CLASS: u32 = 0x01_08_02;
/// Bytes of the answer to VFIO_IOMMU_GET_INFO, capabilities included.
const INFO: usize = 4096;

/// A function of this process's.
pub struct Vfio {
    address: PciAddress,
    registers: Mutex<Option<Arc<dyn Registers>>>,
    /// Let go of by hand, in `drop`.
    device: ManuallyDrop<VfioDevice>,
    container: Arc<VfioContainer>,
    /// The host wants it back.
    request: Option<EventFd>,
    ranges: Vec<Range<u64>>,
    mappings: Option<u32>,
}

impl Vfio {
    /// Takes a device that is bound to vfio-pci.
    ///
    /// # Errors
    /// One line that begins with the address and says what to do.
    pub fn open(address: PciAddress) -> Result<Vfio, Error> {
        open(address).map_err(|error| error.at(address))
    }

    fn command(&self) -> Result<u16, Error> {
        let mut bytes = [0xff; 2];
        self.device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, &mut bytes, COMMAND);
        match u16::from_le_bytes(bytes) {
            u16::MAX => Err(Error::new("its configuration cannot be read: the device is gone")
                .with_errno(libc::ENODEV)),
            command => Ok(command),
        }
    }
}

fn open(address: PciAddress) -> Result<Vfio, Error> {
    let path = PathBuf::from(format!("/sys/bus/pci/devices/{address}"));
    let group = check(address, &path)?;
    let container = VfioContainer::new(None).map_err(|error| explain(error, address, group))?;
    let container = Arc::new(container);
    let device = VfioDevice::new(&path, container.clone(), true)
        .map_err(|error| explain(error, address, group))?;
    let (ranges, mappings) = info(&container)?;
    let mut vfio = Vfio {
        address,
        registers: Mutex::new(None),
        device: ManuallyDrop::new(device),
        container,
        request: None,
        ranges,
        mappings,
    };
    vfio.request = vfio.watch_requests();
    Ok(vfio)
}

/// Looks for everything that keeps the device from being used. The number of its group.
fn check(address: PciAddress, path: &Path) -> Result<u32, Error> {
    if !path.exists() {
        return Err(Error::new(
            "there is no such PCI device: `vublk nvme list` shows those there are",
        )
        .with_errno(libc::ENODEV));
    }
    let class = fs::read_to_string(path.join("class")).unwrap_or_default();
    let class = u32::from_str_radix(class.trim().trim_start_matches("0x"), 16).unwrap_or(0);
    if class != CLASS {
        return Err(Error::new(format!("PCI class {class:#08x} is not an NVMe controller's"))
            .with_errno(libc::EINVAL));
    }
    let name = |link: &str| {
        let target = fs::read_link(path.join(link)).ok()?;
        target.file_name().map(|name| name.to_string_lossy().into_owned())
    };
    match name("driver").as_deref() {
        Some("vfio-pci") => {}
        driver => {
            let now = driver.map_or("no driver".to_owned(), |name| format!("driver {name}"));
            return Err(Error::new(format!(
                "it is bound to {now}, not to vfio-pci: run `vublk nvme bind {address}`"
            ))
            .with_errno(libc::ENODEV));
        }
    }
    let group = name("iommu_group").and_then(|group| group.parse().ok());
    group.ok_or_else(|| {
        Error::new(
            "it is in no IOMMU group: switch the IOMMU on in the firmware and on the kernel's command \
             line (intel_iommu=on; AMD's is on by default)",
        )
        .with_errno(libc::ENODEV)
    })
}

/// VFIO's errors in words that say what to do.
fn explain(error: VfioError, address: PciAddress, group: u32) -> Error {
    match error {
        VfioError::OpenContainer(error) if error.kind() == ErrorKind::NotFound => {
            Error::new("/dev/vfio/vfio is not there: load the module vfio-pci (modprobe vfio-pci)")
                .with_errno(libc::ENOENT)
        }
        VfioError::OpenContainer(error) => Error::os("opening /dev/vfio/vfio", &error),
        VfioError::OpenGroup(error, _) => match error.raw_os_error() {
            Some(libc::EBUSY) => Error::new(format!(
                "IOMMU group {group} is used by another process: a controller has one user at a time"
            ))
            .with_errno(libc::EBUSY),
            Some(libc::EACCES | libc::EPERM) => Error::new(format!(
                "no permission on /dev/vfio/{group}: give it to the user of this process (chown)"
            ))
            .with_errno(libc::EACCES),
            Some(libc::ENOENT) => Error::new(format!(
                "/dev/vfio/{group} is not there: run `vublk nvme bind {address}`"
            ))
            .with_errno(libc::ENOENT),
            _ => Error::os(format_args!("opening /dev/vfio/{group}"), &error),
        },
        VfioError::GroupViable => Error::new(format!(
            "IOMMU group {group} is not viable: every device of it must be bound to vfio-pci or to no \
             driver (ls /sys/kernel/iommu_groups/{group}/devices)"
        ))
        .with_errno(libc::EINVAL),
        VfioError::ContainerSetIOMMU(error) if error.errno() == libc::EPERM => Error::new(
            "the IOMMU does not keep interrupts apart: switch interrupt remapping on, or load \
             vfio_iommu_type1 with allow_unsafe_interrupts=1",
        )
        .with_errno(libc::EPERM),
        VfioError::VfioExtension => {
            Error::new("the kernel has no type 1 IOMMU for VFIO: load the module vfio_iommu_type1")
                .with_errno(libc::ENODEV)
        }
        other => Error::new(format!("taking it with VFIO: {other}")),
    }
}

/// What addresses the IOMMU takes, and how many mappings there may be: VFIO_IOMMU_GET_INFO and its
/// chain of capabilities (linux/vfio.h).
fn info(container: &VfioContainer) -> Result<(Vec<Range<u64>>, Option<u32>), Error> {
    /// `_IO(VFIO_TYPE, VFIO_BASE + 12)`.
    const GET_INFO: libc::c_ulong = 0x3b70;
    const HAS_CAPS: u32 = 1 << 1;
    const IOVA_RANGES: u16 = 1;
    const DMA_AVAILABLE: u16 = 3;

    let mut words = [0u64; INFO / 8];
    words[0] = INFO as u64;
    // SAFETY: the call writes at most as many bytes as the first word says, and there are as many.
    let result = unsafe { libc::ioctl(container.as_raw_fd(), GET_INFO as _, words.as_mut_ptr()) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        return Err(Error::os("asking the IOMMU which addresses it takes", &error));
    }
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let half = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let (flags, mut at) = (word(4).unwrap_or(0), word(16).unwrap_or(0) as usize);
    let (mut ranges, mut mappings) = (Vec::new(), None);
    // The chain continues at larger offsets, or it has no end.
    while flags & HAS_CAPS != 0 && at != 0 {
        match half(at) {
            Some(IOVA_RANGES) => {
                for n in 0..word(at + 8).unwrap_or(0).min(256) as usize {
                    let (Some(start), Some(last)) =
                        (long(at + 16 + 16 * n), long(at + 24 + 16 * n))
                    else {
                        break;
                    };
                    ranges.push(start..last.saturating_add(1));
                }
            }
            Some(DMA_AVAILABLE) => mappings = word(at + 8),
            _ => {}
        }
        let next = word(at + 4).unwrap_or(0) as usize;
        if next <= at {
            break;
        }
        at = next;
    }
    if ranges.is_empty() {
        // Kernels before 5.4 do not say. What is below the limit and not of interrupts is taken.
        ranges.push(0..crate::iova::LIMIT);
    }
    Ok((ranges, mappings))
}

impl Drop for Vfio {
    /// What is mapped goes first, then the device, then its group and the container.
    ///
    /// [`VfioDevice`]'s own end closes the device, and then asks sysfs for its group and panics where
    /// there is none: the host may have waited for just this to remove the device. So what it holds, the
    /// descriptor and its share of the container, is given back here.
    fn drop(&mut self) {
        *self.registers.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        // SAFETY: the descriptor is the device's own, and nothing uses the device from here on.
        drop(unsafe { OwnedFd::from_raw_fd(self.device.as_raw_fd()) });
        // SAFETY: `open` gave the device a clone of this very container, which it never drops now. Ours
        // goes after this, and with it the container and the groups in it.
        unsafe { Arc::decrement_strong_count(Arc::as_ptr(&self.container)) };
    }
}

impl Vfio {
    /// Asks to be told when the host wants the device back, and of errors of the bus.
    fn watch_requests(&self) -> Option<EventFd> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).ok()?;
        let watches = |index| {
            let has = self.device.get_irq_info(index).is_some_and(|irq| irq.count > 0);
            has && self.device.enable_irq(index, vec![&event]).is_ok()
        };
        // What an error of the bus means shows when the registers are looked at.
        let any = [VFIO_PCI_REQ_IRQ_INDEX, VFIO_PCI_ERR_IRQ_INDEX].map(watches);
        any[0].then_some(event)
    }
}

impl PciFunction for Vfio {
    fn name(&self) -> String {
        self.address.to_string()
    }

    fn registers(&self, index: u32) -> Result<Arc<dyn Registers>, Error> {
        let mut mapped = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(registers) = &*mapped {
            return Ok(registers.clone());
        }
        let command = self.command()?;
        if command & MEMORY == 0 {
            let bytes = (command | MEMORY).to_le_bytes();
            self.device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, &bytes, COMMAND);
        }
        let (size, flags) =
            (self.device.get_region_size(index), self.device.get_region_flags(index));
        if size == 0 || flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            return Err(Error::new(format!("base address {index} cannot be mapped")));
        }
        // SAFETY: the descriptor is the device's, which lives as long as `self`.
        let fd = unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) };
        let offset = self.device.get_region_offset(index);
        let registers: Arc<dyn Registers> = Arc::new(Mmio::map(fd, offset, size as usize)?);
        *mapped = Some(registers.clone());
        Ok(registers)
    }

    fn iova_ranges(&self) -> Result<Vec<Range<u64>>, Error> {
        Ok(self.ranges.clone())
    }

    fn mappings_left(&self) -> Option<u32> {
        self.mappings
    }

    fn map(&self, iova: u64, memory: HostRange) -> Result<(), Error> {
        let base = memory.address() as *mut u8;
        // SAFETY: the owner of the range keeps it mapped and holds no references to it.
        let result = unsafe { self.container.vfio_dma_map(iova, memory.len(), base) };
        result.map_err(|error| {
            let mib = memory.len().div_ceil(1 << 20);
            let errno = match &error {
                VfioError::IommuDmaMap(error) => error.errno(),
                _ => libc::EIO,
            };
            let text = match errno {
                libc::ENOMEM => format!(
                    "locking {mib} MiB of memory is not allowed (RLIMIT_MEMLOCK = {}): raise it (ulimit -l, \
                     LimitMEMLOCK= of a unit) to hold all memory of all guests",
                    lockable()
                ),
                libc::ENOSPC => format!(
                    "mapping {mib} MiB: no more mappings: raise dma_entry_limit of vfio_iommu_type1"
                ),
                _ => format!("mapping {mib} MiB for the device: {error}"),
            };
            Error::new(text).with_errno(errno)
        })
    }

    fn unmap(&self, iova: u64, len: usize) -> Result<(), Error> {
        self.container
            .vfio_dma_unmap(iova, len)
            .map_err(|error| Error::new(format!("unmapping {len} bytes at {iova:#x}: {error}")))
    }

    fn vectors(&self) -> u32 {
        self.device.get_irq_info(VFIO_PCI_MSIX_IRQ_INDEX).map_or(0, |irq| irq.count)
    }

    fn set_vectors(&self, events: &[&EventFd]) -> Result<(), Error> {
        self.device
            .enable_msix(events.to_vec())
            .map_err(|error| Error::new(format!("{} MSI-X interrupts: {error}", events.len())))
    }

    fn set_bus_master(&self, on: bool) -> Result<(), Error> {
        let command = self.command()?;
        let wanted = if on { command | BUS_MASTER | MEMORY } else { command & !BUS_MASTER };
        let bytes = wanted.to_le_bytes();
        self.device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, &bytes, COMMAND);
        match self.command()? {
            now if (now ^ wanted) & BUS_MASTER == 0 => Ok(()),
            now => Err(Error::new(format!("its command register stays at {now:#06x}"))),
        }
    }

    fn reset(&self) -> Result<(), Error> {
        /// `_IO(VFIO_TYPE, VFIO_BASE + 11)`. The crate's own call does not say how it went.
        const RESET: libc::c_ulong = 0x3b6f;
        // SAFETY: names no memory.
        match unsafe { libc::ioctl(self.device.as_raw_fd(), RESET as _) } {
            0 => Ok(()),
            _ => Err(Error::os("resetting the function", &std::io::Error::last_os_error())),
        }
    }

    fn request_event(&self) -> Option<&EventFd> {
        self.request.as_ref()
    }
}

/// How much memory the process may lock, as a limit says it.
fn lockable() -> String {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes one structure.
    unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    match limit.rlim_cur {
        libc::RLIM_INFINITY => "unlimited".into(),
        bytes => bytes.to_string(),
    }
}
