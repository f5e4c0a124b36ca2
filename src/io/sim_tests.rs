//! Tests of the simulated ring.

use super::*;
use crate::io::{self, run_on};
use std::cell::RefCell;

fn ring(disorder: Disorder) -> Box<SimRing> {
    Box::new(SimRing::new(disorder).unwrap())
}

#[test]
fn operations_in_flight_complete_in_an_order_that_the_seed_decides() {
    let order = |seed| {
        let disorder = Disorder { short: 0.0, interrupted: 0.0, ..Disorder::wild(seed) };
        run_on(ring(disorder), async {
            let (file, done) = (tempfile::tempfile().unwrap(), Rc::default());
            let file = Rc::new(file);
            for n in 0..8u8 {
                let (file, done): (_, Rc<RefCell<Vec<u8>>>) = (file.clone(), Rc::clone(&done));
                io::current().spawn(async move {
                    let from = [n; 4];
                    let from = IoVec::from_ref(&from);
                    io::write(file.as_raw_fd(), 0, &from, Durable::No).await.unwrap();
                    done.borrow_mut().push(n);
                });
            }
            while done.borrow().len() < 8 {
                io::sleep(Duration::from_micros(50)).await;
            }
            let mut last = [0; 4];
            io::read(file.as_raw_fd(), 0, &IoVec::from_mut(&mut last)).await.unwrap();
            assert_eq!(last, [*done.borrow().last().unwrap(); 4], "effects come in that order");
            done.take()
        })
    };
    assert_eq!(order(1), order(1));
    assert!((2..10).any(|seed| order(seed) != order(1)));
}

#[test]
fn short_and_interrupted_transfers_come_out_whole() {
    let disorder = Disorder { short: 0.9, interrupted: 0.3, ..Disorder::wild(7) };
    run_on(ring(disorder), async {
        let file = tempfile::tempfile().unwrap();
        let from: Vec<u8> = (0..10_000).map(|n| n as u8).collect();
        let mut into = vec![9; 12_000];
        io::write(file.as_raw_fd(), 3, &IoVec::from_ref(&from), Durable::No).await.unwrap();
        let (a, b) = into.split_at_mut(777);
        let list = IoVec::concat(&[&IoVec::from_mut(a), &IoVec::from_mut(b)]);
        io::read(file.as_raw_fd(), 3, &list).await.unwrap();
        assert_eq!(into[..10_000], from);
        assert!(into[10_000..].iter().all(|&b| b == 0), "past the end are zeroes");
    });
}

#[test]
fn the_virtual_clock_jumps_and_threads_wake_the_worker() {
    let began = Instant::now();
    run_on(ring(Disorder::wild(3)), async {
        io::sleep(Duration::from_secs(100_000)).await;
        assert_eq!(io::offload(|| 7).await, 7);
        assert!(io::current().now() >= 100_000_000_000_000);
    });
    assert!(began.elapsed() < Duration::from_secs(50_000));
}

#[test]
fn operations_that_are_dropped_together_are_waited_for() {
    run_on(ring(Disorder::wild(5)), async {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = [[0u8; 64]; 8];
        let mut pending: Vec<_> = bytes
            .iter_mut()
            .map(|bytes| {
                let (fd, list) = (file.as_raw_fd(), IoVec::from_mut(bytes));
                Box::pin(async move { io::read(fd, 0, &list).await })
            })
            .collect();
        std::future::poll_fn(|cx| {
            for future in &mut pending {
                let _ = future.as_mut().poll(cx);
            }
            std::task::Poll::Ready(())
        })
        .await;
        drop(pending);
    });
}

/// A source that is polled all the time and never has anything.
struct Idle;

impl io::Source for Idle {
    fn poll(&mut self, _: &Rc<io::Io>, _: io::SourceId) -> io::Polled {
        io::Polled::Idle
    }
    fn has_work(&self) -> bool {
        false
    }
    fn complete(&mut self, _: &Rc<io::Io>, _: u32, _: io::IoResult) {}
    fn publish(&mut self) {}
    fn arm(&mut self) -> bool {
        true
    }
    fn disarm(&mut self) {}
}

#[test]
fn a_source_without_kicks_does_not_make_timers_late() {
    let late = io::run_local(ring(Disorder::wild(1)), |local| {
        local.attach(Box::new(Idle), None);
        async {
            let before = io::current().now();
            io::sleep(Duration::from_micros(50)).await;
            io::current().now() - before
        }
    });
    assert!((50_000..100_000).contains(&late), "it slept for {late} ns");
}
