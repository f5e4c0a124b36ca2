//! The options for opening an image.
//!
//! The rule held here: options that contradict each other are refused in QEMU's words, before
//! anything of them takes effect.

use super::layout::Geometry;
use super::overlap::Kinds;
use crate::block::{Error, OptionHelp};
use crate::options::node_ref::NodeRefOrNull;
use crate::options::{self, Map, NodeRef, Value};
use serde::Deserialize;
use std::time::Duration;

pub static HELP: &[OptionHelp] = &[
    help("file", "node", "The node that holds the image"),
    help("backing", "node", "The node to read where the image has no data; null for none"),
    help("data-file", "node", "The node that holds the guest's data, if the image keeps it apart"),
    help("cache-size", "int", "Bytes for both caches together"),
    help("l2-cache-size", "int", "Bytes for L2 tables"),
    help("l2-cache-entry-size", "int", "Bytes of L2 tables that are read at once"),
    help("refcount-cache-size", "int", "Bytes for refcount blocks"),
    help("lazy-refcounts", "on|off", "Refcounts may be wrong after a crash, and are repaired then"),
    help("overlap-check", "str", "What is not written over: none, constant, cached (default), all"),
    help("overlap-check.template", "str", "The same, if kinds of metadata are given by themselves"),
    help("overlap-check.main-header", "on|off", "Nothing is written over the header"),
    help("overlap-check.active-l1", "on|off", "Nothing is written over the disk's L1 table"),
    help("overlap-check.active-l2", "on|off", "Nothing is written over the disk's L2 tables"),
    help("overlap-check.refcount-table", "on|off", "Nothing is written over the refcount table"),
    help("overlap-check.refcount-block", "on|off", "Nothing is written over refcount blocks"),
    help("overlap-check.snapshot-table", "on|off", "Nothing is written over the snapshot table"),
    help("overlap-check.inactive-l1", "on|off", "Nothing is written over snapshots' L1 tables"),
    help("overlap-check.inactive-l2", "on|off", "Nothing is written over snapshots' L2 tables"),
    help(
        "overlap-check.bitmap-directory",
        "on|off",
        "Nothing is written over the bitmap directory",
    ),
    help("pass-discard-request", "on|off", "Pass guests' discards to the storage"),
    help("pass-discard-other", "on|off", "Discard other freed clusters in the storage"),
    help("discard-no-unref", "on|off", "What guests discard keeps its place in the image"),
    help(
        "cache-clean-interval",
        "int",
        "Seconds after which unused caches are given back (600); 0: never",
    ),
    help("pass-discard-snapshot", "on|off", "Discard clusters that deleted snapshots free"),
];

const fn help(name: &'static str, value: &'static str, help: &'static str) -> OptionHelp {
    OptionHelp { name, value, help }
}

/// Bytes of L2 tables that are kept if nothing else is said and the disk is large.
const DEFAULT_L2_CACHE: u64 = 32 << 20;
/// Bytes of an L2 table that are read at once.
const DEFAULT_SLICE: u64 = 4096;
/// Seconds.
const CLEAN_INTERVAL: i64 = 600;
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
    pub pass_discard_other: Option<bool>,
    pub discard_no_unref: Option<bool>,
    /// Seconds.
    cache_clean_interval: Option<i64>,
    overlap_check: Option<Value>,
}

/// What the kinds that are not given are.
#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Template {
    None,
    Constant,
    #[default]
    Cached,
    All,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct OverlapTemplate {
    overlap_check: Template,
}

/// `Qcow2OverlapCheckFlags` of QEMU's schema.
#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct OverlapFlags {
    template: Option<Template>,
    main_header: Option<bool>,
    active_l1: Option<bool>,
    active_l2: Option<bool>,
    refcount_table: Option<bool>,
    refcount_block: Option<bool>,
    snapshot_table: Option<bool>,
    inactive_l1: Option<bool>,
    inactive_l2: Option<bool>,
    bitmap_directory: Option<bool>,
}

impl OverlapFlags {
    fn kinds(&self) -> Kinds {
        let mut kinds = match self.template.unwrap_or_default() {
            Template::None => Kinds::empty(),
            Template::Constant => Kinds::CONSTANT,
            Template::Cached => Kinds::CACHED,
            Template::All => Kinds::all(),
        };
        for (kind, given) in [
            (Kinds::MAIN_HEADER, self.main_header),
            (Kinds::ACTIVE_L1, self.active_l1),
            (Kinds::ACTIVE_L2, self.active_l2),
            (Kinds::REFCOUNT_TABLE, self.refcount_table),
            (Kinds::REFCOUNT_BLOCK, self.refcount_block),
            (Kinds::SNAPSHOT_TABLE, self.snapshot_table),
            (Kinds::INACTIVE_L1, self.inactive_l1),
            (Kinds::INACTIVE_L2, self.inactive_l2),
            (Kinds::BITMAP_DIRECTORY, self.bitmap_directory),
        ] {
            kinds.set(kind, given.unwrap_or(kinds.contains(kind)));
        }
        kinds
    }
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
    /// What must not be written over.
    pub fn overlap_check(&self) -> Result<Kinds, options::Error> {
        const KEY: &str = "overlap-check";
        let flags = match &self.overlap_check {
            None => OverlapFlags::default(),
            Some(Value::Map(map)) => {
                options::from_map(map.clone()).map_err(|error| error.under(KEY))?
            }
            Some(value) => {
                let map = Map::from_iter([(KEY, value.clone())]);
                let OverlapTemplate { overlap_check } = options::from_map(map)?;
                OverlapFlags { template: Some(overlap_check), ..OverlapFlags::default() }
            }
        };
        Ok(flags.kinds())
    }

    /// After how long what was not used is given back; none for never.
    pub fn clean_interval(&self) -> Result<Option<Duration>, Error> {
        let seconds = self.cache_clean_interval.unwrap_or(CLEAN_INTERVAL);
        match u32::try_from(seconds) {
            Ok(0) => Ok(None),
            Ok(seconds) => Ok(Some(Duration::from_secs(seconds.into()))),
            Err(_) => Err(Error::new("Cache clean interval too big")),
        }
    }

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
