//! The steps from one header to another: which sectors are written in which order.
//!
//! A [`Layout`] is one way to put a header into its cluster. A layout can follow another at once if
//! writing it leaves alone all that the other relies on behind the first sector, or if the two differ in
//! a single sector. Where the wanted header cannot follow at once, there are layouts between the two:
//! with the backing file's name elsewhere, without the feature names, which are for people, or with the
//! extensions behind a gap. [`steps`] looks for the shortest path.

use super::extensions::{self, Extension};
use super::header::Header;
use crate::block::{Error, SECTOR};
use crate::io::Errno;
use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

const FIRST: usize = SECTOR as usize;

/// A sector: where in the file, in bytes, and what it holds.
pub(super) type Sector = (u64, Vec<u8>);

/// One header that follows another.
pub(super) struct Step {
    /// As it is afterwards.
    pub header: Header,
    /// Sectors that the header before does not rely on.
    pub rest: Vec<Sector>,
    /// The sector that makes the new header the one that holds. All others are durable before it is
    /// written.
    pub switch: Sector,
}

/// A header, and the bytes of its cluster that it relies on: where they start, and what they are.
struct Layout {
    header: Header,
    parts: Vec<(usize, Vec<u8>)>,
}

/// The steps from `old`, of which `disk` is the cluster, to `new`.
///
/// # Errors
/// `new` does not fit into the cluster, or the cluster has no room to change in such steps.
pub(super) fn steps(old: &Header, disk: &[u8], mut new: Header) -> Result<Vec<Step>, Error> {
    let mut disk = disk.to_vec();
    let now = Layout::on_disk(old, &disk);
    if let Some(same) = now.with_fields_of(&new) {
        return Ok(same.step(&mut disk).into_iter().collect());
    }
    new.place(0)?;
    let wanted = Layout::new(new);
    let places = Places::new(&now, &wanted);
    let new = &wanted.header;
    let mut layouts = vec![now];
    layouts.extend(places.of(new));
    let goals = 1..layouts.len();
    for header in [without_feature_names(old), old.clone(), without_feature_names(new)] {
        layouts.extend(places.of(&header));
    }
    layouts.extend([old, new].into_iter().filter_map(|header| places.behind_a_gap(header)));
    let path = shortest_path(&layouts, goals).ok_or_else(|| {
        Error::new("The header's cluster has no room to change it so that no crash can tear it")
            .with_errno(Errno(libc::ENOSPC))
    })?;
    Ok(path.into_iter().filter_map(|index| layouts[index].step(&mut disk)).collect())
}

/// Whether there are steps from `old` to `new`.
///
/// # Errors
/// As [`steps`].
pub(super) fn check(old: &Header, new: Header) -> Result<(), Error> {
    // What is on disk looks like that, unless another program has put it in another order.
    let mut old = old.clone();
    old.place(old.name_range().start)?;
    let mut disk = vec![0; 1 << old.cluster_bits];
    Layout::new(old.clone()).write(&mut disk);
    steps(&old, &disk, new).map(drop)
}

/// The layouts that lead from the first to one of `goals`, without the first.
fn shortest_path(layouts: &[Layout], goals: Range<usize>) -> Option<Vec<usize>> {
    let mut before = vec![None; layouts.len()];
    let mut next = VecDeque::from([0]);
    while let Some(from) = next.pop_front() {
        for to in 1..layouts.len() {
            if before[to].is_some() || !layouts[to].can_follow(&layouts[from]) {
                continue;
            }
            before[to] = Some(from);
            if goals.contains(&to) {
                let mut path = vec![to];
                path.extend(std::iter::successors(before[to], |&index| before[index]));
                // The first is there already.
                path.pop();
                path.reverse();
                return Some(path);
            }
            next.push_back(to);
        }
    }
    None
}

fn without_feature_names(header: &Header) -> Header {
    let mut bare = header.clone();
    bare.extensions.retain(|extension| !matches!(extension, Extension::FeatureNames(_)));
    bare
}

/// Where a name may be put, in bytes.
struct Places {
    names: [usize; 4],
    /// Behind all that the old header and the new one use.
    behind: usize,
}

impl Places {
    fn new(now: &Layout, wanted: &Layout) -> Places {
        let name = now.header.name_range();
        let behind = now.end().max(wanted.end()).next_multiple_of(8);
        Places { names: [0, name.start, name.end.next_multiple_of(8), behind], behind }
    }

    /// The layouts of a header, the name right behind the extensions first.
    fn of(&self, header: &Header) -> Vec<Layout> {
        let at = |&place: &usize| {
            let mut header = header.clone();
            header.place(place).ok()?;
            Some(Layout::new(header))
        };
        self.names.iter().filter_map(at).collect()
    }

    /// The header without feature names, and all that follows its fields behind an extension that
    /// nobody reads.
    fn behind_a_gap(&self, header: &Header) -> Option<Layout> {
        let mut header = without_feature_names(header);
        let length = header.full_length();
        let start = length + 8;
        if start > FIRST {
            return None;
        }
        let mut at = self.behind.max(FIRST);
        // Both are multiples of 8, the length of a table's entry is not.
        if (at - start).is_multiple_of(extensions::FEATURE_LEN) {
            at += 8;
        }
        let list = extensions::encode(&header.extensions);
        header.place_name(length, at + list.len()).ok()?;
        let head = [&header.structure()[..], &extensions::filler(at - start)].concat();
        let [_, name] = header.parts();
        Some(Layout { parts: vec![(0, head), (at, list), name], header })
    }
}

impl Layout {
    fn new(header: Header) -> Layout {
        Layout { parts: header.parts().into(), header }
    }

    /// As `disk` has it.
    fn on_disk(header: &Header, disk: &[u8]) -> Layout {
        let used = [0..header.extensions_end(disk), header.name_range()];
        let parts = used.map(|range| (range.start, disk[range].to_vec()));
        Layout { header: header.clone(), parts: parts.into() }
    }

    /// The same with the fields of `new`, if that is all in which the two headers differ.
    fn with_fields_of(&self, new: &Header) -> Option<Layout> {
        let mut header = new.clone();
        header.take_places(&self.header);
        let is_same = header.version == self.header.version
            && header.extensions == self.header.extensions
            && header.backing_file == self.header.backing_file;
        let mut parts = self.parts.clone();
        let fields = header.fields();
        parts[0].1.get_mut(..fields.len())?.copy_from_slice(&fields);
        is_same.then_some(Layout { header, parts })
    }

    fn end(&self) -> usize {
        self.parts.iter().map(|(at, bytes)| at + bytes.len()).max().unwrap_or(0)
    }

    /// Whether a crash while this is written over `before` leaves one of the two.
    fn can_follow(&self, before: &Layout) -> bool {
        self.keeps(before) || self.changed_sectors(before).len() <= 1
    }

    /// Whether behind the first sector nothing is other than `before` relies on.
    fn keeps(&self, before: &Layout) -> bool {
        let pairs =
            self.parts.iter().flat_map(|one| before.parts.iter().map(move |two| (one, two)));
        pairs.into_iter().all(|((at, new), (place, old))| {
            let start = (*at).max(*place).max(FIRST);
            let end = (at + new.len()).min(place + old.len());
            start >= end || new[start - at..end - at] == old[start - place..end - place]
        })
    }

    /// The sectors with anything that is not known to be the same in `before`.
    fn changed_sectors(&self, before: &Layout) -> BTreeSet<usize> {
        let mut changed = BTreeSet::new();
        for (at, bytes) in self.parts.iter().filter(|(_, bytes)| !bytes.is_empty()) {
            let end = at + bytes.len();
            for sector in at / FIRST..end.div_ceil(FIRST) {
                let part = (sector * FIRST).max(*at)..((sector + 1) * FIRST).min(end);
                let is_same = before.parts.iter().any(|(place, old)| {
                    part.start >= *place
                        && part.end <= place + old.len()
                        && old[part.start - place..part.end - place]
                            == bytes[part.start - at..part.end - at]
                });
                if !is_same {
                    changed.insert(sector);
                }
            }
        }
        changed
    }

    fn write(&self, cluster: &mut [u8]) {
        for (at, bytes) in &self.parts {
            cluster[*at..at + bytes.len()].copy_from_slice(bytes);
        }
    }

    /// How this is written over what `disk` holds, which holds it then; none if it does already.
    fn step(&self, disk: &mut [u8]) -> Option<Step> {
        let before = disk.to_vec();
        self.write(disk);
        let sectors = before.chunks(FIRST).zip(disk.chunks(FIRST)).enumerate();
        let changed = sectors.filter(|(_, (old, new))| old != new);
        let mut changed: Vec<Sector> =
            changed.map(|(n, (_, new))| (n as u64 * SECTOR, new.to_vec())).collect();
        if changed.is_empty() {
            return None;
        }
        // The first sector, or the only one.
        let switch = changed.remove(0);
        Some(Step { header: self.header.clone(), rest: changed, switch })
    }
}

#[cfg(test)]
#[path = "header_steps_tests.rs"]
mod tests;
