//! The backing file that the header names: changed in such an order that a crash leaves the old name and
//! format or the new ones.
//!
//! Name and format lie in the header's cluster, in several sectors, of which a crash keeps any. The first
//! sector says where everything is, and is written last. What the old one refers to stays as it is until
//! then: the new name has a place of its own, the old one moves out of the way if it has to, and where
//! extensions move in later sectors, the old header
//! first does without the table of feature names, which is for people, so that its extensions end in the
//! first sector. Should they not even then (a data file with a very long name), the cluster is written
//! at once, as QEMU does.

use super::Qcow2;
use super::extensions::Extension;
use super::header::Header;
use super::read::read_padded;
use super::standing::OnDisk;
use crate::block::{Error, SECTOR, WriteFlags};
use crate::io::{AlignedBuf, Errno, IoVec};
use crate::options::bytes;

const FIRST: usize = SECTOR as usize;

/// Writes that lead from one header to another, each durable before the next: where in the file, and
/// what.
type Steps = Vec<(u64, Vec<u8>)>;

impl Qcow2 {
    pub(super) async fn change_backing(
        &self,
        name: Option<&str>,
        format: Option<&str>,
    ) -> Result<(), Error> {
        let refused = |text: &str, errno| Err(Error::new(text).with_errno(errno));
        if !self.is_writable {
            return refused("Image is read-only", Errno::EPERM);
        }
        if name.is_some() && self.has_raw_data {
            return refused("A raw data file cannot have a backing file", Errno::EINVAL);
        }
        let failed = |errno: Errno| Error::os("Could not write the header", errno);
        self.check_sound().await.map_err(failed)?;
        let mut header = self.header.lock().await;
        let file = self.file();
        let size = self.geometry.cluster_size() as usize;
        let mut disk = AlignedBuf::new(size, 4096).ok_or(Errno::ENOMEM).map_err(failed)?;
        read_padded(&file, 0, &disk.io_vec()).await.map_err(failed)?;
        let mut new = header.clone();
        new.backing_file = name.map(|name| bytes::bytes_of(name).into_owned());
        new.extensions.retain(|extension| !matches!(extension, Extension::BackingFormat(_)));
        if let (Some(_), Some(format)) = (name, format) {
            new.extensions.push(Extension::BackingFormat(format.as_bytes().to_vec()));
        }
        let steps = steps(&header, &disk, &mut new)?;
        // The disk may have it even if writing fails.
        self.note_header(&new);
        *self.header_copy.lock() = new.clone();
        *header = new;
        // Between two steps fields that were written alone could name what is not there.
        self.header_state.set(OnDisk::Lost);
        for (at, bytes) in &steps {
            file.write(*at, &IoVec::from_ref(bytes), WriteFlags::empty()).await.map_err(failed)?;
            file.flush().await.map_err(failed)?;
        }
        self.header_state.set(OnDisk::Same);
        Ok(())
    }
}

/// From `old`, of which `disk` is the cluster, to `new`, which is told where its name is.
pub(super) fn steps(old: &Header, disk: &[u8], new: &mut Header) -> Result<Steps, Error> {
    let mut cluster = new.encode()?;
    let is_kept = |cluster: &[u8], of: &Header| {
        let used = [of.extensions_range(), of.name_range()];
        let mut later = used.into_iter().map(|range| range.start.max(FIRST)..range.end);
        later.all(|range| range.is_empty() || cluster.get(range.clone()) == disk.get(range))
    };
    let merged = |new: &Header, cluster: &[u8]| {
        let mut merged = disk.to_vec();
        merged[..FIRST].copy_from_slice(&cluster[..FIRST]);
        for range in [new.extensions_range(), new.name_range()] {
            merged[range.clone()].copy_from_slice(&cluster[range]);
        }
        merged
    };
    cluster = merged(new, &cluster);
    let mut apart = new.clone();
    if !is_kept(&cluster, old)
        && let Ok(bytes) = apart.encode_with_name_at(old.name_range().end.next_multiple_of(8))
    {
        cluster = merged(&apart, &bytes);
        *new = apart;
    }
    let clashes = |used: std::ops::Range<usize>| {
        let later = used.start.max(FIRST)..used.end;
        !later.is_empty() && cluster.get(later.clone()) != disk.get(later)
    };
    if clashes(old.name_range())
        && let Some(moved) = move_old_name(old, disk, new)
    {
        return moved;
    }
    let end = new.extensions_range().end.max(new.name_range().end).next_multiple_of(FIRST);
    let first = (0, cluster[..FIRST].to_vec());
    if end == FIRST {
        return Ok(vec![first]);
    }
    let rest = (SECTOR, cluster[FIRST..end].to_vec());
    if is_kept(&cluster, old) {
        return Ok(vec![rest, first]);
    }
    let mut bare = old.clone();
    bare.extensions.retain(|extension| !matches!(extension, Extension::FeatureNames(_)));
    if let Ok(bytes) = bare.encode_with_name_at(old.name_range().start)
        && bare.extensions_range().end <= FIRST
        && is_kept(&cluster, &bare)
    {
        return Ok(vec![(0, bytes[..FIRST].to_vec()), rest, first]);
    }
    Ok(vec![(0, cluster[..end].to_vec())])
}

/// The steps that take the old name out of the new header's way first, behind all else; none where the
/// cluster has no room for that.
fn move_old_name(old: &Header, disk: &[u8], new: &mut Header) -> Option<Result<Steps, Error>> {
    let name = old.backing_file.as_deref()?;
    let used = [old, &*new].map(|of| of.extensions_range().end.max(of.name_range().end));
    let place = used[0].max(used[1]).next_multiple_of(8);
    let mut there = disk.to_vec();
    there.get_mut(place..place + name.len())?.copy_from_slice(name);
    let sectors = place / FIRST * FIRST..(place + name.len()).next_multiple_of(FIRST);
    let copied = (sectors.start as u64, there.get(sectors)?.to_vec());
    let mut moved = old.clone();
    moved.set_name_place(place);
    let fields = moved.fields();
    there[..fields.len()].copy_from_slice(&fields);
    let mut all = vec![copied, (0, there[..FIRST].to_vec())];
    Some(steps(&moved, &there, new).map(|rest| {
        all.extend(rest);
        all
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(bits: u32, names: usize, name: &str, format: &str) -> Header {
        let mut header = Header::new(bits, 1 << 20);
        header.refcount_table_clusters = 1;
        header.l1_size = 64;
        header.backing_file = (!name.is_empty()).then(|| name.as_bytes().to_vec());
        if names > 0 {
            header.extensions.push(Extension::FeatureNames(vec![1; names]));
        }
        if !format.is_empty() {
            header.extensions.push(Extension::BackingFormat(format.as_bytes().to_vec()));
        }
        header
    }

    fn shown(header: &Header) -> (Option<Vec<u8>>, Option<Extension>) {
        let is_format = |e: &&Extension| matches!(e, Extension::BackingFormat(_));
        (header.backing_file.clone(), header.extensions.iter().find(is_format).cloned())
    }

    /// Every change of name and format, cut short at every sector of every step.
    #[test]
    fn a_crash_while_the_name_changes_leaves_the_old_one_or_the_new_one() {
        let long = "x".repeat(900);
        let kinds = [("", ""), ("a.raw", "raw"), ("b", ""), (&*long, "qcow2"), ("/tmp/c", "vmdk")];
        for (bits, names) in [(9, 0), (12, 0), (12, 384), (16, 384), (16, 48)] {
            for (from, to) in kinds.iter().flat_map(|a| kinds.iter().map(move |b| (a, b))) {
                let mut old = header(bits, names, from.0, from.1);
                let Ok(disk) = old.encode() else { continue };
                let mut new = header(bits, names, to.0, to.1);
                let Ok(steps) = steps(&old, &disk, &mut new) else { continue };
                let mut before = disk.clone();
                for (at, bytes) in &steps {
                    let sectors = bytes.chunks(FIRST).enumerate();
                    let sectors: Vec<_> =
                        sectors.map(|(n, s)| (*at as usize + n * FIRST, s)).collect();
                    for lost in 0..=sectors.len() {
                        let mut state = before.clone();
                        for (n, (at, sector)) in sectors.iter().enumerate() {
                            if n != lost {
                                state[*at..at + sector.len()].copy_from_slice(sector);
                            }
                        }
                        let read = Header::parse(&state).unwrap();
                        let read = shown(&read);
                        assert!(
                            read == shown(&old) || read == shown(&new),
                            "{bits} {names} {from:?} to {to:?}"
                        );
                        if lost == sectors.len() {
                            before = state;
                        }
                    }
                }
                let read = Header::parse(&before).unwrap();
                assert_eq!(shown(&read), shown(&new));
            }
        }
    }
}
