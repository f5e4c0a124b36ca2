//! Numbers and layouts of virtio 1.2 (sections 2.7 and 5.2) and of vhost-user, as the tests need them.

/// Bytes in a sector: the unit of `sector` fields and of the capacity, whatever the block size.
pub const SECTOR: u64 = 512;

/// Feature bits (virtio 5.2.3 and 6, vhost-user's own bit 30), as masks.
pub mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// `VHOST_F_LOG_ALL`: dirty logging for live migration.
    pub const LOG_ALL: u64 = 1 << 26;
    pub const RING_INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VHOST_USER_F_PROTOCOL_FEATURES`.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    pub const RING_PACKED: u64 = 1 << 34;

    /// What QEMU's vhost-user-blk device acknowledges when all of it is offered.
    pub const QEMU: u64 = SEG_MAX
        | RO
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | CONFIG_WCE
        | MQ
        | DISCARD
        | WRITE_ZEROES
        | RING_INDIRECT
        | EVENT_IDX
        | PROTOCOL_FEATURES
        | VERSION_1;
}

/// vhost-user protocol feature bits, as masks.
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const BACKEND_SEND_FD: u64 = 1 << 10;
    pub const HOST_NOTIFIER: u64 = 1 << 11;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;

    /// What the testkit negotiates unless told otherwise.
    pub const DEFAULT: u64 = MQ | REPLY_ACK | CONFIG | CONFIGURE_MEM_SLOTS;
}

/// Request types (virtio 5.2.6).
pub mod request_type {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Status bytes (virtio 5.2.6).
pub mod status {
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
    /// Not a status: what the testkit puts there before the request, so that "not written" shows.
    pub const UNTOUCHED: u8 = 0xee;
}

/// Flag of a WRITE_ZEROES segment: the range may be deallocated.
pub const WRITE_ZEROES_UNMAP: u32 = 1;

/// Descriptor flags (virtio 2.7.5).
pub mod desc_flag {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const INDIRECT: u16 = 4;
}

/// Bytes of one descriptor.
pub const DESC_SIZE: u64 = 16;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, in the available ring's flags.
pub const AVAIL_NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`, in the used ring's flags.
pub const USED_NO_NOTIFY: u16 = 1;
/// Bytes of the request header: type, reserved, sector.
pub const HEADER_SIZE: usize = 16;
/// Bytes GET_ID returns.
pub const ID_SIZE: usize = 20;
/// Bytes of `struct virtio_blk_config` that QEMU reads: up to and with `write_zeroes_may_unmap`.
pub const CONFIG_SIZE: usize = 60;
/// Offset of `writeback` in the configuration: the one field a driver may write.
pub const CONFIG_WCE_OFFSET: u32 = 32;

/// Whether the other side asked, by `event`, to be notified of the step from `old` to `new` (virtio 2.7.10)?
pub fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The configuration space (virtio 5.2.4), decoded. Sectors are 512 bytes throughout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlkConfig {
    pub capacity_sectors: u64,
    pub size_max: u32,
    pub seg_max: u32,
    pub blk_size: u32,
    pub physical_block_exp: u8,
    pub alignment_offset: u8,
    pub min_io_size: u16,
    pub opt_io_size: u32,
    pub wce: u8,
    pub num_queues: u16,
    pub max_discard_sectors: u32,
    pub max_discard_seg: u32,
    pub discard_sector_alignment: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_write_zeroes_seg: u32,
    pub write_zeroes_may_unmap: u8,
}

impl BlkConfig {
    /// Decodes the first [`CONFIG_SIZE`] bytes of a configuration space.
    pub fn parse(raw: &[u8; CONFIG_SIZE]) -> BlkConfig {
        let u16_at = |o: usize| u16::from_le_bytes([raw[o], raw[o + 1]]);
        let u32_at = |o: usize| u32::from(u16_at(o)) | u32::from(u16_at(o + 2)) << 16;
        BlkConfig {
            capacity_sectors: u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32,
            size_max: u32_at(8),
            seg_max: u32_at(12),
            // Cylinders, heads and sectors stand at 16..20.
            blk_size: u32_at(20),
            physical_block_exp: raw[24],
            alignment_offset: raw[25],
            min_io_size: u16_at(26),
            opt_io_size: u32_at(28),
            wce: raw[32],
            num_queues: u16_at(34),
            max_discard_sectors: u32_at(36),
            max_discard_seg: u32_at(40),
            discard_sector_alignment: u32_at(44),
            max_write_zeroes_sectors: u32_at(48),
            max_write_zeroes_seg: u32_at(52),
            write_zeroes_may_unmap: raw[56],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_due_exactly_when_the_index_passes_it() {
        assert!(need_event(0, 1, 0));
        assert!(!need_event(1, 1, 0));
        assert!(need_event(65535, 2, 65534), "the index wraps");
        assert!(!need_event(2, 2, 65534));
    }

    #[test]
    fn the_configuration_space_is_decoded_at_the_offsets_of_the_specification() {
        let mut raw = [0u8; CONFIG_SIZE];
        raw[0..8].copy_from_slice(&0x0102_0304_0506u64.to_le_bytes());
        raw[12..16].copy_from_slice(&126u32.to_le_bytes());
        raw[20..24].copy_from_slice(&4096u32.to_le_bytes());
        raw[32] = 1;
        raw[34..36].copy_from_slice(&7u16.to_le_bytes());
        raw[36..40].copy_from_slice(&32768u32.to_le_bytes());
        raw[56] = 1;
        let config = BlkConfig::parse(&raw);
        assert_eq!(config.capacity_sectors, 0x0102_0304_0506);
        assert_eq!((config.seg_max, config.blk_size), (126, 4096));
        assert_eq!((config.wce, config.num_queues), (1, 7));
        assert_eq!(config.max_discard_sectors, 32768);
        assert_eq!(config.write_zeroes_may_unmap, 1);
    }
}
