//! Feature bits and the configuration space, computed from the node.
//!
//! (virtio 1.2, sections 5.2.3 and 5.2.4.)

use crate::block::{Abilities, Node};
use crate::export::core::{Disk, DiskOptions};
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// VHOST_F_LOG_ALL: what the device writes is marked in the dirty log. Of the transport: the front
/// end switches it on and off while the guest runs.
pub const F_LOG_ALL: u32 = 26;

/// Segments of data in one request. With header and status this fills the 128 entries that front
/// ends give a queue.
pub const SEG_MAX: u32 = 126;

/// Sectors of 512 bytes that one discard or write-zeroes request may name.
pub const MAX_DISCARD_SECTORS: u32 = 32768;

/// Where the write-cache byte is in the configuration space.
pub const WCE_OFFSET: usize = 32;

/// The configuration space as far as it is defined; longer reads find zeroes.
pub const CONFIG_SIZE: usize = 256;

/// The virtio features to offer, the transport's own included.
pub fn features(node: &Node, options: &DiskOptions) -> u64 {
    let bits = [
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_MQ,
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
    ];
    let mut features =
        bits.iter().fold(F_PROTOCOL_FEATURES | 1 << F_LOG_ALL, |all, bit| all | 1 << bit);
    if options.writable {
        features |= 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        if !options.write_through {
            features |= 1 << VIRTIO_BLK_F_CONFIG_WCE;
        }
        // Not offered where it would do nothing.
        if node.traits().abilities.contains(Abilities::DISCARD) {
            features |= 1 << VIRTIO_BLK_F_DISCARD;
        }
    } else {
        features |= 1 << VIRTIO_BLK_F_RO;
    }
    features
}

/// The configuration space for a disk as it is now.
pub fn space(disk: &Disk, num_queues: u16, write_cache: bool) -> [u8; CONFIG_SIZE] {
    let (node, options) = (disk.node(), &disk.options);
    let traits = node.traits();
    let block = disk.block_size;
    let physical = traits.request_align.max(block);
    let in_blocks = |bytes: u32| bytes / block;
    let mut space = [0; CONFIG_SIZE];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    // A last, incomplete block cannot be addressed.
    let capacity = node.len() / block as u64 * block as u64 / 512;
    put(0, &capacity.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &block.to_le_bytes());
    put(24, &[(physical / block).ilog2() as u8]);
    put(26, &(in_blocks(physical) as u16).to_le_bytes());
    put(28, &in_blocks(traits.optimal_io).to_le_bytes());
    put(WCE_OFFSET, &[u8::from(write_cache)]);
    put(34, &num_queues.to_le_bytes());
    if options.writable {
        let align = traits.discard_align.max(block) / 512;
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &align.to_le_bytes());
        put(48, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[u8::from(traits.abilities.contains(Abilities::ZERO_UNMAP))]);
    }
    space
}
