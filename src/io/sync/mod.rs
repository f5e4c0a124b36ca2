//! The counted mutex, and the list of tasks that wait for what it guards.

mod mutex;
mod waiters;

pub use mutex::{Mutex, locks_taken};
pub use waiters::Waiters;
