//! The length of a new image's file, for an empty disk or for the contents of another image.
//!
//! What is told is what QEMU tells, and never too little: as many tables as an image with all of the disk
//! allocated has, and every cluster that has data in the source. What is compressed is counted in full.

use super::bitmaps;
use super::create;
use super::layout::{self, Geometry};
use crate::block::{Error, Measurement, Node, Preallocation, Precision, Status, extents};
use crate::options::Map;
use std::sync::Arc;

pub(super) async fn measure(
    options: Map,
    size: u64,
    source: Option<&Arc<Node>>,
) -> Result<Measurement, Error> {
    let wanted = Wanted::take(&options)?;
    let geometry = wanted.geometry;
    let size = source.map_or(size, |source| source.len());
    let too_large = || Error::new("The image size is too large (try using a larger cluster size)");
    let metadata = metadata_clusters(&geometry, size).ok_or_else(too_large)?;
    let clusters = geometry.clusters(size);
    let is_full = matches!(wanted.preallocation, Preallocation::Falloc | Preallocation::Full);
    let data = match source {
        _ if is_full => clusters,
        // How much of it the backing file will have is not known.
        Some(_) if wanted.has_backing => clusters,
        Some(source) => clusters_with_data(&geometry, source).await?,
        None => 0,
    };
    let bytes = |clusters: u64| clusters << geometry.cluster_bits;
    Ok(Measurement {
        required: bytes(metadata + data),
        fully_allocated: bytes(metadata + clusters),
        bitmaps: source
            .filter(|_| geometry.zero_flag)
            .and_then(|source| bitmaps::measure(&geometry, source)),
    })
}

/// What of the options decides the length.
struct Wanted {
    geometry: Geometry,
    preallocation: Preallocation,
    has_backing: bool,
}

impl Wanted {
    /// Reads the options, and checks them in QEMU's order.
    fn take(options: &Map) -> Result<Wanted, Error> {
        create::refuse_encryption(options)?;
        let text = |name: &str| options.get(name).and_then(|value| value.as_str());
        let cluster_bits = create::cluster_bits(options)?;
        let version = match text("compat") {
            Some("0.10") => 2,
            None | Some("1.1") => 3,
            Some(other) => {
                return Err(Error::new(format!("Invalid compatibility level: '{other}'")));
            }
        };
        let extended_l2 = create::is_on(options, "extended_l2");
        if extended_l2 {
            create::check_extended(cluster_bits)?;
        }
        let refcount_order = create::refcount_order(options)?;
        if version < 3 && refcount_order != layout::DEFAULT_REFCOUNT_ORDER {
            return Err(Error::new(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use compat=1.1 or greater)",
            ));
        }
        let preallocation = match text("preallocation") {
            None => Preallocation::Off,
            Some(name) => Preallocation::parse(name)
                .ok_or_else(|| Error::new(format!("invalid parameter value: {name}")))?,
        };
        let geometry = Geometry {
            cluster_bits,
            refcount_order,
            extended_l2,
            zero_flag: version >= 3,
            external_data: false,
        };
        Ok(Wanted { geometry, preallocation, has_backing: options.contains("backing_file") })
    }
}

/// The clusters of the tables and the header of an image with all of a disk allocated.
///
/// None if the L1 table would be longer than is allowed.
fn metadata_clusters(geometry: &Geometry, size: u64) -> Option<u64> {
    let l2_tables = geometry.l1_entries_for(size);
    if l2_tables * 8 > layout::MAX_L1_BYTES {
        return None;
    }
    let header = 1;
    let mapping = header + geometry.clusters(l2_tables * 8) + l2_tables;
    // Refcount blocks count themselves, too, and the table that names them.
    let (mut blocks, mut table) = (0, 0);
    loop {
        let counted = mapping + geometry.clusters(size) + blocks + table;
        let needed = counted.div_ceil(geometry.refcount_block_entries());
        if needed == blocks {
            return Some(mapping + blocks + table);
        }
        blocks = needed;
        table = geometry.clusters(blocks * 8);
    }
}

/// How many clusters of a new image have something of the source's contents. A cluster with some data is
/// a whole one.
async fn clusters_with_data(geometry: &Geometry, source: &Arc<Node>) -> Result<u64, Error> {
    let (mut at, mut clusters) = (0, 0);
    while at < source.len() {
        let run = extents::query(source, at, source.len() - at, Precision::Zeroes, None).await;
        let run = run.map_err(|errno| Error::os("Unable to get block status", errno))?;
        let mut end = at + run.len;
        if !run.has(Status::ZERO) {
            end = end.next_multiple_of(geometry.cluster_size());
            clusters += geometry.clusters(end - at);
        }
        at = end;
    }
    Ok(clusters)
}
