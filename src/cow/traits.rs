//! What requests may look like, for a disk that lies in the clusters of a file.

use crate::block::{Abilities, Traits};

/// The traits of a disk whose data is in a node with these, in clusters of `cluster` bytes; `unit`: the best size
/// of requests, in bytes. A request that is aligned for the file is aligned for the disk where clusters hold whole
/// blocks of the file.
pub fn traits_over(data: Traits, cluster: u64, unit: u64, abilities: Abilities) -> Traits {
    let fits = u64::from(data.request_align) <= cluster;
    let (request_align, buffer_align) =
        if fits { (data.request_align, data.buffer_align) } else { (1, 1) };
    Traits {
        request_align,
        buffer_align,
        max_transfer: data.max_transfer,
        max_segments: data.max_segments,
        zero_align: request_align,
        max_zero: Traits::MAX_TRANSFER as u64,
        discard_align: request_align,
        max_discard: Traits::MAX_TRANSFER as u64,
        optimal_io: unit as u32,
        abilities,
    }
}
