//! The mutex over loom's, with the product's list of waiting tasks.

mod mutex;
#[path = "../../../../../src/io/sync/waiters.rs"]
mod waiters;

pub use mutex::Mutex;
pub use waiters::Waiters;
