//! How often each cluster is referred to.
//!
//! Memory is bounded: pages come as clusters are referred to, up to a limit that honest images do
//! not reach.

use crate::block::Error;
use std::cell::Cell;
use std::collections::BTreeMap;

/// Clusters that a page counts, one byte each.
const PAGE: usize = 4096;
/// Most pages: 1 GiB, for 64 TiB of clusters of 64 KiB.
const MAX_PAGES: usize = 1 << 18;

/// See the module's text.
#[derive(Default)]
pub struct References {
    pages: Vec<Box<[u8; PAGE]>>,
    /// Where in `pages` a page is.
    index: BTreeMap<u64, usize>,
    /// The page that was found last, and where: most clusters follow their predecessors.
    last: Cell<Option<(u64, usize)>>,
    /// Clusters with more references than a byte holds, and how many more.
    more: BTreeMap<u64, u64>,
}

impl References {
    fn page(&self, page: u64) -> Option<usize> {
        if let Some((last, at)) = self.last.get()
            && last == page
        {
            return Some(at);
        }
        let at = *self.index.get(&page)?;
        self.last.set(Some((page, at)));
        Some(at)
    }

    pub fn get(&self, cluster: u64) -> u64 {
        let (page, at) = (cluster / PAGE as u64, (cluster % PAGE as u64) as usize);
        match self.page(page).map_or(0, |page| self.pages[page][at]) {
            u8::MAX => u8::MAX as u64 + self.more.get(&cluster).copied().unwrap_or(0),
            few => few as u64,
        }
    }

    /// One more reference to each of `n` clusters.
    pub fn add(&mut self, first: u64, n: u64) -> Result<(), Error> {
        let mut cluster = first;
        while cluster < first + n {
            let (page, at) = (cluster / PAGE as u64, (cluster % PAGE as u64) as usize);
            let page = match self.page(page) {
                Some(page) => page,
                None if self.pages.len() == MAX_PAGES => {
                    return Err(Error::new("Check failed: the image refers to too many clusters"));
                }
                None => {
                    self.index.insert(page, self.pages.len());
                    self.pages.push(Box::new([0; PAGE]));
                    self.pages.len() - 1
                }
            };
            let until = ((first + n - cluster) as usize).min(PAGE - at) + at;
            for (i, count) in self.pages[page][at..until].iter_mut().enumerate() {
                match count.checked_add(1) {
                    Some(sum) => *count = sum,
                    None => *self.more.entry(cluster + i as u64).or_insert(0) += 1,
                }
            }
            cluster += (until - at) as u64;
        }
        Ok(())
    }

    /// The first cluster from `from` on in a page that counts anything.
    pub fn next_page(&self, from: u64) -> Option<u64> {
        let first = from / PAGE as u64;
        let (&page, _) = self.index.range(first..).next()?;
        Some((page * PAGE as u64).max(from))
    }

    /// Where the page of a cluster ends: the first cluster of the next one.
    pub fn page_end(&self, cluster: u64) -> u64 {
        (cluster / PAGE as u64 + 1) * PAGE as u64
    }

    /// The first of `n` clusters in a row, from `from` on, that nothing refers to.
    pub fn first_free(&self, from: u64, n: u64) -> u64 {
        let (mut start, mut cluster) = (from, from);
        while cluster - start < n {
            if self.get(cluster) != 0 {
                start = cluster + 1;
            }
            cluster += 1;
        }
        start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_counted_beyond_a_byte_and_across_pages() {
        let mut references = References::default();
        for _ in 0..300 {
            references.add(4090, 10).unwrap();
        }
        references.add(4095, 2).unwrap();
        assert_eq!(
            [4089, 4090, 4095, 4096, 4100].map(|c| references.get(c)),
            [0, 300, 301, 301, 0]
        );
        assert_eq!(references.next_page(0), Some(0));
        assert_eq!(references.next_page(5000), Some(5000));
        assert_eq!(references.next_page(9000), None);
        assert_eq!(references.first_free(4090, 3), 4100);
        assert_eq!(references.first_free(4085, 5), 4085);
        assert_eq!(references.first_free(4085, 6), 4100);
    }

    #[test]
    fn an_image_that_refers_to_everything_is_refused_before_memory_is_full() {
        let mut references = References::default();
        let far = |i: u64| i * PAGE as u64;
        let last = (0..).find(|&i| references.add(far(i), 1).is_err()).unwrap();
        assert_eq!(last as usize, MAX_PAGES);
    }
}
