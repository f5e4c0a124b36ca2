//! The interface between the driver and a PCI function.

#![forbid(unsafe_code)]

use crate::Error;
use crate::dma::HostRange;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// A device's registers: the memory behind one of its base addresses.
///
/// Accesses are of 32 bits at multiples of four, and happen in the order in which they are made: what
/// was written to memory before a register is written is visible to the device when it sees the write.
pub trait Registers: Send + Sync {
    /// Bytes.
    fn len(&self) -> usize;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The register at `offset`. All ones where there is none, as on the bus.
    fn read(&self, offset: usize) -> u32;

    /// Writes the register at `offset`; nothing happens where there is none.
    fn write(&self, offset: usize, value: u32);

    /// Two registers as one, the lower half read first (section 3.1.1 allows halves).
    fn read64(&self, offset: usize) -> u64 {
        let low = self.read(offset);
        u64::from(low) | u64::from(self.read(offset + 4)) << 32
    }

    fn write64(&self, offset: usize, value: u64) {
        self.write(offset, value as u32);
        self.write(offset + 4, (value >> 32) as u32);
    }
}

/// One function of a PCI device, for this process alone.
///
/// DMA addresses are the caller's to choose, inside [`PciFunction::iova_ranges`]. Memory is mapped for
/// reading and writing.
pub trait PciFunction: Send + Sync {
    /// How it is named in messages: its PCI address.
    fn name(&self) -> String;

    /// The registers behind base address `index`, mapped once.
    fn registers(&self, index: u32) -> Result<Arc<dyn Registers>, Error>;

    /// Where the IOMMU takes addresses, reserved ranges left out: in order, not overlapping, bytes.
    fn iova_ranges(&self) -> Result<Vec<Range<u64>>, Error>;

    /// How many more mappings there may be, if that is known.
    fn mappings_left(&self) -> Option<u32> {
        None
    }

    /// Lets the device reach `memory` from address `iova` on. Both and the length are multiples of the
    /// page size. Blocks as long as it takes to pin the memory.
    fn map(&self, iova: u64, memory: HostRange) -> Result<(), Error>;

    /// Takes back exactly what one `map` gave. When it returns the device reaches it no more.
    fn unmap(&self, iova: u64, len: usize) -> Result<(), Error>;

    /// How many MSI-X vectors there are.
    fn vectors(&self) -> u32;

    /// Switches MSI-X on, with an eventfd for each vector from the first on. All at once, once, and before the
    /// controller is enabled: a controller may keep forever the state that it finds then.
    fn set_vectors(&self, events: &[&EventFd]) -> Result<(), Error>;

    /// Lets the device start transfers, or not.
    fn set_bus_master(&self, on: bool) -> Result<(), Error>;

    /// Resets the function: afterwards it does nothing and has no state, interrupts included.
    ///
    /// # Errors
    /// When it cannot be done, or it is not known that it was.
    fn reset(&self) -> Result<(), Error>;

    /// An eventfd that signals a request for the device (hot unplug), if there is one.
    fn request_event(&self) -> Option<&EventFd> {
        None
    }
}

/// Where a function is on PCI: `0000:01:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    pub domain: u32,
    pub bus: u8,
    /// Below 32.
    pub device: u8,
    /// Below 8.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PciAddress { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

impl FromStr for PciAddress {
    type Err = Error;

    /// Reads `DOMAIN:BUS:DEVICE.FUNCTION` in hexadecimal digits; the domain may be left out.
    fn from_str(text: &str) -> Result<PciAddress, Error> {
        let number = |text: &str, most: u32, digits: usize| {
            let fits = (1..=digits).contains(&text.len());
            let all_hex = text.bytes().all(|b| b.is_ascii_hexdigit());
            let number = u32::from_str_radix(text, 16).ok()?;
            (fits && all_hex && number <= most).then_some(number)
        };
        let parse = || {
            let (place, function) = text.rsplit_once('.')?;
            let (place, device) = place.rsplit_once(':')?;
            let (domain, bus) = place.rsplit_once(':').unwrap_or(("0", place));
            Some(PciAddress {
                domain: number(domain, u32::MAX, 8)?,
                bus: number(bus, 0xff, 2)? as u8,
                device: number(device, 0x1f, 2)? as u8,
                function: number(function, 7, 1)? as u8,
            })
        };
        parse().ok_or_else(|| {
            Error::new(format!("'{}' is not a PCI address like 0000:01:00.0", text.escape_debug()))
                .with_errno(libc::EINVAL)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written_and_nothing_else_is() {
        for (text, written) in [
            ("0000:01:00.0", "0000:01:00.0"),
            ("10000:e1:1f.7", "10000:e1:1f.7"),
            ("3:0.0", "0000:03:00.0"),
        ] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), written);
        }
        for text in ["", "0000:01:00", "01:20.0", "01:00.8", "0:001:00.0", "+1:00.0", "1::0.0"] {
            let error = text.parse::<PciAddress>().unwrap_err().to_string();
            assert!(error.contains("PCI address"), "{text}: {error}");
        }
    }
}
