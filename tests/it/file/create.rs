//! New files: beside qemu-img's, and when making them fails.

use super::*;
use std::os::unix::fs::MetadataExt;
use vublk::block::Preallocation;
use vublk::block::create::Creation;
use vublk::options::Size;
use vublk::options::{Map, qemuopts};
use vublk::protocol::file::create::{CreateOptions, create_device, create_file};

fn sized(size: u64) -> CreateOptions {
    CreateOptions { size: Size(size), ..CreateOptions::default() }
}

#[test]
fn a_new_file_is_as_long_takes_as_much_space_and_reads_the_same_as_qemu_imgs() {
    for dir in [on_disk(), on_tmpfs()] {
        for (mode, name) in [
            (Preallocation::Off, "off"),
            (Preallocation::Falloc, "falloc"),
            (Preallocation::Full, "full"),
        ] {
            for size in [0u64, 512, 3 << 20] {
                let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
                let options = CreateOptions { preallocation: mode, ..sized(size) };
                create_file(ours.to_str().unwrap(), &options).unwrap();
                let option = format!("preallocation={name}");
                let path = theirs.to_str().unwrap();
                tool("qemu-img", &["create", "-f", "raw", "-o", &option, path, &size.to_string()]);
                let what = |path| {
                    let metadata = std::fs::metadata(path).unwrap();
                    // The extent size of a hint may round it up.
                    (metadata.len(), metadata.blocks().div_ceil(64), metadata.mode())
                };
                assert_eq!(what(&ours), what(&theirs), "{name} {size}");
                assert!(std::fs::read(&ours).unwrap().iter().all(|&b| b == 0));
                std::fs::remove_file(&ours).unwrap();
                std::fs::remove_file(&theirs).unwrap();
            }
        }
    }
}

#[test]
fn the_registry_makes_files_from_the_options_of_the_command_line() {
    let dir = on_disk();
    let filename = dir.path().join("a.img").to_str().unwrap().to_owned();
    let registry = vublk::drivers::registry();
    let text = "size=1M,preallocation=falloc,nocow=on,extent_size_hint=64k";
    let given = qemuopts::parse(text, None).unwrap().options;
    let mut file = Map::new();
    file.insert("driver", "file");
    file.insert("filename", &*filename);
    let creation = Creation::new(registry, "raw", (&filename, file), given, None).unwrap();
    Bench::new().run(move || async move { creation.run().await }).unwrap();
    let metadata = std::fs::metadata(&filename).unwrap();
    assert_eq!(metadata.len(), 1 << 20);
    assert!(metadata.blocks() * 512 >= 1 << 20);
}

#[test]
fn what_cannot_be_made_is_refused_before_a_file_is_there() {
    let dir = on_disk();
    let path = dir.path().join("a.img");
    let refused = |options: &CreateOptions| {
        create_file(path.to_str().unwrap(), options).unwrap_err().to_string()
    };
    let metadata = CreateOptions { preallocation: Preallocation::Metadata, ..sized(4096) };
    assert_eq!(refused(&metadata), "Unsupported preallocation mode: metadata");
    let hint = CreateOptions { extent_size_hint: Some(Size(5_000_000_000)), ..sized(4096) };
    assert_eq!(refused(&hint), "Extent size hint is too large");
    assert!(!path.exists());
    let nowhere = dir.path().join("no/a.img");
    let nowhere = nowhere.to_str().unwrap();
    let text = create_file(nowhere, &sized(4096)).unwrap_err().to_string();
    assert_eq!(text, format!("Could not create '{nowhere}': No such file or directory"));
}

#[test]
fn making_a_file_that_finds_no_room_leaves_it_empty() {
    let dir = on_tmpfs();
    let mount = Mount::small(&dir.path().join("small"), 1 << 20);
    let path = mount.0.join("a.img");
    for preallocation in [Preallocation::Falloc, Preallocation::Full] {
        std::fs::write(&path, pattern(4096)).unwrap();
        let options = CreateOptions { preallocation, ..sized(4 << 20) };
        let error = create_file(path.to_str().unwrap(), &options).unwrap_err();
        assert_eq!(error.errno().map(|e| e.0), Some(libc::ENOSPC), "{error}");
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.blocks()), (0, 0));
    }
}

#[test]
fn an_image_in_use_is_not_made_anew() {
    let dir = on_disk();
    let image = dir.path().join("a.img");
    std::fs::write(&image, pattern(4096)).unwrap();
    let bench = Bench::new();
    let _disk = bench.disk(&format!("driver=file,filename={}", image.display())).unwrap();
    let error = create_file(image.to_str().unwrap(), &sized(1 << 20)).unwrap_err();
    assert_eq!(error.to_string(), "Failed to get \"write\" lock");
    assert!(std::fs::read(&image).unwrap() == pattern(4096));
}

#[test]
fn a_device_takes_a_new_disk_of_at_most_its_size_and_forgets_the_old_ones_first_sector() {
    let dir = on_tmpfs();
    let backing = dir.path().join("backing");
    std::fs::write(&backing, pattern(1 << 20)).unwrap();
    let device = Loop::new(&backing, &[]);
    let error = create_device(&device.0, &sized(2 << 20)).unwrap_err();
    assert_eq!(error.to_string(), "Cannot grow device files");
    assert!(std::fs::read(&backing).unwrap() == pattern(1 << 20));
    create_device(&device.0, &sized(512 << 10)).unwrap();
    let mut wanted = pattern(1 << 20);
    wanted[..512].fill(0);
    assert!(std::fs::read(&backing).unwrap() == wanted);
}
