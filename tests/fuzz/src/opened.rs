//! Images of any format, opened on a simulated disk, read, and written where the format is.
//!
//! The calling thread does all of it.

use super::image::disk_name;
use super::input::Input;
use super::worker::worker;
use std::time::Duration;
use vublk::block::{Error, Fix, Graph, Perm, Perms, Registry, WriteFlags, ZeroFlags};
use vublk::io::sim::Disorder;
use vublk::io::{Errno, IoResult, IoVec};
use vublk::options::keyval;
use vublk::protocol::sim::{SimDisk, SimOptions};

/// Bytes by which an image can grow.
const ROOM: u64 = 1 << 20;
/// Requests to an image that can be opened.
const REQUESTS: u8 = 6;

/// What a request does.
#[derive(Clone, Copy)]
enum What {
    Read,
    Write,
    Zero,
    Discard,
}

/// Changes some of an image's words, mostly near its beginning or its end, and cuts it at times. Numbers are of either
/// order of bytes.
pub fn damage(image: &mut Vec<u8>, input: &mut Input) {
    for _ in 0..input.u8() % 8 {
        let reach = if input.one_in(3) { image.len() } else { image.len().min(600) } as u64;
        let at = input.below(reach) as usize;
        let at = if input.one_in(2) { at } else { image.len() - 1 - at };
        let value = input.edgy();
        let bytes = if input.one_in(2) { value.to_le_bytes() } else { value.to_be_bytes() };
        let bytes = &bytes[..1 << input.below(4)];
        image[at..].iter_mut().zip(bytes).for_each(|(to, &from)| *to = from);
    }
    if input.one_in(8) {
        image.truncate(input.below(1 + image.len() as u64) as usize);
    }
}

/// Opens an image, reads parts of it, changes some if that is asked for, and checks it. An error is one line.
pub fn work(registry: &'static Registry, driver: &'static str, image: &[u8], input: &mut Input) {
    let writes = ["parallels", "qcow", "vmdk"].contains(&driver);
    let options = SimOptions { at_once: true, ..SimOptions::new(image.len() as u64) };
    let options = SimOptions { max_len: image.len() as u64 + ROOM, ..options };
    let name = disk_name();
    SimDisk::holding(options, image).publish(&name);
    let kinds = if writes {
        &[What::Read, What::Write, What::Zero, What::Discard][..]
    } else {
        &[What::Read]
    };
    let requests: Vec<(What, u64, u64)> = (0..input.u8() % REQUESTS)
        .map(|_| (input.pick(kinds), input.edgy(), input.below(9000)))
        .collect();
    let calm =
        Disorder { seed: 1, max_delay: Duration::from_micros(50), short: 0.0, interrupted: 0.0 };
    let opened = name.clone();
    let result = worker(0).drive(calm, move |_| async move {
        open_and_work(registry, driver, writes, &opened, requests).await
    });
    SimDisk::withdraw(&name);
    if let Err(error) = result {
        assert_line(&error.to_string());
    }
}

fn assert_line(shown: &str) {
    assert!(!shown.contains('\n') && shown.len() < 2000, "{shown:?}");
}

async fn open_and_work(
    registry: &'static Registry,
    driver: &str,
    writes: bool,
    disk: &str,
    requests: Vec<(What, u64, u64)>,
) -> Result<(), Error> {
    let read_only = if writes { "off" } else { "on" };
    let options = format!(
        "driver={driver},read-only={read_only},discard=unmap,file.driver=sim,file.disk={disk},node-name=image"
    );
    let options = keyval::parse(&options, None).expect("well-formed options").options;
    let graph = Graph::new(registry);
    let node = graph.open(options).await?;
    let written = if writes { Perm::WRITE } else { Perm::empty() };
    let perms = Perms { held: Perm::CONSISTENT_READ | written, shared: Perm::all() };
    let hold = graph.attach(&node, "a fuzz target", perms, None)?;
    for (what, at, len) in requests {
        let at = at % node.len().max(1);
        let len = len.min(node.len() - at);
        let mut bytes = vec![7; len as usize];
        // A damaged image may fail all of them.
        let _: IoResult = match what {
            What::Read => node.read(at, &IoVec::from_mut(&mut bytes)).await,
            What::Write => node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await,
            What::Zero => node.zero(at, len, ZeroFlags::UNMAP).await,
            What::Discard => node.discard(at, len).await,
        };
    }
    let checked = match node.driver().image() {
        Some(image) => image.check(Fix::Nothing, &mut assert_line).await.map(drop),
        None => Ok(()),
    };
    drop(node);
    hold.detach().await;
    graph.close().await;
    match checked {
        Err(error) if error.errno() != Some(Errno::ENOTSUP) => Err(error),
        _ => Ok(()),
    }
}

/// A zlib stream that has these bytes as they are.
pub fn stored_zlib(bytes: &[u8]) -> Vec<u8> {
    let len = bytes.len() as u16;
    let (mut a, mut b) = (1u32, 0u32);
    for &byte in bytes {
        a = (a + u32::from(byte)) % 65521;
        b = (b + a) % 65521;
    }
    let mut stream = vec![0x78, 1, 1];
    stream.extend(len.to_le_bytes());
    stream.extend((!len).to_le_bytes());
    stream.extend(bytes);
    stream.extend((b << 16 | a).to_be_bytes());
    stream
}
