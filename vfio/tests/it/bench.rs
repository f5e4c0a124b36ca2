//! The driver's cost per request, reported and not asserted.
//!
//! `--nocapture` shows it; only a release build gives useful figures.

use crate::fixture::{Guest, open, segments};
use std::time::Instant;
use vublk_vfio::fake::{Config, Fake, Media};

#[test]
fn submit_and_reap() {
    let rounds = if cfg!(debug_assertions) { 300 } else { 30_000 };
    let namespaces = vec![Media::null(1 << 30, 9)];
    let fake = Fake::new(Config { namespaces, max_entries: 1024, ..Config::default() });
    let controller = open(&fake);
    let namespace = controller.namespace(1).unwrap();
    let mut pair = controller.queue_pair().unwrap();
    let guest = Guest::new(1 << 20);
    let _registration = controller.register(guest.range()).unwrap();
    controller.space().settle();
    let lists: Vec<_> = (0..32).map(|n| [guest.iovec(n * 4096, 4096)]).collect();
    let (mut driver, mut device) = (0, 0);
    for round in 0..rounds {
        let began = Instant::now();
        for (n, list) in (0..).zip(&lists) {
            pair.submit(namespace.read(
                (round * 32 + n) * 4096 % (1 << 29),
                4096,
                segments(list),
                n,
            ));
        }
        let submitted = began.elapsed();
        // The fake does its work when the doorbell is rung.
        pair.ring();
        let rung = began.elapsed();
        let mut done = 0;
        while done < 32 {
            done += pair.reap(|done| assert!(done.status.is_ok()));
        }
        let all = began.elapsed();
        driver += (all - rung + submitted).as_nanos();
        device += (rung - submitted).as_nanos();
    }
    let requests = u128::from(rounds * 32);
    println!(
        "submit and reap: {} ns; the fake itself: {} ns",
        driver / requests,
        device / requests
    );
    assert_eq!(pair.counts().bounced, 0);
}
