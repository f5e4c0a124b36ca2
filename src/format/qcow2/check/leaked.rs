//! Searching tables for references to clusters that may be leaked.
//!
//! Several tables are read at once and searched for these clusters alone, because a guest that comes back after a
//! kill waits for the answer.

use super::{Check, Refcounts, failed, read_header, read_or_zero};
use crate::block::{Error, Fix, Node};
use crate::format::qcow2::layout::{Cluster, Geometry, L2Entry};
use crate::io::IoResult;
use std::collections::BTreeSet;
use std::future::poll_fn;
use std::task::Poll;

/// Tables that are read at once.
const AT_ONCE: usize = 16;

/// Whether all these clusters are leaked: counted once, and nothing refers to them. Nobody changes the
/// image meanwhile. `tables`: the L2 tables that may refer to them; all, if it is not known which.
///
/// # Errors
/// I/O failed, or the image makes no sense.
pub async fn are_leaked(
    file: &Node,
    clusters: &BTreeSet<u64>,
    tables: Option<BTreeSet<u64>>,
) -> Result<bool, Error> {
    if clusters.is_empty() {
        return Ok(true);
    }
    let mut say = |line: &str| log::debug!("looking for references: {line}");
    let mut check = Check::new(file, read_header(file).await?, Fix::Nothing, &mut say);
    let geometry = check.geometry;
    check.put_off = Some(Vec::new());
    let references = check.count_references().await?;
    let mut refcounts = Refcounts::read(file, &check.header).await?;
    let end = geometry.clusters(file.driver().len());
    for &cluster in clusters {
        let count = refcounts.get(file, cluster << geometry.cluster_bits);
        if cluster >= end || references.get(cluster) > 0 || count.await? != Some(1) {
            return Ok(false);
        }
    }
    let all = check.put_off.take().unwrap_or_default();
    // Snapshots share most of them.
    let tables = tables.unwrap_or_else(|| all.into_iter().map(|(table, _)| table).collect());
    let tables: Vec<u64> = tables.into_iter().collect();
    for some in tables.chunks(AT_ONCE) {
        let found = read_tables(file, &geometry, some).await.map_err(failed)?;
        if found.iter().any(|table| names_one_of(&geometry, table, clusters)) {
            return Ok(false);
        }
    }
    Ok(check.report.corruptions == 0)
}

/// The bytes of these tables, read side by side.
async fn read_tables(file: &Node, geometry: &Geometry, tables: &[u64]) -> IoResult<Vec<Vec<u8>>> {
    let size = geometry.cluster_size() as usize;
    let mut found = vec![vec![0; size]; tables.len()];
    let reads = tables.iter().zip(&mut found);
    let mut reads: Vec<_> =
        reads.map(|(&table, into)| Box::pin(read_or_zero(file, table, into))).collect();
    let mut result = Ok(());
    poll_fn(|cx| {
        reads.retain_mut(|read| match read.as_mut().poll(cx) {
            Poll::Pending => true,
            Poll::Ready(ended) => {
                result = result.and(ended);
                false
            }
        });
        if reads.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    drop(reads);
    result.map(|()| found)
}

/// Whether an entry of a table refers to one of the clusters, or may do so.
fn names_one_of(geometry: &Geometry, table: &[u8], clusters: &BTreeSet<u64>) -> bool {
    let (Some(&low), Some(&high)) = (clusters.first(), clusters.last()) else { return false };
    let bits = geometry.cluster_bits;
    let entries = table.chunks_exact(geometry.l2_entry_size() as usize).map(L2Entry::parse);
    entries.filter(|entry| entry.word != 0).any(|entry| {
        if !entry.is_compressed() {
            let host = entry.offset() >> bits;
            return (low..=high).contains(&host) && clusters.contains(&host);
        }
        match geometry.decode(entry) {
            Ok(Cluster::Compressed(place)) => {
                let last = (place.host + place.len.max(1) - 1) >> bits;
                clusters.range(place.host >> bits..=last).next().is_some()
            }
            _ => true,
        }
    })
}
