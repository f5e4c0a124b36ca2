//! A gate that many may pass at once or one alone, held across awaits and unfair.

use crate::io::sync::{Mutex, Waiters};

#[derive(Default)]
pub struct Gate(Mutex<State>);

#[derive(Default)]
struct State {
    inside: usize,
    /// Somebody is alone inside, or waits until the others have left; nobody else enters.
    closed: bool,
    waiting: Waiters,
}

/// One of many, until it is dropped.
pub struct Inside<'a>(&'a Gate);

/// The only one, until it is dropped.
pub struct Alone<'a>(&'a Gate);

impl Gate {
    pub async fn enter(&self) -> Inside<'_> {
        self.0
            .wait_for(|state| {
                if state.closed {
                    return Err(&mut state.waiting);
                }
                state.inside += 1;
                Ok(Inside(self))
            })
            .await
    }

    pub async fn alone(&self) -> Alone<'_> {
        let mut mine: Option<Alone<'_>> = None;
        self.0
            .wait_for(|state| {
                if mine.is_none() && !state.closed {
                    state.closed = true;
                    mine = Some(Alone(self));
                }
                if state.inside > 0 {
                    return Err(&mut state.waiting);
                }
                mine.take().ok_or(&mut state.waiting)
            })
            .await
    }

    fn leave(&self, how: impl FnOnce(&mut State)) {
        let mut state = self.0.lock();
        how(&mut state);
        let waiting = state.waiting.take();
        drop(state);
        // All of them: one that is gone must not keep the others from their turn.
        waiting.wake();
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.leave(|state| state.inside -= 1);
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.0.leave(|state| state.closed = false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn one_is_alone_when_the_others_have_left_and_keeps_more_from_coming() {
        let gate = Gate::default();
        let mut cx = Context::from_waker(Waker::noop());
        let mut enter = || {
            let mut entering = Box::pin(gate.enter());
            match entering.as_mut().poll(&mut cx) {
                Poll::Ready(inside) => Some(inside),
                Poll::Pending => None,
            }
        };
        let (first, second) = (enter().unwrap(), enter().unwrap());
        let mut cx = Context::from_waker(Waker::noop());
        {
            let mut alone = pin!(gate.alone());
            assert!(alone.as_mut().poll(&mut cx).is_pending());
            assert!(enter().is_none());
            drop(first);
            assert!(alone.as_mut().poll(&mut cx).is_pending());
            drop(second);
            let alone = alone.as_mut().poll(&mut cx);
            assert!(alone.is_ready() && enter().is_none());
            let mut other = pin!(gate.alone());
            assert!(other.as_mut().poll(&mut cx).is_pending());
            drop(alone);
            assert!(other.as_mut().poll(&mut cx).is_ready());
        }
        let inside = enter().unwrap();
        {
            // One that gives up waiting opens the gate again.
            let mut alone = pin!(gate.alone());
            assert!(alone.as_mut().poll(&mut cx).is_pending());
        }
        assert!(enter().is_some());
        drop(inside);
    }
}
