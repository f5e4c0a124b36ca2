//! Requests that are dropped on their way, to images of each format that is written.
//!
//! Each sector shows what it showed or what was being written, and goes on showing it. Other requests come through, and
//! the image is sound.

use super::crash::{KINDS, Kind, sectors};
use crate::disks::{seed, simulated};
use crate::qcow2::sim::{Image, disk};
use std::future::poll_fn;
use std::task::Poll;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{IoResult, IoVec};

/// So often an image of each kind is new.
const IMAGES: u64 = 4;
/// Rounds of requests to an image, each of so many side by side. Most tables are written in the first.
const ROUNDS: u8 = 12;
const SIDE_BY_SIDE: u8 = 3;

/// Runs requests side by side. Each is dropped when it has been woken so often; then there is no result.
async fn together(requests: Vec<(u32, LocalFuture<'_, IoResult>)>) -> Vec<Option<IoResult>> {
    let mut results = vec![None; requests.len()];
    let mut running: Vec<_> = requests.into_iter().map(Some).collect();
    poll_fn(|cx| {
        for (request, result) in running.iter_mut().zip(&mut results) {
            let Some((left, future)) = request else { continue };
            match future.as_mut().poll(cx) {
                Poll::Ready(ended) => (*result, *request) = (Some(ended), None),
                Poll::Pending if *left == 0 => *request = None,
                Poll::Pending => *left -= 1,
            }
        }
        match running.iter().all(Option::is_none) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
    results
}

/// What the areas hold, sector by sector.
async fn shown(kind: &Kind, image: &Image) -> Vec<u8> {
    let mut found = Vec::new();
    for &area in kind.areas {
        let mut bytes = vec![0xee; kind.area as usize];
        image.node.read(area, &IoVec::from_mut(&mut bytes)).await.unwrap();
        found.extend(bytes);
    }
    found
}

/// Returns what the areas hold at the end, and how many requests were dropped.
async fn work(kind: &Kind, image: &Image, seed: u64, what: &str) -> (Vec<u8>, usize) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut before = shown(kind, image).await;
    let mut dropped = 0;
    for round in 0..ROUNDS {
        let mut allowed: Vec<Vec<u8>> = before.iter().map(|&byte| vec![byte]).collect();
        let (mut requests, mut places) = (Vec::new(), Vec::new());
        for n in 0..SIDE_BY_SIDE {
            let area = rng.usize(..kind.areas.len());
            let first = rng.u64(..kind.area / SECTOR);
            let count = rng.u64(1..=kind.area / SECTOR - first);
            let (at, len) = (kind.areas[area] + first * SECTOR, count * SECTOR);
            let value = 1 + round * SIDE_BY_SIDE + n;
            let kind_of_request = rng.u8(..6);
            let value = if kind_of_request < 2 { 0 } else { value };
            let start = (area as u64 * kind.area + first * SECTOR) as usize;
            places.push((start..start + len as usize, value));
            let node = image.node.clone();
            let request: LocalFuture<'_, IoResult> = Box::pin(async move {
                match kind_of_request {
                    0 => node.zero(at, len, ZeroFlags::UNMAP).await,
                    1 => node.zero(at, len, ZeroFlags::empty()).await,
                    _ => {
                        let bytes = vec![value; len as usize];
                        node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await
                    }
                }
            });
            let patience = if rng.u8(..3) == 0 { u32::MAX } else { rng.u32(..6) };
            requests.push((patience, request));
        }
        let results = together(requests).await;
        dropped += results.iter().filter(|result| result.is_none()).count();
        // A request can share a write of a table with one that is dropped, and fails with it.
        let is_alone = |n: usize| {
            places.iter().enumerate().all(|(other, (place, _))| {
                other == n || place.end <= places[n].0.start || places[n].0.end <= place.start
            })
        };
        for (n, (place, value)) in places.iter().enumerate() {
            for allowed in &mut allowed[place.clone()] {
                if results[n] == Some(Ok(())) && is_alone(n) {
                    allowed.clear();
                }
                allowed.push(*value);
            }
        }
        before = shown(kind, image).await;
        for (at, (found, allowed)) in before.iter().zip(&allowed).enumerate() {
            assert!(allowed.contains(found), "{what}, round {round}: {found} at {at}: {allowed:?}");
        }
        if rng.u8(..8) == 0 {
            image.node.flush().await.unwrap();
            assert!(
                shown(kind, image).await == before,
                "{what}, round {round}: a flush changed it"
            );
        }
    }
    (before, dropped)
}

#[test]
fn requests_that_are_dropped_leave_an_image_that_is_sound_and_shows_what_it_showed() {
    let seed = seed();
    for (n, kind) in KINDS.iter().enumerate() {
        let bytes = kind.image();
        let mut dropped = 0;
        for seed in (0..IMAGES).map(|n| seed.wrapping_mul(1000).wrapping_add(n)) {
            dropped += drop_some(kind, &bytes, seed + 100 * n as u64);
        }
        assert!(dropped > 20, "{} with {}: {dropped} dropped", kind.format, kind.options);
    }
}

/// Returns how many requests were dropped.
fn drop_some(kind: &'static Kind, bytes: &[u8], seed: u64) -> usize {
    let what = format!("seed {seed}, {} with {}", kind.format, kind.options);
    // Lost space makes a file longer.
    let (disk, name) = disk(bytes, 2 * kind.most, sectors);
    let (sender, receiver) = std::sync::mpsc::channel();
    let told = what.clone();
    simulated(Disorder::wild(seed), |_| async move {
        let image = Image::open(&kind.over(&name)).await;
        let (before, dropped) = work(kind, &image, seed, &told).await;
        image.close().await;
        let image = Image::open(&kind.over(&name)).await;
        assert!(shown(kind, &image).await == before, "{told}: it shows something else");
        image.close().await;
        sender.send(dropped).unwrap();
    });
    let checked = kind.check(&disk.bytes());
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{what}: {checked:?}");
    receiver.recv().unwrap()
}
