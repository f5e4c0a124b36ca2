//! The requests of an export that are in flight, by worker, and the pause of all of them.
//!
//! A request enters its worker's lane before it touches the graph and leaves it when it does not any more, before its
//! reply is sent: a client that does not read holds up no change of the graph.

use crate::io::sync::{Mutex, Waiters};
use std::sync::Arc;

/// Requests of one export, a lane for each worker.
pub(super) struct Lanes(Box<[Lane]>);

/// Cache lines of its own: only its worker writes to it, unless there is a pause.
#[derive(Default)]
#[repr(align(128))]
struct Lane(Mutex<State>);

#[derive(Default)]
struct State {
    /// How many want nothing to enter.
    paused: u32,
    in_flight: usize,
    /// Tasks that wait for another count of these two.
    waiting: Waiters,
}

/// A request in its lane, until it is dropped.
pub(super) struct Entered {
    lanes: Arc<Lanes>,
    lane: usize,
}

impl Lanes {
    pub fn new(count: usize) -> Lanes {
        Lanes((0..count).map(|_| Lane::default()).collect())
    }

    /// Waits until there is no pause.
    pub async fn enter(self: &Arc<Lanes>, lane: usize) -> Entered {
        let enter = |state: &mut State| match state.paused {
            0 => {
                state.in_flight += 1;
                Ok(())
            }
            _ => Err(()),
        };
        let mutex = &self.0[lane].0;
        mutex.wait_for(|state| enter(state).map_err(|()| &mut state.waiting)).await;
        Entered { lanes: self.clone(), lane }
    }

    /// Lets nothing enter any more.
    pub fn pause(&self) {
        self.0.iter().for_each(|lane| lane.0.lock().paused += 1);
    }

    /// Takes one pause back.
    pub fn resume(&self) {
        for lane in &self.0 {
            let waiting = {
                let mut state = lane.0.lock();
                state.paused -= 1;
                state.waiting.take()
            };
            waiting.wake();
        }
    }

    /// Waits until nothing is in flight.
    pub async fn at_rest(&self) {
        for lane in &self.0 {
            let is_empty = |state: &mut State| if state.in_flight == 0 { Ok(()) } else { Err(()) };
            lane.0.wait_for(|state| is_empty(state).map_err(|()| &mut state.waiting)).await;
        }
    }

    /// Requests in flight.
    pub fn count(&self) -> usize {
        self.0.iter().map(|lane| lane.0.lock().in_flight).sum()
    }

    /// Requests in flight on one worker.
    pub fn count_on(&self, lane: usize) -> usize {
        self.0[lane].0.lock().in_flight
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.lanes.0[self.lane].0.lock();
            state.in_flight -= 1;
            match state.in_flight {
                0 => state.waiting.take(),
                _ => Waiters::new(),
            }
        };
        waiting.wake();
    }
}
