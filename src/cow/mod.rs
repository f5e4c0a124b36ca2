//! What formats stand on that map a disk's clusters through tables.

mod lock;
mod padded;
mod ranges;
mod visits;

pub use lock::{Lock, LockGuard};
pub use padded::read_padded;
pub use ranges::{RangeGuard, Ranges};
pub use visits::{Visit, Visits};

/// The result of a future that is ready.
#[cfg(test)]
fn poll_once<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
    match future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}
