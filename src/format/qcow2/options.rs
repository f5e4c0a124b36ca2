//! What can be asked for when an image is opened.
//!
//! The rule held here: options that contradict each other are refused in QEMU's words, before
//! anything of them takes effect.

use super::layout::Geometry;
use crate::block::{Error, OptionHelp};
use crate::options::NodeRef;
use crate::options::node_ref::NodeRefOrNull;
use serde::Deserialize;

pub static HELP: &[OptionHelp] = &[
    help("file", "node", "The node that holds the image"),
    help("backing", "node", "The node to read where the image has no data; null for none"),
    help("data-file", "node", "The node that holds the guest's data, if the image keeps it apart"),
    help("cache-size", "int", "Bytes for both caches together"),
    help("l2-cache-size", "int", "Bytes for L2 tables"),
    help("l2-cache-entry-size", "int", "Bytes of L2 tables that are read at once"),
    help("refcount-cache-size", "int", "Bytes for refcount blocks"),
    help("lazy-refcounts", "on|off", "Refcounts may be wrong after a crash, and are repaired then"),
    help("pass-discard-request", "on|off", "The storage is told of what guests discard"),
    help("pass-discard-snapshot", "on|off", "The storage is told of what deleted snapshots free"),
];

const fn help(name: &'static str, value: &'static str, help: &'static str) -> OptionHelp {
    OptionHelp { name, value, help }
}

/// Bytes of L2 tables that are kept if nothing else is said and the disk is large.
const DEFAULT_L2_CACHE: u64 = 32 << 20;
/// Bytes of an L2 table that are read at once.
const DEFAULT_SLICE: u64 = 4096;
/// Refcount blocks that are kept at least.
const MIN_REFCOUNT_CACHE: u64 = 4;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Options {
    pub file: NodeRef,
    pub backing: Option<NodeRefOrNull>,
    pub data_file: Option<NodeRef>,
    cache_size: Option<u64>,
    l2_cache_size: Option<u64>,
    l2_cache_entry_size: Option<u64>,
    refcount_cache_size: Option<u64>,
    pub lazy_refcounts: Option<bool>,
    pub pass_discard_request: Option<bool>,
    pub pass_discard_snapshot: Option<bool>,
}

/// How much of the tables is kept in memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheSizes {
    pub l2: u64,
    /// Of what is read at once; a power of two, at most a cluster.
    pub l2_slice: u64,
    pub refcounts: u64,
}

impl Options {
    /// For a disk of `size` bytes, which may become longer while it is open or not.
    pub fn caches(
        &self,
        geometry: &Geometry,
        size: u64,
        may_grow: bool,
    ) -> Result<CacheSizes, Error> {
        let cluster = geometry.cluster_size();
        let refused = |text: &str| Err(Error::new(text));
        // All L2 tables that the disk can have.
        let all = geometry.clusters(size) * geometry.l2_entry_size();
        let all = all.next_multiple_of(cluster);
        let min_refcounts = MIN_REFCOUNT_CACHE * cluster;
        let (l2, refcounts) = match (self.cache_size, self.l2_cache_size, self.refcount_cache_size)
        {
            (Some(_), Some(_), Some(_)) => {
                return refused(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same \
                     time",
                );
            }
            (Some(both), Some(l2), None) if l2 > both => {
                return refused("l2-cache-size may not exceed cache-size");
            }
            (Some(both), None, Some(refcounts)) if refcounts > both => {
                return refused("refcount-cache-size may not exceed cache-size");
            }
            (Some(both), Some(l2), None) => (l2, both - l2),
            (Some(both), None, Some(refcounts)) => (both - refcounts, refcounts),
            (Some(both), None, None) if both >= all + min_refcounts => (all, both - all),
            (Some(both), None, None) => {
                let refcounts = both.min(min_refcounts);
                (both - refcounts, refcounts)
            }
            (None, l2, refcounts) => {
                (l2.unwrap_or(DEFAULT_L2_CACHE), refcounts.unwrap_or(min_refcounts))
            }
        };
        let slice = self.l2_cache_entry_size.unwrap_or(DEFAULT_SLICE.min(cluster));
        if !slice.is_power_of_two() || !(512..=cluster).contains(&slice) {
            return Err(Error::new(format!(
                "L2 cache entry size must be a power of two between 512 and the cluster size \
                 ({cluster})"
            )));
        }
        if l2 > i32::MAX as u64 * slice || refcounts > i32::MAX as u64 * cluster {
            return refused("Cache size too big");
        }
        // Slices take memory when they are read.
        let useful = if may_grow { all.max(DEFAULT_L2_CACHE) } else { all };
        let sizes = CacheSizes {
            l2: l2.min(useful).max(2 * slice),
            l2_slice: slice,
            refcounts: refcounts.max(min_refcounts),
        };
        Ok(sizes)
    }
}
