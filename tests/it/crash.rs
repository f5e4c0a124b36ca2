//! Crashes of a simulated disk: flushed data is there, whatever is left of the rest.

use crate::disks::{open, seed, sim_disk, simulated};
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, IoVec};
use vublk::protocol::sim::SimOptions;

const LEN: u64 = 32 << 10;
const SECTORS: usize = (LEN / SECTOR) as usize;

/// What a sector may hold after a crash, as the user of the disk sees it: the number of the write
/// that is durable, and of those after it.
#[derive(Clone)]
struct Allowed(Vec<Vec<u8>>);

#[test]
fn what_was_flushed_survives_every_crash_of_a_raw_disk() {
    let seed = seed();
    simulated(Disorder::wild(seed), |_| async move {
        let mut options = SimOptions { log: true, ..SimOptions::new(LEN) };
        options.traits.request_align = 4096;
        let (disk, options) = sim_disk(options);
        let opened = open(&format!("driver=raw,file.{}", options.replace(",", ",file."))).await;
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut allowed = Allowed(vec![vec![0]; SECTORS]);
        // For each length of the log from which on it holds: what may be found.
        let mut history = vec![(0, allowed.clone())];
        for number in 1..=60u8 {
            let first = rng.usize(0..SECTORS);
            let count = rng.usize(1..=(SECTORS - first).min(20));
            let (at, len) = (first as u64 * SECTOR, count as u64 * SECTOR);
            let durable = rng.u8(0..6) == 0;
            // Until it has ended, it may have happened or not.
            let sectors = first..first + count;
            let value = if number % 7 == 0 { 0 } else { number };
            allowed.0[sectors.clone()].iter_mut().for_each(|sector| sector.push(value));
            history.push((disk.log().changes().len(), allowed.clone()));
            if value == 0 {
                let mut flags = ZeroFlags::empty();
                flags.set(ZeroFlags::FUA, durable);
                opened.node.zero(at, len, flags).await.unwrap();
            } else {
                let mut flags = WriteFlags::empty();
                flags.set(WriteFlags::FUA, durable);
                let bytes = vec![value; len as usize];
                opened.node.write(at, &IoVec::from_ref(&bytes), flags).await.unwrap();
            }
            if durable {
                allowed.0[sectors].iter_mut().for_each(|sector| *sector = vec![value]);
            }
            if rng.u8(0..5) == 0 {
                opened.node.flush().await.unwrap();
                for sector in &mut allowed.0 {
                    *sector = vec![*sector.last().unwrap()];
                }
            }
            history.push((disk.log().changes().len(), allowed.clone()));
            io::sleep(Duration::from_micros(10)).await;
        }

        let log = disk.log();
        let mut crashes = 0;
        for crash in log.crashes(seed, crate::disks::crashes(24)) {
            crashes += 1;
            // Within a request, what was allowed before it ended.
            let known = history.iter().rev().find(|(from, _)| *from <= crash.prefix);
            let (_, allowed) = known.expect("the first holds from the beginning");
            for (n, sector) in log.image(&crash).chunks(SECTOR as usize).enumerate() {
                let whole = sector.iter().all(|&b| b == sector[0]);
                assert!(
                    whole && allowed.0[n].contains(&sector[0]),
                    "seed {seed}, after {} changes: sector {n} holds {}, not one of {:?}",
                    crash.prefix,
                    sector[0],
                    allowed.0[n]
                );
            }
        }
        assert!(crashes > 500, "only {crashes} crashes were tried");
    });
}
