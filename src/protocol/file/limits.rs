//! The limits and abilities of a file or device.
//!
//! Sizes of transfers are not limited by the queue limits of a block device (`max_sectors_kb`,
//! `max_segments`): the kernel splits for less than a second request costs here, and a request that
//! fits one operation stays on the fast path.

use super::open::{Kind, Opened, no_direct_io};
use super::sys::{self, DirectIo};
use crate::block::{Abilities, Error, NodeOptions, Traits};
use crate::io::{AlignedBuf, Errno};
use std::os::unix::fs::{FileExt, MetadataExt};

/// Alignments that are tried where nobody can be asked, in bytes.
const CANDIDATES: [u32; 4] = [512, 1024, 2048, 4096];
/// The most that an alignment can be ([`Traits::request_align`]).
const MOST: u32 = 2 << 20;
/// The most that is zeroed or discarded by one call: a call holds the file's lock meanwhile, and
/// other requests wait.
const RANGE: u64 = 1 << 30;

/// The traits of an open file. Blocks.
pub fn traits(opened: &Opened, filename: &str, node: &NodeOptions) -> Result<Traits, Error> {
    let request_align = if node.direct { direct_align(opened, filename)? } else { 1 };
    let mut traits = Traits {
        request_align,
        // The kernel's own bound on memory is lower for some devices, but it also wants each
        // segment's length to be whole blocks.
        buffer_align: request_align,
        zero_align: request_align,
        max_zero: RANGE,
        discard_align: request_align,
        max_discard: RANGE,
        optimal_io: power_of_two(opened.metadata.blksize()).unwrap_or(4096),
        ..Traits::default()
    };
    traits.abilities = match opened.kind {
        Kind::Regular => {
            Abilities::ZERO
                | Abilities::ZERO_UNMAP
                | Abilities::DISCARD
                | Abilities::FUA
                | Abilities::GROW
        }
        Kind::BlockDevice => block_device(opened, &mut traits),
        Kind::CharacterDevice => Abilities::empty(),
    };
    if opened.read_only {
        traits.abilities = Abilities::READ_ONLY;
    }
    if !node.discard {
        traits.abilities -= Abilities::DISCARD;
    }
    Ok(traits)
}

fn block_device(opened: &Opened, traits: &mut Traits) -> Abilities {
    let mut abilities = Abilities::ZERO | Abilities::FUA;
    let logical = sys::logical_block_size(&opened.file).ok().and_then(power_of_two).unwrap_or(512);
    let physical = sys::physical_block_size(&opened.file).ok().and_then(power_of_two);
    traits.optimal_io = physical.unwrap_or(logical);
    traits.zero_align = traits.zero_align.max(logical);
    traits.discard_align = traits.discard_align.max(logical);
    let rdev = opened.metadata.rdev();
    if queue_limit(rdev, "write_zeroes_max_bytes").is_some_and(|n| n > 0) {
        abilities |= Abilities::ZERO_UNMAP;
    }
    if queue_limit(rdev, "discard_max_bytes").is_none_or(|n| n > 0) {
        abilities |= Abilities::DISCARD;
        // A granularity counted from elsewhere than the device's start is left to the kernel.
        if device_attribute(rdev, "discard_alignment").is_none_or(|n| n == 0)
            && let Some(granularity) =
                queue_limit(rdev, "discard_granularity").and_then(power_of_two)
        {
            traits.discard_align = traits.discard_align.max(granularity);
        }
    }
    abilities
}

/// A number from the device's request queue in sysfs; a partition has its disk's.
fn queue_limit(rdev: u64, name: &str) -> Option<u64> {
    device_attribute(rdev, &format!("queue/{name}"))
        .or_else(|| device_attribute(rdev, &format!("../queue/{name}")))
}

fn device_attribute(rdev: u64, name: &str) -> Option<u64> {
    let (major, minor) = (libc::major(rdev), libc::minor(rdev));
    let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{name}")).ok()?;
    text.trim().parse().ok()
}

/// The value as an alignment, if it can be one.
fn power_of_two(value: impl TryInto<u32>) -> Option<u32> {
    value.try_into().ok().filter(|v| v.is_power_of_two() && *v <= MOST)
}

/// What direct I/O must be aligned to: what the kernel says, else what the device says, else what
/// works.
fn direct_align(opened: &Opened, filename: &str) -> Result<u32, Error> {
    match sys::direct_io(&opened.file) {
        DirectIo::Unsupported => return Err(no_direct_io(filename)),
        DirectIo::Aligned { memory, offset } => {
            if let Some(align) = power_of_two(memory.max(offset)) {
                return Ok(align);
            }
        }
        DirectIo::Unknown => {}
    }
    if opened.kind == Kind::BlockDevice
        && let Some(align) = sys::logical_block_size(&opened.file).ok().and_then(power_of_two)
    {
        return Ok(align);
    }
    probe(opened).ok_or_else(|| {
        Error::new(format!(
            "Could not find working O_DIRECT alignment for '{filename}', try cache.direct=off"
        ))
    })
}

/// The least alignment at which a read works.
fn probe(opened: &Opened) -> Option<u32> {
    if opened.len == 0 {
        // A read at the end of a file succeeds at any alignment and so tells nothing.
        return Some(4096);
    }
    let mut memory = AlignedBuf::new(2 * 4096, 2 * 4096)?;
    CANDIDATES.into_iter().find(|&align| {
        // Memory that is aligned to this and nothing more.
        let align = align as usize;
        let result = opened.file.read_at(&mut memory[align..2 * align], 0);
        !matches!(result.map_err(Errno::from), Err(Errno::EINVAL))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alignment_is_a_power_of_two_of_at_most_2_mib() {
        assert_eq!(power_of_two(512u32), Some(512));
        assert_eq!(power_of_two(0u32), None);
        assert_eq!(power_of_two(520u32), None);
        assert_eq!(power_of_two(2u64 << 20), Some(2 << 20));
        assert_eq!(power_of_two(4u64 << 20), None);
        assert_eq!(power_of_two(1u64 << 40), None);
    }
}
