//! Internal snapshots: states of a disk that its own image keeps.

use super::{Error, LocalFuture};
use crate::options::{Map, Value};

/// What a format does that has internal snapshots. One operation at a time:
/// [`Graph::with_snapshots`](super::Graph::with_snapshots), or the only user of the image, ensures that.
pub trait Snapshots: Send + Sync {
    /// All of them, in the image's order.
    ///
    /// # Errors
    /// ENOTSUP for images that can have none; or the list makes no sense.
    fn list(&self) -> Result<Vec<SnapshotInfo>, Error>;

    /// Keeps the disk as it is now: every write that has completed before is in it, none that begins
    /// later. Requests may be in flight; writes wait meanwhile, reads do not.
    ///
    /// # Errors
    /// Nothing has changed, unless writing the very end failed. EINVAL where a cluster has as many
    /// references as the image can count, EFBIG for too many snapshots, ENOTSUP for images that
    /// cannot have any.
    fn create<'a>(&'a self, new: NewSnapshot<'a>) -> LocalFuture<'a, Result<SnapshotInfo, Error>>;

    /// Turns the disk back to a snapshot, its size too. Called with no other request in flight on the
    /// node.
    ///
    /// # Errors
    /// ENOENT if there is none; otherwise why the disk is as it was.
    fn apply<'a>(&'a self, which: SnapshotKey<'a>) -> LocalFuture<'a, Result<(), Error>>;

    /// Forgets a snapshot; what it was. Requests may be in flight, and continue.
    ///
    /// # Errors
    /// ENOENT if there is none.
    fn delete<'a>(&'a self, which: SnapshotKey<'a>)
    -> LocalFuture<'a, Result<SnapshotInfo, Error>>;

    /// Shows a snapshot in place of the disk, which keeps its size, until the node is closed. For
    /// read-only nodes; called with no other request in flight.
    ///
    /// # Errors
    /// ENOENT if there is none.
    fn load<'a>(&'a self, which: SnapshotKey<'a>) -> LocalFuture<'a, Result<(), Error>>;
}

/// The description of a snapshot that is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewSnapshot<'a> {
    pub name: &'a str,
    /// Since 1970.
    pub date: std::time::Duration,
    /// Of the guest, where instructions are counted.
    pub icount: Option<u64>,
}

/// Which snapshot is meant; the first that fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotKey<'a> {
    Id(&'a str),
    Name(&'a str),
    IdAndName(&'a str, &'a str),
    /// The one with this identifier, or else this name.
    IdOrName(&'a str),
}

impl SnapshotKey<'_> {
    /// The place in a list of identifiers and names.
    pub fn find<'s>(
        &self,
        list: impl Iterator<Item = (&'s [u8], &'s [u8])> + Clone,
    ) -> Option<usize> {
        let by_name = |wanted: &str| list.clone().position(|(_, name)| name == wanted.as_bytes());
        let by_id = |wanted: &str| list.clone().position(|(id, _)| id == wanted.as_bytes());
        match *self {
            SnapshotKey::Id(id) => by_id(id),
            SnapshotKey::Name(name) => by_name(name),
            SnapshotKey::IdAndName(id, name) => {
                list.clone().position(|both| both == (id.as_bytes(), name.as_bytes()))
            }
            SnapshotKey::IdOrName(text) => by_id(text).or_else(|| by_name(text)),
        }
    }
}

/// The description of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    pub id: String,
    pub name: String,
    /// Of the machine's state that was kept with it, in bytes.
    pub vm_state_size: u64,
    /// When it was made: seconds since 1970, and nanoseconds.
    pub date_sec: u32,
    pub date_nsec: u32,
    /// How long the guest had run, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// How many instructions it had executed, where that was counted.
    pub icount: Option<u64>,
}

impl SnapshotInfo {
    /// As SnapshotInfo of QMP, its keys in QEMU's order.
    pub fn to_value(&self) -> Value {
        const SECOND: u64 = 1_000_000_000;
        let mut map = Map::new();
        if let Some(icount) = self.icount {
            map.insert("icount", icount);
        }
        map.insert("vm-clock-nsec", self.vm_clock_nsec % SECOND);
        map.insert("name", &*self.name);
        map.insert("date-sec", u64::from(self.date_sec));
        map.insert("date-nsec", u64::from(self.date_nsec));
        map.insert("vm-clock-sec", self.vm_clock_nsec / SECOND);
        map.insert("id", &*self.id);
        map.insert("vm-state-size", self.vm_state_size);
        Value::Map(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identifier_comes_before_a_name() {
        let list: [(&[u8], &[u8]); 3] = [(b"1", b"2"), (b"2", b"a"), (b"3", b"a")];
        let find = |key: SnapshotKey<'_>| key.find(list.iter().copied());
        assert_eq!(find(SnapshotKey::IdOrName("2")), Some(1));
        assert_eq!(find(SnapshotKey::IdOrName("a")), Some(1));
        assert_eq!(find(SnapshotKey::Name("2")), Some(0));
        assert_eq!(find(SnapshotKey::Id("a")), None);
        assert_eq!(find(SnapshotKey::IdAndName("3", "a")), Some(2));
        assert_eq!(find(SnapshotKey::IdAndName("1", "a")), None);
    }
}
