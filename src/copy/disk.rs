//! A disk that is copied from or to: a node, and how its user wants it to be read and written.

use crate::block::{Node, Packed, SECTOR, WriteFlags, ZeroFlags};
use crate::io::{IoResult, IoVec};
use std::sync::Arc;

/// Asked before the first sector of a disk changes, with what the sector is going to hold.
pub type Guard = Arc<dyn Fn(&[u8]) -> IoResult + Send + Sync>;

/// A node with the habits of its user. The user's permissions are held elsewhere.
#[derive(Clone)]
pub struct Disk {
    node: Arc<Node>,
    /// The node that reads go to.
    reader: Arc<Node>,
    write_through: bool,
    guard: Option<Guard>,
}

impl Disk {
    /// The plain node.
    pub fn new(node: Arc<Node>) -> Disk {
        Disk { reader: node.clone(), node, write_through: false, guard: None }
    }

    /// Reads go to `reader`, which stands on the node.
    pub fn read_through(self, reader: Arc<Node>) -> Disk {
        Disk { reader, ..self }
    }

    /// Every write is durable before it completes.
    pub fn write_through(self, write_through: bool) -> Disk {
        Disk { write_through, ..self }
    }

    /// The first sector changes only as `guard` permits.
    pub fn guarded(self, guard: Guard) -> Disk {
        Disk { guard: Some(guard), ..self }
    }

    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.node.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub async fn read(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        self.reader.read(at, into).await
    }

    pub async fn write(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        if let Some(guard) = self.guard.as_ref().filter(|_| at < SECTOR) {
            let mut sector = [0; SECTOR as usize];
            let len = SECTOR.min(self.len());
            self.node.read(0, &IoVec::from_mut(&mut sector[..len as usize])).await?;
            from.copy_to(&mut sector[at as usize..]);
            guard(&sector)?;
        }
        let mut flags = flags;
        flags.set(WriteFlags::FUA, self.write_through || flags.contains(WriteFlags::FUA));
        self.node.write(at, from, flags).await
    }

    /// Writes compressed ([`Node::write_compressed`]).
    pub async fn write_compressed(&self, at: u64, from: &IoVec<'_>) -> IoResult {
        let flags = if self.write_through { WriteFlags::FUA } else { WriteFlags::empty() };
        self.node.write_compressed(at, from, flags).await
    }

    /// Stores what was packed from `plain` ([`Node::store_packed`]).
    pub async fn store_packed(&self, packed: &[Packed], plain: &IoVec<'_>) -> IoResult {
        self.node.store_packed(packed, plain).await?;
        if self.write_through { self.node.flush().await } else { Ok(()) }
    }

    pub async fn zero(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        let mut flags = flags;
        flags.set(ZeroFlags::FUA, self.write_through || flags.contains(ZeroFlags::FUA));
        self.node.zero(at, len, flags).await
    }
}
