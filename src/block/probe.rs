//! Probing: guessing the format of a file from its first bytes.
//!
//! Nothing probes by default: see [`OpenPolicy`](super::OpenPolicy).

use super::registry::{DriverEntry, PROBE_LEN, Registry};
use super::{Error, Node};
use crate::io::IoVec;

/// The format that the first bytes of `node` tell; `filename` is how it is called. None: there are no bytes, or no
/// format that can be recognised.
///
/// # Errors
/// It cannot be read.
pub async fn guess(
    registry: &'static Registry,
    node: &Node,
    filename: &str,
) -> Result<Option<&'static DriverEntry>, Error> {
    let len = (PROBE_LEN as u64).min(node.len());
    let mut head = [0; PROBE_LEN];
    let head = &mut head[..len as usize];
    if len > 0 {
        node.read(0, &IoVec::from_mut(head))
            .await
            .map_err(|e| Error::os("Could not read image for determining its format", e))?;
    }
    Ok(registry.probe(head, filename))
}

/// The format of what is in `node`, a protocol's; `filename` is how it is called. What no format
/// knows is raw ([`DriverEntry::is_raw`]).
///
/// # Errors
/// It cannot be read, or no format takes it.
pub async fn probe(
    registry: &'static Registry,
    node: &Node,
    filename: &str,
) -> Result<&'static DriverEntry, Error> {
    let found = guess(registry, node, filename).await?;
    found.ok_or_else(|| Error::new("Could not determine image format: No compatible driver found"))
}
