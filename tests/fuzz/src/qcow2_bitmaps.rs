//! Fuzzing a qcow2 image with persistent bitmaps.
//!
//! Their directory, tables or pointer are changed; the image is opened, written, its bitmaps changed in every way,
//! closed. There must be no panic, an end, and only errors of one line.

use super::image;
use super::input::Input;
use std::sync::{Arc, LazyLock};
use vublk::block::{Error, NewBitmap, Node, WriteFlags, ZeroFlags};
use vublk::io::IoVec;

/// An image, and where in it the pointer to the directory, the directory, and a table are.
struct Image {
    bytes: Vec<u8>,
    pointer: usize,
    directory: usize,
    table: usize,
}

static IMAGES: LazyLock<[Image; 2]> =
    LazyLock::new(|| ["cluster_size=512", "cluster_size=4k,refcount_bits=2"].map(image));

fn image(options: &str) -> Image {
    image::put(image::create(&format!("{options},size=200k")).leak());
    let filled = image::with_qcow2(async |node| {
        for (name, granularity) in [("a", 512), ("bb", 4096)] {
            let granularity = Some(granularity);
            let new =
                NewBitmap { name: name.into(), granularity, persistent: true, disabled: false };
            node.add_bitmap(new).await?;
        }
        let from = IoVec::from_ref(&[1; 70_000]);
        node.write(1000, &from, WriteFlags::empty()).await.map_err(|e| Error::os("write", e))
    });
    filled.expect("bitmaps");
    let bytes = image::bytes();
    // The extension's number, its length, then how many bitmaps there are.
    let magic = [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24];
    let found = bytes.windows(8).position(|window| window == magic).expect("the extension");
    let word =
        |at: usize| bytes[at..].first_chunk().map_or(0, |word| u64::from_be_bytes(*word)) as usize;
    let (pointer, directory) = (found + 8, word(found + 24));
    let table = word(directory);
    Image { pointer, directory, table, bytes }
}

/// Changes one of the images as the input says, and uses it.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let image = &IMAGES[input.below(2) as usize];
    let disk = image::put(&image.bytes);
    for _ in 0..1 + input.u8() % 4 {
        let (start, len) = match input.u8() % 8 {
            0 => (image.pointer, 24),
            1 => (image.table, 64),
            2 => (88, 8),
            _ => (image.directory, 64),
        };
        let value = match input.u8() % 4 {
            0 => input.edgy(),
            1 => input.below(1 << 10) << 9,
            2 => input.below(256),
            _ => u64::from(input.u8()) << 56 | input.below(1 << 20),
        };
        let at = start + input.below(len) as usize;
        let count = 1 + input.below(8) as usize;
        let count = count.min(image.bytes.len() - at);
        disk.put(at as u64, &value.to_be_bytes()[8 - count..]);
    }
    if input.one_in(8) {
        disk.set_len(input.below(disk.len()));
    }
    for _ in 0..2 {
        let steps: Vec<u8> = (0..input.u8() % 8).map(|_| input.u8()).collect();
        let used = image::with_qcow2(async |node| use_bitmaps(node, steps).await);
        if let Err(error) = used {
            let text = error.to_string();
            assert!(!text.contains('\n') && text.len() < 2000, "{text:?}");
        }
    }
}

async fn use_bitmaps(node: &Arc<Node>, steps: Vec<u8>) -> Result<(), Error> {
    for (n, step) in steps.into_iter().enumerate() {
        let all = node.bitmaps().all();
        let name = all.get(step as usize % 3).map_or("none", |bitmap| bitmap.name()).to_owned();
        let at = u64::from(step) * 700;
        // Whether they succeed depends on what was changed.
        let _ = match step % 8 {
            0 => {
                let new =
                    NewBitmap { name: format!("n{n}"), persistent: true, ..NewBitmap::default() };
                node.add_bitmap(new).await
            }
            1 => node.remove_bitmap(&name).await,
            2 => node.clear_bitmap(&name).await,
            3 => node.enable_bitmap(&name, step > 100).await,
            4 => node.merge_bitmaps(&name, &[(node.clone(), "a".into())]).await,
            5 => {
                let _ = node.zero(at, 1000, ZeroFlags::UNMAP).await;
                Ok(())
            }
            _ => {
                let _ = node.write(at, &IoVec::from_ref(&[step; 900]), WriteFlags::empty()).await;
                Ok(())
            }
        };
    }
    Ok(())
}
