//! Tests with a misbehaving controller, which costs errors but neither panics nor hangs.

use crate::fixture::{Disk, Guest, options, pattern, segments};
use std::time::{Duration, Instant};
use vublk_vfio::fake::{Config, Fake};
use vublk_vfio::{Controller, Done, Options};

#[test]
fn whatever_a_controller_completes_the_driver_comes_to_an_end() {
    let seed = std::env::var("VUBLK_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = seed.map_or(1..9, |seed: u64| seed..seed + 1);
    for seed in seeds {
        eprintln!("VUBLK_SEED={seed}");
        misbehave(seed);
    }
}

fn misbehave(seed: u64) {
    let mut disk = Disk::new(Config { max_entries: 16, ..Config::default() });
    let guest = Guest::new(64 << 10);
    let lists: Vec<_> = (0..64).map(|n| [guest.iovec(n * 1024, 512)]).collect();
    disk.fake.go_rogue(&pattern(seed, 600));
    for (n, list) in (0..).zip(&lists) {
        disk.pair.submit(disk.namespace.read(n * 512, 512, segments(list), n));
        disk.pair.ring();
    }
    // Each request ends once, whatever the controller says, even if that takes its death.
    let mut ends = [0; 64];
    let began = Instant::now();
    let mut ticked = Instant::now();
    while disk.pair.in_flight() > 0 {
        let mut note = |Done { token, .. }| ends[token as usize] += 1;
        disk.pair.reap(&mut note);
        if ticked.elapsed() >= Duration::from_millis(20) {
            disk.pair.tick(&mut note);
            ticked = Instant::now();
        }
        disk.pair.ring();
        assert!(began.elapsed() < Duration::from_secs(60), "seed {seed}: it hangs: {ends:?}");
        std::thread::sleep(Duration::from_micros(50));
    }
    assert_eq!(ends, [1; 64], "seed {seed}");
}

#[test]
fn events_without_end_keep_nobody_from_working() {
    let fake = Fake::new(Config::default());
    let options = Options { check_interval: Duration::from_millis(5), ..options() };
    let controller = Controller::open(fake.function(), &options).unwrap();
    for n in 0..200 {
        fake.resize(1, 1000 + n % 2);
    }
    assert!(controller.namespace(1).is_ok());
}
