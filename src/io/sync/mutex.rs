//! The one mutex of the project, which counts how often it is taken.
//!
//! The test of the warm path reads the count to show that no lock is taken there. A panic while a lock is held does
//! not poison it: each critical section keeps what the lock guards consistent, and one failed request must not take
//! the others with it.

use std::cell::Cell;
use std::sync::{MutexGuard, PoisonError};

thread_local! {
    static TAKEN: Cell<u64> = const { Cell::new(0) };
}

/// How many locks this thread has taken since it began.
pub fn locks_taken() -> u64 {
    TAKEN.with(Cell::get)
}

#[derive(Debug, Default)]
pub struct Mutex<T>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub const fn new(value: T) -> Mutex<T> {
        Mutex(std::sync::Mutex::new(value))
    }

    pub fn lock(&self) -> MutexGuard<'_, T> {
        TAKEN.with(|taken| taken.set(taken.get() + 1));
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
