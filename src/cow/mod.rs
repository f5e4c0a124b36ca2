//! What formats stand on that map a disk's clusters through tables.

mod format;
mod lock;
mod lookup;
mod padded;
mod ranges;
mod read;
mod references;
mod status;
mod table_cache;
mod tables;
mod top_table;
mod traits;
mod visits;

pub use format::{Format, announce, backing, data, file};
pub use lock::{Lock, LockGuard};
pub use lookup::{BadEntryOf, Compressed, Found, Piece, find, lookup, piece, pin, pin_empty};
pub use padded::read_padded;
pub use ranges::{RangeGuard, Ranges};
pub use read::{decider, fast_read, map_data, read_range};
pub use references::References;
pub use status::{status, stored_status};
pub use table_cache::{Pinned, SliceNo, TableCache, TableEntry};
pub use tables::{Shape, Tables};
pub use top_table::{TopEntry, TopTable};
pub use traits::traits_over;
pub use visits::{Visit, Visits};

/// The result of a future that is ready.
#[cfg(test)]
fn poll_once<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
    match future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}
