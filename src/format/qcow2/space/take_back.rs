//! Recovery of clusters that a killed process has left counted and unused.
//!
//! They are what it had reserved, what it had taken for requests in flight, and what it was about to free.
//!
//! Nothing tells such clusters from others but that no table refers to them. So all tables are read, a part with each
//! reservation and each flush, and requests continue meanwhile. The rule: a cluster that is counted, whose count has
//! not changed since before the first table was read, and to which no reference was found, has none. For
//!
//! * a reference to such a cluster is new only where a table was copied, and the copied one is read, too: no table that is
//!   to be read is freed meanwhile, or the search ends without a result;
//! * an entry that was dropped before its table was read belongs to a request that has ended when the counts are looked
//!   at, so that its cluster is among those that were released;
//! * the disk has what readers are shown: no write of a table has failed.
//!
//! What was found is lowered when everything that the kernel has is durable: an older entry that a crash brings back
//! must not name what is reused.
//!
//! The search begins when nothing was counted in another way since the image was opened, or when it is at rest. If it has
//! not come to its end when the image is closed, it is made again then, whole.

use super::refcounts::Refcounts;
use super::{Metadata, Space};
use crate::block::Error;
use crate::cow::{References, Stop};
use crate::format::qcow2::check::unused::Walk;
use crate::io::IoResult;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of tables that are read before the first request, and with a request.
const AT_FIRST: u64 = 4 << 20;
const AT_ONCE: u64 = 1 << 20;

/// Whether there is something to take back.
#[derive(Default)]
pub struct TakingBack {
    /// There was, since the image was opened.
    was_due: AtomicBool,
    /// It was not found out yet what there is.
    is_due: AtomicBool,
    /// A search is under way ([`Refcounts::search`]).
    is_searching: AtomicBool,
}

/// A search for clusters that are counted and unused.
pub struct Search {
    walk: Walk,
    /// Clusters whose counts have changed, or are going to change, since it began.
    touched: References,
    stage: Stage,
    /// It cannot come to a result any more.
    is_void: bool,
    /// Writes of tables that had failed when it began.
    failures: u64,
    freed: u64,
}

enum Stage {
    Reading,
    /// All tables are read. Requests that are older than this moment are waited for.
    Ending {
        moment: u64,
    },
    /// The refcount blocks from this one on are to be compared.
    Comparing {
        index: usize,
    },
}

impl Search {
    /// The count of a cluster has changed.
    pub fn touch(&mut self, cluster: u64, count: u64) {
        let is_table = count == 0 && self.walk.is_to_read(cluster);
        self.is_void |= is_table || self.touched.add(cluster, 1).is_err();
    }
}

impl Space {
    /// Begins to take back what another process has left, and does so as far as it is quick.
    pub async fn begin_taking_back(&self, image: Metadata<'_>) {
        self.taking_back.was_due.store(true, Ordering::SeqCst);
        self.taking_back.is_due.store(true, Ordering::SeqCst);
        let Some(counts) = &self.counts else { return };
        let mut refcounts = counts.lock().await;
        if refcounts.is_untouched() {
            self.begin_search(image, &mut refcounts, false).await;
            self.search_on(image, &mut refcounts, AT_FIRST).await;
        }
    }

    /// Goes on looking, a part.
    pub(super) async fn take_back_some(&self, image: Metadata<'_>, refcounts: &mut Refcounts) {
        self.search_on(image, refcounts, AT_ONCE).await;
    }

    /// The same, if nobody has the refcounts.
    pub(super) async fn take_back_if_idle(&self, image: Metadata<'_>) {
        if self.taking_back.is_searching.load(Ordering::Relaxed)
            && let Some(mut refcounts) = self.try_counts()
        {
            self.take_back_some(image, &mut refcounts).await;
        }
    }

    /// Takes back all that there is, of an image at rest. False if there was nothing to look for since it was opened.
    pub(super) async fn take_back_all(
        &self,
        image: Metadata<'_>,
        refcounts: &mut Refcounts,
    ) -> bool {
        if !self.taking_back.was_due.load(Ordering::SeqCst) {
            return false;
        }
        self.search_on(image, refcounts, u64::MAX).await;
        if self.taking_back.is_due.load(Ordering::SeqCst) {
            self.end_search(refcounts);
            self.begin_search(image, refcounts, true).await;
            self.search_on(image, refcounts, u64::MAX).await;
        }
        true
    }

    /// Whether unused clusters may be left.
    pub fn has_to_take_back(&self) -> bool {
        self.taking_back.is_due.load(Ordering::SeqCst)
    }

    fn end_search(&self, refcounts: &mut Refcounts) {
        refcounts.search = None;
        self.freed.end_watching();
        self.taking_back.is_searching.store(false, Ordering::SeqCst);
    }

    async fn begin_search(&self, image: Metadata<'_>, refcounts: &mut Refcounts, is_rest: bool) {
        let is_counted = !refcounts.is_lazy() && !image.snapshots.needs_repair();
        if !is_counted || image.corruption.is_fatal() || !self.freed.watch(is_rest) {
            return;
        }
        let begun = match (image.mapping.tables().failures_settled(), image.settle_header().await) {
            (Some(failures), Ok(())) => {
                let entries = u64::from(image.header.now().l1_size);
                let l1: Vec<_> = (0..entries).map(|index| image.mapping.l1_at(index)).collect();
                let walk = Walk::begin(&image.file(), &l1).await;
                walk.map(|walk| (walk, failures))
            }
            _ => Err(Error::new("tables are in doubt")),
        };
        match begun {
            Ok((walk, failures)) => {
                let (touched, stage) = (References::default(), Stage::Reading);
                let search = Search { walk, touched, stage, is_void: false, failures, freed: 0 };
                refcounts.search = Some(Box::new(search));
                self.taking_back.is_searching.store(true, Ordering::SeqCst);
            }
            Err(error) => self.give_up(refcounts, &error),
        }
    }

    fn give_up(&self, refcounts: &mut Refcounts, error: &Error) {
        log::debug!("{}: unused clusters are not looked for: {error}", self.name);
        self.end_search(refcounts);
    }

    /// Continues until this many bytes were read, or there is nothing to do for now.
    async fn search_on(&self, image: Metadata<'_>, refcounts: &mut Refcounts, most: u64) {
        let mut left = most;
        while left > 0 {
            let Some(mut search) = refcounts.search.take() else { return };
            let went = self.search_step(image, &mut search, refcounts).await;
            let is_over = matches!(search.stage, Stage::Comparing { index } if index == usize::MAX);
            let freed = search.freed;
            // Nobody else has changed anything: the refcounts are held.
            refcounts.search = Some(search);
            match went {
                Err(error) => return self.give_up(refcounts, &error),
                Ok(_) if is_over => {
                    self.end_search(refcounts);
                    self.taking_back.is_due.store(false, Ordering::SeqCst);
                    if freed > 0 {
                        log::info!(
                            "node '{}': {freed} clusters are free that a killed daemon had taken",
                            self.name
                        );
                    }
                    return;
                }
                Ok(false) => return,
                Ok(true) => left = left.saturating_sub(self.geometry.cluster_size()),
            }
        }
    }

    /// Reads one table, or compares one block. False if nothing can be done for now.
    async fn search_step(
        &self,
        image: Metadata<'_>,
        search: &mut Search,
        refcounts: &mut Refcounts,
    ) -> Result<bool, Error> {
        for run in self.freed.take_watched() {
            (run.first..run.first + run.count).for_each(|cluster| search.touch(cluster, 1));
        }
        let has_failed = image.mapping.tables().failures_settled() != Some(search.failures);
        let is_ours =
            image.mapping.tables().stopped.get() != Stop::ForGood && !image.corruption.is_fatal();
        if search.is_void || has_failed || !is_ours {
            return Err(Error::new("the image has changed meanwhile"));
        }
        let failed = |errno| Error::os("Could not read a table", errno);
        match search.stage {
            Stage::Reading => {
                if !search.walk.step(&image.file()).await? {
                    search.stage = Stage::Ending { moment: image.mapping.tables().visits.moment() };
                }
                Ok(true)
            }
            Stage::Ending { moment } => {
                if !image.mapping.tables().visits.passed(moment) {
                    return Ok(false);
                }
                image.file().flush().await.map_err(failed)?;
                search.stage = Stage::Comparing { index: 0 };
                Ok(true)
            }
            Stage::Comparing { index } => {
                let next =
                    self.compare_block(image, search, refcounts, index).await.map_err(failed)?;
                search.stage = Stage::Comparing { index: next.unwrap_or(usize::MAX) };
                Ok(true)
            }
        }
    }
    /// Lowers the counts of unused clusters in the next refcount block from `index` on. Returns which one comes then.
    async fn compare_block(
        &self,
        image: Metadata<'_>,
        search: &mut Search,
        refcounts: &mut Refcounts,
        index: usize,
    ) -> IoResult<Option<usize>> {
        let Search { walk, touched, .. } = &*search;
        let lower = |cluster, stored| match touched.get(cluster) {
            0 => walk.lower_count(cluster, stored),
            _ => None,
        };
        let Some((index, free)) = refcounts.lower_in_block(image, index, lower).await? else {
            return Ok(None);
        };
        refcounts.write(image).await?;
        if self.passes_discards {
            self.discard_clusters(image, &free).await;
        }
        search.freed += free.len() as u64;
        Ok(Some(index + 1))
    }
}
