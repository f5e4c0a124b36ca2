//! A mutex that may be held across an await.

use crate::io::sync::{Mutex, Waiters};

/// A mutex for tasks: the holder takes the value out, and its guard puts it back.
pub struct Lock<T> {
    state: Mutex<LockState<T>>,
}

struct LockState<T> {
    /// None while a task holds it.
    value: Option<T>,
    waiting: Waiters,
}

/// The value of a [`Lock`], until this is dropped.
pub struct LockGuard<'a, T> {
    lock: &'a Lock<T>,
    /// Some, until it is dropped.
    value: Option<T>,
}

impl<T> Lock<T> {
    pub fn new(value: T) -> Lock<T> {
        Lock { state: Mutex::new(LockState { value: Some(value), waiting: Waiters::new() }) }
    }

    /// The guard, if the lock is free.
    pub fn try_lock(&self) -> Option<LockGuard<'_, T>> {
        let value = self.state.lock().value.take()?;
        Some(LockGuard { lock: self, value: Some(value) })
    }

    pub async fn lock(&self) -> LockGuard<'_, T> {
        let value = self.state.wait_for(|state| state.value.take().ok_or(&mut state.waiting)).await;
        LockGuard { lock: self, value: Some(value) }
    }
}

impl<T> std::ops::Deref for LockGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.value.as_ref().expect("it is put back when the guard is dropped")
    }
}

impl<T> std::ops::DerefMut for LockGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("it is put back when the guard is dropped")
    }
}

impl<T> Drop for LockGuard<'_, T> {
    fn drop(&mut self) {
        let mut state = self.lock.state.lock();
        state.value = self.value.take();
        let waiting = state.waiting.take();
        drop(state);
        // Every waiter is woken: one whose task is gone must not keep the others waiting.
        waiting.wake();
    }
}
