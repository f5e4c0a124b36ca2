//! Data structures of Identify (section 5.17).

use super::{le, text};

/// Bytes of every Identify data structure.
pub const LEN: usize = 4096;

/// Controller or Namespace Structure values (5.17.1).
pub mod cns {
    pub const NAMESPACE: u32 = 0x00;
    pub const CONTROLLER: u32 = 0x01;
    pub const ACTIVE_NAMESPACES: u32 = 0x02;
    pub const NAMESPACE_DESCRIPTORS: u32 = 0x03;
    /// Of a command set: the NVM one's limits.
    pub const CONTROLLER_OF_SET: u32 = 0x06;
}

/// Command set identifiers (Namespace Identification Descriptor, 5.17.2.3).
pub mod csi {
    pub const NVM: u8 = 0;
    pub const KEY_VALUE: u8 = 1;
    pub const ZONED: u8 = 2;
}

/// Identify Controller (5.17.2.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerIdentity {
    pub vendor: u16,
    pub serial: String,
    pub model: String,
    pub firmware: String,
    /// Maximum Data Transfer Size, as a power of two of the smallest page; zero for no limit.
    pub mdts: u8,
    /// 0xMMmmtt: major, minor, tertiary.
    pub version: u32,
    /// Optional Asynchronous Events Supported.
    pub async_events: u32,
    /// Abort commands at a time.
    pub aborts: u32,
    /// Entries that the error log keeps.
    pub error_entries: u32,
    /// The largest namespace identifier.
    pub namespaces: u32,
    pub has_compare: bool,
    pub has_dataset_management: bool,
    pub has_write_zeroes: bool,
    /// There is a volatile write cache, so that flushes mean something.
    pub has_write_cache: bool,
    /// Scatter gather lists may be used in I/O commands; addresses and lengths of data blocks are
    /// multiples of this (SGLS bits 1:0).
    pub sgl_align: Option<u8>,
}

impl ControllerIdentity {
    pub fn parse(data: &[u8]) -> ControllerIdentity {
        let optional = le(data, 520, 2);
        ControllerIdentity {
            vendor: le(data, 0, 2) as u16,
            serial: text(data, 4, 20),
            model: text(data, 24, 40),
            firmware: text(data, 64, 8),
            mdts: le(data, 77, 1) as u8,
            version: le(data, 80, 4) as u32,
            async_events: le(data, 92, 4) as u32,
            aborts: le(data, 258, 1) as u32 + 1,
            error_entries: le(data, 262, 1) as u32 + 1,
            namespaces: le(data, 516, 4) as u32,
            has_compare: optional & 1 != 0,
            has_dataset_management: optional & 1 << 2 != 0,
            has_write_zeroes: optional & 1 << 3 != 0,
            has_write_cache: le(data, 525, 1) & 1 != 0,
            sgl_align: match le(data, 536, 4) & 3 {
                1 => Some(1),
                2 => Some(4),
                _ => None,
            },
        }
    }

    /// Whether changes of namespaces are reported (OAES bit 8).
    pub fn reports_namespaces(&self) -> bool {
        self.async_events & 1 << 8 != 0
    }
}

/// Identify Controller of the NVM command set (NVM, 4.1.5.4): limits of single commands. Zero for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommandLimits {
    /// Write Zeroes Size Limit, as a power of two of the smallest page.
    pub write_zeroes: u8,
    /// Dataset Management Ranges Limit.
    pub ranges: u8,
    /// Dataset Management Range Size Limit, in blocks.
    pub range_blocks: u32,
    /// Dataset Management Size Limit, in blocks of all ranges.
    pub all_blocks: u64,
}

impl CommandLimits {
    pub fn parse(data: &[u8]) -> CommandLimits {
        CommandLimits {
            write_zeroes: le(data, 1, 1) as u8,
            ranges: le(data, 3, 1) as u8,
            range_blocks: le(data, 4, 4) as u32,
            all_blocks: le(data, 8, 8),
        }
    }
}

/// Identify Namespace (NVM, 4.1.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceIdentity {
    /// Blocks; zero for a namespace that is not there.
    pub blocks: u64,
    /// Bytes of a block, as a power of two.
    pub block_shift: u32,
    /// Bytes of metadata with each block.
    pub metadata: u16,
    /// Bits 2:0 of DLFEAT: 1 if deallocated blocks read as zeroes.
    pub deallocated_reads: u8,
    /// Write Zeroes may deallocate (DLFEAT bit 3).
    pub zeroes_deallocate: bool,
    /// Namespace Preferred Write Granularity and Deallocate Granularity, in blocks, if told.
    pub write_granularity: Option<u32>,
    pub deallocate_granularity: Option<u32>,
    /// Reads and writes are better this long, in blocks (NOIOB); zero for nothing.
    pub boundary: u16,
    /// The namespace is write protected (NSATTR bit 0).
    pub is_protected: bool,
}

impl NamespaceIdentity {
    pub fn parse(data: &[u8]) -> NamespaceIdentity {
        // FLBAS: the lower four bits of the format's number, and bits 6:5 above them.
        let format = le(data, 26, 1) as usize;
        let format = format & 0xf | (format >> 5 & 3) << 4;
        let at = 128 + 4 * format;
        let features = le(data, 24, 1);
        let granularity = |at| Some(le(data, at, 2) as u32 + 1).filter(|_| features & 1 << 4 != 0);
        NamespaceIdentity {
            blocks: le(data, 0, 8),
            block_shift: le(data, at + 2, 1) as u32,
            metadata: le(data, at, 2) as u16,
            deallocated_reads: le(data, 33, 1) as u8 & 7,
            zeroes_deallocate: le(data, 33, 1) & 1 << 3 != 0,
            write_granularity: granularity(64),
            deallocate_granularity: granularity(68),
            boundary: le(data, 46, 2) as u16,
            is_protected: le(data, 99, 1) & 1 != 0,
        }
    }
}

/// The command set of a namespace, from its identification descriptors (5.17.2.3). The NVM one where
/// nothing is said.
pub fn command_set(data: &[u8]) -> u8 {
    let mut at = 0;
    while let Some(&[kind, len]) = data.get(at..at + 2) {
        match (kind, len) {
            (0, _) | (_, 0) => break,
            (4, _) => return le(data, at + 4, 1) as u8,
            (_, len) => at += 4 + usize::from(len),
        }
    }
    csi::NVM
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_set_is_found_behind_other_descriptors_and_never_past_the_end() {
        let mut data = vec![0; LEN];
        assert_eq!(command_set(&data), csi::NVM);
        data[..2].copy_from_slice(&[3, 16]);
        data[20..25].copy_from_slice(&[4, 1, 0, 0, 2]);
        assert_eq!(command_set(&data), csi::ZONED);
        data.fill(0xff);
        assert_eq!(command_set(&data), csi::NVM);
    }

    #[test]
    fn random_bytes_are_read_without_a_panic() {
        let mut seed = 1u64;
        for _ in 0..1000 {
            let mut data = [0; LEN];
            for byte in &mut data {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                *byte = (seed >> 56) as u8;
            }
            ControllerIdentity::parse(&data);
            NamespaceIdentity::parse(&data);
            CommandLimits::parse(&data);
            command_set(&data);
        }
    }
}
