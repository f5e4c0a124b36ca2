//! `query-blockstats`: the highest offsets written, and the request counters of exports.
//!
//! The rule held here: nothing is counted twice for it. The sums are of what each queue has counted by
//! itself.

use super::{Nodes, listed};
use crate::block::graph::NodeInfo;
use crate::export::core::ExportMetrics;
use crate::export::core::metrics::OperationMetrics;
use crate::monitor::reply::{Outcome, object};
use crate::options::{self, Map, Value};
use crate::service::Service;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What exports have counted, by QEMU's kinds of operations.
#[derive(Clone, Copy, Default)]
struct Counts {
    read: Operations,
    write: Operations,
    flush: Operations,
    unmap: Operations,
}

#[derive(Clone, Copy, Default)]
struct Operations {
    worked: u64,
    failed: u64,
    bytes: u64,
    ns: u64,
}

/// By node.
type Sums = BTreeMap<String, Counts>;

impl Counts {
    fn add(&mut self, export: &ExportMetrics) {
        for (_, queue) in export.queues() {
            let [read, write, flush, discard, write_zeroes, _] = &queue.operations;
            self.read.add(read);
            self.write.add(write);
            self.write.add(write_zeroes);
            self.flush.add(flush);
            self.unmap.add(discard);
        }
    }
}

impl Operations {
    fn add(&mut self, counted: &OperationMetrics) {
        let buckets = counted.buckets.iter();
        let all: u64 = buckets.map(|bucket| bucket.load(Ordering::Relaxed)).sum();
        let failed = counted.errors.load(Ordering::Relaxed);
        self.worked += all.saturating_sub(failed);
        self.failed += failed;
        self.bytes += counted.bytes.load(Ordering::Relaxed);
        self.ns += counted.latency_ns.load(Ordering::Relaxed);
    }
}

pub async fn query_blockstats(service: &Service, arguments: Map) -> Outcome {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Arguments {
        query_nodes: Option<bool>,
    }
    let Arguments { query_nodes } = options::from_map(arguments)?;
    let of_nodes = query_nodes.unwrap_or(false);
    let describe = |nodes: Nodes<'_>| {
        let exports = nodes.service.counted();
        match of_nodes {
            true => nodes.stats_of_nodes(&exports),
            false => nodes.stats_of_exports(&exports),
        }
    };
    listed(service, describe).await
}

impl Nodes<'_> {
    fn stats_of_nodes(&self, exports: &[Arc<ExportMetrics>]) -> Vec<Value> {
        let mut sums = Sums::new();
        for export in exports {
            sums.entry(export.serves.lock().node.clone()).or_default().add(export);
        }
        // Oldest first, as QEMU has them here.
        let all = self.list.iter().rev();
        all.map(|(info, _)| Value::Map(self.stats(info, &sums, false))).collect()
    }

    /// Ours alone: qemu-storage-daemon has no devices.
    fn stats_of_exports(&self, exports: &[Arc<ExportMetrics>]) -> Vec<Value> {
        let of = |export: &Arc<ExportMetrics>| {
            let node = export.serves.lock().node.clone();
            let info = self.by_name(&node)?;
            let mut counts = Counts::default();
            counts.add(export);
            let mut stats = self.stats(info, &Sums::from([(node, counts)]), true);
            stats.insert("device", &*export.name);
            Some(Value::Map(stats))
        };
        exports.iter().filter_map(of).collect()
    }

    /// `BlockStats`, with those of the nodes below it; with `chain` of its backing files, too.
    fn stats(&self, info: &NodeInfo, sums: &Sums, chain: bool) -> Map {
        let mut map = Map::from_iter([
            ("node-name", Value::from(&*info.name)),
            ("stats", device_stats(info.write_highest, sums.get(&*info.name))),
        ]);
        if let Some(discards) = info.discards {
            let specific = object([
                ("driver", Value::from(info.driver)),
                ("discard-nb-ok", Value::from(discards.worked)),
                ("discard-nb-failed", Value::from(discards.failed)),
                ("discard-bytes-ok", Value::from(discards.bytes)),
            ]);
            map.insert("driver-specific", specific);
        }
        if let Some(parent) = self.primary(info) {
            map.insert("parent", Value::Map(self.stats(parent, sums, chain)));
        }
        if chain && let Some(backing) = self.backing(info) {
            map.insert("backing", Value::Map(self.stats(backing, sums, chain)));
        }
        map
    }
}

/// `BlockDeviceStats`.
fn device_stats(write_highest: u64, counts: Option<&Counts>) -> Value {
    let Counts { read, write, flush, unmap } = counts.copied().unwrap_or_default();
    let mut map = Map::new();
    for (kind, one) in [("rd", read), ("wr", write), ("unmap", unmap), ("flush", flush)] {
        if kind != "flush" {
            map.insert(format!("{kind}_bytes"), one.bytes);
            map.insert(format!("{kind}_merged"), 0u64);
        }
        map.insert(format!("{kind}_operations"), one.worked);
        map.insert(format!("{kind}_total_time_ns"), one.ns);
        map.insert(format!("failed_{kind}_operations"), one.failed);
        map.insert(format!("invalid_{kind}_operations"), 0u64);
    }
    map.insert("wr_highest_offset", write_highest);
    map.insert("account_invalid", false);
    map.insert("account_failed", counts.is_some());
    map.insert("timed_stats", Value::List(Vec::new()));
    Value::Map(map)
}
