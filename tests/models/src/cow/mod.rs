//! The parts of the layer for formats with tables that are modelled.

#[path = "../../../../src/cow/ranges.rs"]
pub mod ranges;
#[path = "../../../../src/cow/record.rs"]
pub mod record;
#[path = "../../../../src/cow/table_cache.rs"]
pub mod table_cache;
#[path = "../../../../src/cow/visits.rs"]
pub mod visits;

/// For the files' own tests, which clippy compiles here too.
#[cfg(test)]
fn poll_once<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
    match future.poll(&mut std::task::Context::from_waker(std::task::Waker::noop())) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}
