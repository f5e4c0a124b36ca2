//! The soak: a real guest under load, whose disks and daemon go through every event of production.
//!
//! A seed gives the order of events; `SOAK_SECONDS` is the duration. The verdict in the end counts what was done and
//! what went wrong. The logs of a run that failed are kept.

#[allow(dead_code, reason = "shared with tests/it, which uses more of it")]
#[path = "../it/guest/boot.rs"]
mod boot;
mod chain;
#[allow(dead_code, reason = "shared with tests/it, which uses more of it")]
#[path = "../it/monitor/client.rs"]
mod client;
mod daemon;
#[allow(dead_code, reason = "shared with tests/it, which uses more of it")]
#[path = "../it/guest/server.rs"]
mod server;
mod steps;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use steps::Step;
use world::World;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: a number")))
}

#[test]
fn a_guest_keeps_its_data_through_all_that_production_does() {
    let seconds = number("SOAK_SECONDS").unwrap_or(120);
    let seed = number("VUBLK_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("VUBLK_SEED={seed} SOAK_SECONDS={seconds}");
    let mut world = World::new(Duration::from_secs(seconds));
    let ran = catch_unwind(AssertUnwindSafe(|| run(&mut world, seconds, seed)));
    println!("{}", world.table());
    match ran {
        Ok(()) => println!("PASSED"),
        Err(_) => {
            let logs = world.keep_logs();
            panic!("FAILED with VUBLK_SEED={seed}; logs in {}", logs.display());
        }
    }
}

/// A twelfth of the time; what is written grows with it, up to 4 GiB.
#[test]
fn a_warm_chain_of_images_keeps_what_four_queues_write() {
    let seconds = number("SOAK_SECONDS").unwrap_or(120) / 12;
    let seed = number("VUBLK_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("VUBLK_SEED={seed}, {seconds} s");
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let size = (seconds << 24).clamp(128 << 20, 4 << 30);
    chain::soak(&dir, size, Duration::from_secs(seconds), seed);
}

/// Every kind of step once, then as the dice fall until the time is over.
fn run(world: &mut World, seconds: u64, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let began = Instant::now();
    let mut first = Step::ALL.to_vec();
    random.shuffle(&mut first);
    while !first.is_empty() || began.elapsed().as_secs() < seconds {
        let step = first.pop().unwrap_or_else(|| Step::any(&mut random));
        std::thread::sleep(Duration::from_millis(random.u64(50..1500)));
        println!("{:8.2} {step:?}", began.elapsed().as_secs_f64());
        step.run(world, &mut random);
        world.check();
    }
    world.finish();
}
