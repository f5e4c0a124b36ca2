//! The jobs of a service: tasks on its control executor.

use super::Service;
use crate::block::{Error, Graph};
use crate::job::{Job, Jobs, NewJob, Task};
use std::sync::Arc;

impl Service {
    pub fn jobs(&self) -> &Jobs {
        &self.0.jobs
    }

    /// Starts a job that works on the graph.
    ///
    /// # Errors
    /// Its name is taken, or none.
    pub fn start_job<F>(
        &self,
        new: NewJob,
        work: impl FnOnce(Graph, Arc<Job>) -> F + Send + 'static,
    ) -> Result<(), Error>
    where
        F: Future<Output = Result<(), Error>> + 'static,
    {
        let graph = self.graph().clone();
        // Nobody waits for the task itself: the job reports its end.
        let name = new.kind.name();
        let spawn = |task: Task| drop(self.0.executor.spawn(name, task));
        self.0.jobs.start(new, spawn, move |job| work(graph, job))
    }
}
