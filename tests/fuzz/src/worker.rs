//! The workers of the calling thread, which runs them itself.
//!
//! A run needs no other thread and no sleep. The workers are made once, because making them takes longer than most
//! runs.

use std::cell::RefCell;
use std::sync::Arc;
use vublk::io::Worker;
use vublk::io::sim::{Disorder, SimRing};

thread_local! {
    static WORKERS: RefCell<Vec<&'static Arc<Worker>>> = const { RefCell::new(Vec::new()) };
}

/// The thread's workers are numbered.
pub fn worker(n: usize) -> Arc<Worker> {
    WORKERS.with_borrow_mut(|workers| {
        while workers.len() <= n {
            let ring = SimRing::new(Disorder::wild(0)).expect("a simulated ring");
            let worker = Worker::driven(&format!("fuzz{}", workers.len()), ring);
            // They end with the thread.
            workers.push(Box::leak(Box::new(Arc::new(worker.expect("a worker")))));
        }
        workers[n].clone()
    })
}
