//! QEMU's trace of its NVMe controllers, cut at the marks between loads.

use std::io::{self, BufRead};

/// The trace points that are counted.
pub const EVENTS: [&str; 5] = [
    "pci_nvme_mmio_doorbell_sq",
    "pci_nvme_mmio_doorbell_cq",
    "pci_nvme_irq_msix",
    "pci_nvme_read",
    "pci_nvme_write",
];

/// Sectors of the reads that mark a load's begin and its end: no load has requests of such sizes. Whole
/// pages, because qemu-storage-daemon reads no less.
pub const BEGIN_SECTORS: usize = 3 * 8;
pub const END_SECTORS: usize = 5 * 8;

/// What controllers saw between two marks. Their admin queues are left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    pub requests: u64,
    pub sq_doorbells: u64,
    pub cq_doorbells: u64,
    pub interrupts: u64,
}

/// The loads of a trace, in order.
pub fn windows(log: impl BufRead) -> io::Result<Vec<Window>> {
    let mut windows = Vec::new();
    let mut open: Option<Window> = None;
    for line in log.lines() {
        let line = line?;
        let words: Vec<_> = line.split(' ').collect();
        let number = |name: &str| {
            let at = words.iter().position(|word| *word == name)?;
            words.get(at + 1)?.parse::<usize>().ok()
        };
        let (Some(&event), Some(window)) = (words.first(), open.as_mut()) else {
            open = begins(&line, number("nlb")).then(Window::default);
            continue;
        };
        match event {
            "pci_nvme_read" if number("nlb") == Some(END_SECTORS) => windows.extend(open.take()),
            "pci_nvme_read" | "pci_nvme_write" => window.requests += 1,
            "pci_nvme_mmio_doorbell_sq" if number("sqid") != Some(0) => window.sq_doorbells += 1,
            "pci_nvme_mmio_doorbell_cq" if number("cqid") != Some(0) => window.cq_doorbells += 1,
            "pci_nvme_irq_msix" => window.interrupts += 1,
            _ => {}
        }
    }
    Ok(windows)
}

fn begins(line: &str, sectors: Option<usize>) -> bool {
    line.starts_with("pci_nvme_read ") && sectors == Some(BEGIN_SECTORS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_between_marks_is_counted() {
        let log = "\
            pci_nvme_mmio_doorbell_sq sqid 1 new_tail 1\n\
            pci_nvme_read cid 1 nsid 1 nlb 24 count 12288 lba 0x8\n\
            pci_nvme_irq_msix raising MSI-X IRQ vector 1\n\
            pci_nvme_mmio_doorbell_sq sqid 1 new_tail 3\n\
            pci_nvme_mmio_doorbell_sq sqid 0 new_tail 3\n\
            pci_nvme_read cid 1 nsid 1 nlb 8 count 4096 lba 0x670\n\
            pci_nvme_write cid 2 nsid 1 nlb 8 count 4096 lba 0x678\n\
            pci_nvme_mmio_doorbell_cq cqid 1 new_head 2\n\
            pci_nvme_read cid 1 nsid 1 nlb 40 count 20480 lba 0x10\n\
            pci_nvme_read cid 1 nsid 1 nlb 8 count 4096 lba 0x670\n";
        let window = Window { requests: 2, sq_doorbells: 1, cq_doorbells: 1, interrupts: 1 };
        assert_eq!(windows(log.as_bytes()).unwrap(), [window]);
    }
}
