//! Fuzzing a qcow2 image whose snapshots are listed, made, applied, shown and deleted.
//!
//! Arbitrary bytes are changed. There must be no panic and an end, and an image that was sound stays so.

use super::image;
use super::input::Input;
use std::sync::LazyLock;
use std::time::Duration;
use vublk::block::{Fix, NewSnapshot, Node, SnapshotKey, Snapshots, WriteFlags};
use vublk::format::qcow2::snapshots::Snapshot;
use vublk::io::IoVec;

const NAMES: [&str; 4] = ["one", "two", "3", ""];

/// Images with two snapshots, and their disk changed since.
static IMAGES: LazyLock<[Vec<u8>; 3]> = LazyLock::new(|| {
    [
        "cluster_size=512,refcount_bits=2",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=1k,compat=0.10",
    ]
    .map(|options| {
        image::put(image::create(&format!("{options},size=100k")).leak());
        let made = image::with_qcow2(async |node| {
            for (n, name) in NAMES[..2].iter().enumerate() {
                let bytes = vec![n as u8 + 1; 40_000];
                let from = IoVec::from_ref(&bytes);
                node.write(n as u64 * 7000, &from, WriteFlags::empty()).await.expect("room");
                snapshots(node).create(new(name)).await?;
            }
            Ok(())
        });
        made.expect("snapshots");
        image::bytes()
    })
});

fn new(name: &str) -> NewSnapshot<'_> {
    NewSnapshot { name, date: Duration::from_secs(1), icount: None }
}

fn snapshots(node: &Node) -> &dyn Snapshots {
    node.driver().image().and_then(|image| image.snapshots()).expect("qcow2 has snapshots")
}

/// Changes one of the images as the input says, and works on its snapshots.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    entry(&mut input);
    let disk = image::put(&IMAGES[input.below(3) as usize]);
    let changes = input.u8() % 6;
    for _ in 0..changes {
        let words = disk.len() / 8;
        let table = u64::from_be_bytes(disk.get(64));
        let at = match input.one_in(2) {
            // Around the snapshot table.
            true => (table / 8 + input.below(32)).min(words - 1),
            false => input.below(words),
        } * 8;
        let value = match input.u8() % 3 {
            0 => input.edgy(),
            1 => 1 << 63 | input.below(1 << 10) << 9,
            _ => input.below(1 << 19),
        };
        disk.put(at, &value.to_be_bytes());
    }
    let steps: Vec<(u8, usize)> =
        (0..1 + input.u8() % 5).map(|_| (input.u8() % 4, input.below(4) as usize)).collect();
    let is_sound = changes == 0;
    let worked = image::with_qcow2(async move |node| {
        for (step, name) in steps {
            let (snapshots, name) = (snapshots(node), NAMES[name]);
            let _ = snapshots.list();
            let _ = match step {
                0 => snapshots.create(new(name)).await.map(drop),
                1 => snapshots.delete(SnapshotKey::Name(name)).await.map(drop),
                2 => snapshots.apply(SnapshotKey::IdOrName(name)).await,
                _ => {
                    let bytes = vec![9; 20_000];
                    let from = IoVec::from_ref(&bytes);
                    // A damaged image refuses it.
                    let _ = node.write(3000, &from, WriteFlags::empty()).await;
                    Ok(())
                }
            };
        }
        Ok(())
    });
    if is_sound {
        worked.expect("the image is sound");
        let checked = image::with_qcow2(async |node| {
            let mut said = String::new();
            let mut say = |line: &str| said += line;
            let image = node.driver().image().expect("an image");
            let report = image.check(Fix::Nothing, &mut say).await?;
            assert_eq!(
                (report.corruptions, report.leaks, report.check_errors),
                (0, 0, 0),
                "{said}"
            );
            Ok(())
        });
        checked.expect("it is checked");
    }
}

/// What is read as an entry is written so that the same is read again. It may be shorter: a name ends at
/// its first NUL byte.
fn entry(input: &mut Input) {
    let mut bytes = vec![0; 40 + input.below(80) as usize];
    for _ in 0..input.u8() % 8 {
        let at = input.below(bytes.len() as u64) as usize;
        bytes[at] = input.u8();
    }
    if let Some((mut snapshot, len)) = Snapshot::parse(&bytes) {
        let written = snapshot.encode();
        assert_eq!(Snapshot::parse(&written), Some((snapshot.clone(), written.len())));
        assert!(written.len() <= len);
        let reported = snapshot.info();
        snapshot.complete(1 << 20);
        assert_eq!((snapshot.info(), snapshot.is_complete()), (reported, true));
    }
}
