//! Internal snapshots of nodes in use, as QMP makes and deletes them.

use super::Service;
use crate::block::{Error, NewSnapshot, Node, SnapshotInfo, SnapshotKey, Snapshots};
use crate::io::Errno;
use std::sync::Arc;
use std::time::SystemTime;

impl Service {
    /// Keeps a node's disk as it is now, under a name that no snapshot of it has.
    pub async fn create_snapshot(&self, node: &Arc<Node>, name: &str) -> Result<(), Error> {
        let work = async |snapshots: &dyn Snapshots| make(snapshots, node, name).await;
        let made = self.graph().with_snapshots(node, work).await;
        made.unwrap_or_else(|| Err(unsupported(node)))
    }

    /// Deletes a snapshot of a node's disk, which has this identifier, this name, or both. What it was.
    pub async fn delete_snapshot(
        &self,
        node: &Arc<Node>,
        id: Option<&str>,
        name: Option<&str>,
    ) -> Result<SnapshotInfo, Error> {
        let work = async |snapshots: &dyn Snapshots| delete(snapshots, node, id, name).await;
        match self.graph().with_snapshots(node, work).await {
            Some(result) => result,
            None => Err(no_list(Error::os("", Errno::ENOTSUP))),
        }
    }
}

pub(super) fn unsupported(node: &Node) -> Error {
    let (driver, name) = (node.driver().name(), node.name());
    Error::new(format!(
        "Block format '{driver}' used by device '{name}' does not support internal snapshots"
    ))
}

fn no_list(error: Error) -> Error {
    let errno = error.errno().unwrap_or(Errno::EIO);
    Error::os("Failed to get a snapshot list", errno)
}

pub(super) async fn make(snapshots: &dyn Snapshots, node: &Node, name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Err(Error::new("Name is empty"));
    }
    let device = node.name();
    if snapshots.list().map_err(no_list)?.iter().any(|one| one.name == name) {
        return Err(Error::new(format!(
            "Snapshot with name '{name}' already exists on device '{device}'"
        )));
    }
    let date = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let made = snapshots.create(NewSnapshot { name, date, icount: None }).await;
    made.map(drop).map_err(|error| {
        let errno = error.errno().unwrap_or(Errno::EIO);
        Error::os(format!("Failed to create snapshot '{name}' on device '{device}'"), errno)
    })
}

pub(super) async fn delete(
    snapshots: &dyn Snapshots,
    node: &Node,
    id: Option<&str>,
    name: Option<&str>,
) -> Result<SnapshotInfo, Error> {
    let key = match (id, name) {
        (Some(id), Some(name)) => SnapshotKey::IdAndName(id, name),
        (Some(id), None) => SnapshotKey::Id(id),
        (None, Some(name)) => SnapshotKey::Name(name),
        (None, None) => return Err(Error::new("Name or id must be provided")),
    };
    snapshots.list().map_err(no_list)?;
    snapshots.delete(key).await.map_err(|error| match error.errno() {
        Some(Errno(libc::ENOENT)) => Error::new(format!(
            "Snapshot with id '{}' and name '{}' does not exist on device '{}'",
            id.unwrap_or("null"),
            name.unwrap_or("null"),
            node.name()
        )),
        _ => error,
    })
}
