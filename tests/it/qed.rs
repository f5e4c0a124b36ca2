//! Crashes of a machine with a QED image open: the next opening repairs it, and each sector holds what was last flushed
//! or something written since.

use crate::disks::{crashes, seed, simulated};
use crate::qcow2::sim::{Image, disk, passing};
use std::process::Command;
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, IoVec};
use vublk::protocol::sim::SimOptions;

const LEN: u64 = 64 << 10;
const SECTORS: usize = (LEN / SECTOR) as usize;
/// Bytes that the image's file may have.
const MOST: u64 = 1 << 20;

/// A new image's file.
fn image(options: &str) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qed", "-o", options]).arg(file.path());
    assert!(command.arg(LEN.to_string()).status().unwrap().success());
    std::fs::read(file.path()).unwrap()
}

/// Requests are whole sectors: a transfer that comes out short tears none.
fn sectors(options: &mut SimOptions) {
    options.traits.request_align = 512;
}

fn over(options: &str) -> String {
    format!("driver=qed,discard=unmap,file.{}", options.replace(',', ",file."))
}

/// What each sector may hold: the number of the write that is durable, and of those after it.
type Allowed = Vec<Vec<u8>>;

/// Writes, zeroes, discards and flushes at random. Returns, for each length of the log, what may be found from there on.
async fn work(image: &Image, seed: u64, changes: impl Fn() -> usize) -> Vec<(usize, Allowed)> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut allowed = vec![vec![0]; SECTORS];
    let mut history = vec![(0, allowed.clone())];
    for number in 1..=70u8 {
        let first = rng.usize(0..SECTORS);
        let count = rng.usize(1..=(SECTORS - first).min(24));
        let (at, len) = (first as u64 * SECTOR, count as u64 * SECTOR);
        let sectors = first..first + count;
        let value = if number % 4 == 0 { 0 } else { number };
        allowed[sectors].iter_mut().for_each(|sector| sector.push(value));
        history.push((changes(), allowed.clone()));
        match number % 8 {
            0 => image.node.zero(at, len, ZeroFlags::UNMAP).await.unwrap(),
            4 => image.node.zero(at, len, ZeroFlags::empty()).await.unwrap(),
            _ => {
                let bytes = vec![value; len as usize];
                image.node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
            }
        }
        if rng.u8(0..5) == 0 {
            image.node.flush().await.unwrap();
            for sector in &mut allowed {
                *sector = vec![*sector.last().unwrap()];
            }
        }
        history.push((changes(), allowed.clone()));
        io::sleep(Duration::from_micros(10)).await;
    }
    history
}

/// What the disk holds after it was opened to be written, which repairs it, and closed; and the file then.
fn reopened(state: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let orderly = Disorder { seed: 1, max_delay: Duration::ZERO, short: 0.0, interrupted: 0.0 };
    let (disk, options) = passing(state, MOST, sectors);
    let (sender, receiver) = std::sync::mpsc::channel();
    simulated(orderly, |_| async move {
        let image = Image::open(&over(&options)).await;
        let mut found = vec![0xff; LEN as usize];
        image.node.read(0, &IoVec::from_mut(&mut found)).await.unwrap();
        let mut say = |line: &str| panic!("{line}");
        let checked = image.node.driver().image().unwrap().check(Fix::Nothing, &mut say).await;
        let checked = checked.unwrap();
        assert_eq!((checked.corruptions, checked.check_errors), (0, 0));
        image.close().await;
        sender.send(found).unwrap();
    });
    (receiver.recv().unwrap(), disk.bytes())
}

#[test]
fn what_was_flushed_survives_every_crash_of_a_qed_image() {
    let seed = seed();
    for (n, options) in
        ["cluster_size=4k,table_size=2", "cluster_size=8k,table_size=2"].iter().enumerate()
    {
        let (disk, name) = disk(&image(options), MOST, |options| {
            options.log = true;
            sectors(options);
        });
        let (sender, receiver) = std::sync::mpsc::channel();
        let log_of = disk.clone();
        simulated(Disorder::wild(seed), |_| async move {
            let image = Image::open(&over(&name)).await;
            let history = work(&image, seed + n as u64, || log_of.log().changes().len()).await;
            image.close().await;
            sender.send(history).unwrap();
        });
        let history = receiver.recv().unwrap();
        let log = disk.log();
        let mut tried = 0;
        for crash in log.crashes(seed, crashes(8)) {
            let known = history.iter().rev().find(|(from, _)| *from <= crash.prefix);
            let (_, allowed) = known.expect("the first holds from the beginning");
            let (found, file) = reopened(&log.image(&crash));
            for (n, sector) in found.chunks(SECTOR as usize).enumerate() {
                let whole = sector.iter().all(|&byte| byte == sector[0]);
                assert!(
                    whole && allowed[n].contains(&sector[0]),
                    "seed {seed}, {options}, after {} changes: sector {n} holds {}, not one of {:?}",
                    crash.prefix,
                    sector[0],
                    allowed[n]
                );
            }
            if tried % 100 == 0 {
                let kept = tempfile::NamedTempFile::new().unwrap();
                std::fs::write(kept.path(), &file).unwrap();
                let checked =
                    Command::new("qemu-img").args(["check", "-f", "qed"]).arg(kept.path()).output();
                let code = checked.unwrap().status.code();
                assert!(matches!(code, Some(0 | 3)), "qemu-img check: {code:?}");
            }
            tried += 1;
        }
        assert!(tried > 200, "only {tried} crashes were tried");
    }
}
