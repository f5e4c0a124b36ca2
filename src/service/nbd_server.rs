//! The NBD server of a service: its start and its end, and exports as older commands make them.

use super::{NewExport, Service};
use crate::block::{Error, Node};
use crate::export::Reading;
use crate::export::core::{DiskOptions, FailureOptions};
use crate::export::nbd::{Options, Server, ServerOptions};
use std::sync::Arc;

impl Service {
    /// What options of exports refer to. `common` is what all types have.
    pub(super) fn reading<'a>(&'a self, common: &'a [&'a str]) -> Reading<'a> {
        Reading { common, graph: self.graph(), nbd: self.nbd() }
    }

    pub fn nbd(&self) -> &Server {
        &self.0.nbd
    }

    /// `nbd-server-start`. It listens on the control executor, which runs this.
    ///
    /// # Errors
    /// It runs already, or a socket cannot be had.
    pub async fn nbd_start(&self, options: ServerOptions) -> Result<(), Error> {
        self.nbd().start(options).await
    }

    /// `nbd-server-stop`: ends all exports of the server, and the server.
    ///
    /// # Errors
    /// It does not run.
    pub async fn nbd_stop(&self) -> Result<(), Error> {
        self.nbd().check_running()?;
        self.nbd().stop();
        let ids = self.exports().into_iter().filter(|export| export.type_name == "nbd");
        for id in ids.filter(|export| !export.shutting_down).map(|export| export.id) {
            // One that has ended meanwhile is what is wanted.
            let _ = self.export_del(&id, true).await;
        }
        Ok(())
    }

    /// Serves a node over NBD as the export `id`, by the service's main worker.
    ///
    /// # Errors
    /// As of other exports.
    pub async fn nbd_export(
        &self,
        id: String,
        node: Arc<Node>,
        writable: bool,
        options: Options,
    ) -> Result<(), Error> {
        self.nbd().check_running()?;
        self.state().exports.check_id(&id)?;
        let failures = FailureOptions::default();
        let new = NewExport {
            id,
            node,
            disk: DiskOptions { writable, write_through: false, failures },
            transport: Box::new(options),
            workers: vec![self.main_worker().await?],
            allow_inactive: false,
            accept_loss: false,
        };
        self.export(new).await
    }
}
