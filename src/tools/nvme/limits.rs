//! The bounds within which a process can use a controller.

use super::Machine;
use super::machine::{number, text};
use std::path::Path;

/// Bytes that this process may lock in memory: a guest's memory that is mapped for a controller counts.
/// `None`: as many as there are.
pub fn locked_memory() -> Option<u64> {
    let limits = text(Path::new("/proc/self/limits"))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The largest number of DMA mappings of a container, if the module that counts them is loaded.
pub fn dma_entries(machine: &Machine) -> Option<u64> {
    number(&machine.path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit"))
}

/// Ranges of bus addresses that a group cannot map: first, last and kind.
pub fn reserved_regions(machine: &Machine, group: u32) -> Vec<(u64, u64, String)> {
    let path = machine.path("/sys/kernel/iommu_groups").join(group.to_string());
    let table = text(&path.join("reserved_regions")).unwrap_or_default();
    let regions = table.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let mut address = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
        Some((address()?, address()?, words.next()?.to_owned()))
    });
    regions.collect()
}
