//! Nodes in temporary use: named nodes, or nodes that are opened for the purpose and closed afterwards.

use super::{Attachment, By, Graph};
use crate::block::depth::Depth;
use crate::block::open::{Inherited, no_reference};
use crate::block::{Error, Node, Perm, Perms};
use crate::options::NodeRef;
use std::sync::Arc;

impl Graph {
    /// Attaches a user to the node that a reference names, or to one that it describes, which ends when its last user
    /// has gone ([`Graph::tidy`]). `path` is where the reference is in the user's options. Nothing of the user may be
    /// in flight but within [`Graph::undisturbed`]. Runs on a worker.
    ///
    /// # Errors
    /// Of opening, or as of [`Graph::attach`].
    pub async fn borrow(
        &self,
        reference: NodeRef,
        path: &str,
        what: &str,
        perms: Perms,
    ) -> Result<Attachment, Error> {
        let options = match reference {
            NodeRef::Name(name) => {
                let node = self.find(&name).map_err(|_| no_reference(&name))?;
                return self.attach(&node, what, perms, None);
            }
            NodeRef::Inline(options) => options,
        };
        let id = self.next_id();
        let node = self
            .opening(async |claim| {
                let by = By::User { id, what: what.into(), user: None };
                let inherited = Some(Inherited::by(by, perms));
                let (options, path) = (options.clone(), path.to_owned());
                self.open_node(options, path, inherited, Depth::TOP, claim.id).await
            })
            .await?;
        Ok(Attachment { graph: self.clone(), id, node })
    }

    /// Borrows a node ([`Graph::borrow`]) to make a new image on it, as QMP's `blockdev-create` does.
    ///
    /// # Errors
    /// As of [`Graph::borrow`].
    pub async fn borrow_for_image(
        &self,
        reference: NodeRef,
        path: &str,
    ) -> Result<Attachment, Error> {
        let held = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
        let perms = Perms { held, shared: Perm::all() };
        self.borrow(reference, path, "an unnamed block device", perms).await
    }

    /// Works on a node while nobody else changes it, or what is around it. The work only reads from `sources`, which
    /// nobody changes meanwhile.
    ///
    /// # Errors
    /// The node has left the graph.
    pub async fn undisturbed<T>(
        &self,
        node: &Arc<Node>,
        sources: &[Arc<Node>],
        work: impl AsyncFnOnce() -> T,
    ) -> Result<T, Error> {
        let _claim = self.claim_change(std::slice::from_ref(node), sources).await?;
        Ok(work().await)
    }
}
