//! Yielding to other tasks.

/// The models have a thread for each task.
pub async fn yield_now() {
    loom::thread::yield_now();
}
