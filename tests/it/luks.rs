//! LUKS images beside cryptsetup and QEMU.
//!
//! Each opens what the others made, keys are rotated by all, and damaged or hostile headers are refused.

use crate::tools::Place;
use std::path::Path;
use std::process::{Command, Stdio};

const SECRETS: &str = "--object secret,id=old,file=old --object secret,id=new,file=new \
                       --object secret,id=bad,data=wrong";

/// A folder with two passphrases.
fn place() -> Place {
    let place = Place::new(true);
    std::fs::write(place.path().join("old"), "first passphrase").unwrap();
    std::fs::write(place.path().join("new"), "second passphrase").unwrap();
    place
}

/// Runs cryptsetup on files, in whose words there are no blanks.
fn cryptsetup(folder: &Path, line: &str) -> (bool, String) {
    let mut command = Command::new("cryptsetup");
    command.args(line.split_whitespace()).arg("--batch-mode").current_dir(folder);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).stdin(Stdio::null());
    let output = command.output().expect("cryptsetup");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Whether cryptsetup opens the image with the passphrase in a file.
fn opens(place: &Place, key: &str) -> bool {
    let line = format!("open --test-passphrase --key-file {key} x.luks");
    cryptsetup(place.path(), &line).0
}

fn ok(place: &Place, line: &str) -> String {
    let ended = place.run(line);
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""), "{line}");
    ended.stdout
}

fn image(secret: &str) -> String {
    format!("--image-opts driver=luks,key-secret={secret},file.driver=file,file.filename=x.luks")
}

/// Lines that check a pattern.
fn reads(secret: &str, with: &str) -> String {
    let commands = "-c 'read -P 7 512 70k' -c 'read -P 9 1M 4k'";
    format!("{with} {SECRETS} {} {commands}", image(secret))
}

fn writes(secret: &str, with: &str) -> String {
    let commands = "-c 'write -P 7 512 70k' -c 'write -P 9 1M 4k'";
    format!("{with} {SECRETS} {} {commands}", image(secret))
}

#[test]
fn what_we_make_opens_for_cryptsetup_and_qemu_reads_what_we_wrote() {
    for options in [
        "",
        ",cipher-alg=aes-128",
        ",cipher-alg=aes-256,cipher-mode=cbc,hash-alg=sha1",
        ",cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha512",
        ",cipher-alg=serpent-256,cipher-mode=cbc,ivgen-alg=plain,hash-alg=ripemd160",
        ",cipher-alg=twofish-256,cipher-mode=xts",
        ",cipher-alg=cast5-128,cipher-mode=cbc",
        ",cipher-mode=ctr",
    ] {
        let place = place();
        let line = format!(
            "qemu-img create -q {SECRETS} -f luks -o key-secret=old,iter-time=1{options} x.luks 2M"
        );
        ok(&place, &line);
        ok(&place, &writes("old", "qemu-io"));
        let ended = place.run_theirs(&reads("old", "qemu-io"));
        assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{options}: {ended:?}");
        // cryptsetup leaves these to the kernel, which may not have them.
        if !["serpent", "twofish", "cast5", "ctr"].iter().any(|name| options.contains(name)) {
            assert!(opens(&place, "old"), "{options}");
            assert!(!opens(&place, "new"), "{options}");
        }
        let theirs = place.run_theirs("qemu-img info x.luks").stdout;
        assert_eq!(ok(&place, "qemu-img info x.luks"), theirs, "{options}");
    }
}

#[test]
fn what_cryptsetup_makes_we_read_and_what_we_write_there_qemu_reads() {
    for (cipher, size, hash) in [
        ("aes-xts-plain64", 512, "sha256"),
        ("aes-xts-plain64", 256, "sha1"),
        ("aes-cbc-essiv:sha256", 256, "sha512"),
        ("aes-cbc-plain", 128, "ripemd160"),
    ] {
        let place = place();
        std::fs::File::create(place.path().join("x.luks")).unwrap().set_len(4 << 20).unwrap();
        let line = format!(
            "luksFormat --type luks1 --cipher {cipher} --key-size {size} --hash {hash} \
             --pbkdf-force-iterations 1000 --key-file old x.luks"
        );
        let (is_made, text) = cryptsetup(place.path(), &line);
        assert!(is_made, "{text}");
        ok(&place, &writes("old", "qemu-io"));
        let ended = place.run_theirs(&reads("old", "qemu-io"));
        assert!(ended.code == Some(0) && !ended.stdout.contains("failed"), "{cipher}: {ended:?}");
        assert!(!ok(&place, &reads("old", "qemu-io")).contains("failed"));
        let ended = place.run(&reads("bad", "qemu-io"));
        assert!(
            ended.stderr.ends_with("Invalid password, cannot unlock any keyslot\n"),
            "{ended:?}"
        );
    }
}

#[test]
fn keys_are_rotated_and_the_last_one_stays() {
    let place = place();
    ok(
        &place,
        &format!("qemu-img create -q {SECRETS} -f luks -o key-secret=old,iter-time=1 x.luks 2M"),
    );
    ok(&place, &writes("old", "qemu-io"));
    let amend = |secret: &str, options: &str| {
        place.run(&format!("qemu-img amend {SECRETS} {} {options}", image(secret)))
    };
    let refused = |options: &str, wanted: &str| {
        let ended = amend("old", options);
        assert_eq!(ended.code, Some(1), "{options}");
        assert!(ended.stderr.contains(wanted), "{options}: {}", ended.stderr);
    };
    refused("-o state=inactive,keyslot=0", "the only active keyslot");
    refused("-o state=inactive,old-secret=old", "All the active keyslots match");
    refused("-o state=inactive,keyslot=3", "Given keyslot 3 is already erased (inactive)");
    refused("-o state=inactive,keyslot=8", "Invalid keyslot 8");
    refused("-o state=inactive", "either explicit keyslot index or the password");
    refused("-o state=active", "'new-secret' is required");
    refused("-o state=active,new-secret=new,keyslot=0", "Refusing to overwrite active keyslot 0");
    assert!(opens(&place, "old"));

    let ended = amend("old", "-o state=active,new-secret=new,keyslot=5,iter-time=1");
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    assert!(opens(&place, "old") && opens(&place, "new"));
    // cryptsetup adds one to what we have made, and takes one of ours away.
    let add = "luksAddKey --pbkdf-force-iterations 1000 --key-file new x.luks old --key-slot 2";
    let (is_added, text) = cryptsetup(place.path(), add);
    assert!(is_added, "{text}");
    let (is_killed, text) = cryptsetup(place.path(), "luksKillSlot --key-file new x.luks 0");
    assert!(is_killed, "{text}");
    assert!(!ok(&place, &reads("old", "qemu-io")).contains("failed"));

    // What an erased slot had is gone from the file.
    let bytes = |range: std::ops::Range<usize>| {
        std::fs::read(place.path().join("x.luks")).unwrap()[range].to_vec()
    };
    let slot = 4096 + 2 * 258048..4096 + 2 * 258048 + 256000;
    let before = bytes(slot.clone());
    let ended = amend("new", "-o state=inactive,old-secret=old");
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    let after = bytes(slot);
    let same = before.iter().zip(&after).filter(|(a, b)| a == b).count();
    assert!(same < before.len() / 100, "{same} bytes are as they were");
    assert!(!opens(&place, "old") && opens(&place, "new"));
    assert!(!ok(&place, &reads("new", "qemu-io")).contains("failed"));
    assert!(place.run(&reads("old", "qemu-io")).stderr.contains("Invalid password"));

    // With --force even the last one goes.
    let ended = amend("new", "--force -o state=inactive,keyslot=5");
    assert_eq!((ended.code, &*ended.stderr), (Some(0), ""));
    assert!(!opens(&place, "new"));
}

#[test]
fn changes_of_key_slots_are_refused_in_the_words_of_qemu() {
    let ours = place();
    ok(
        &ours,
        &format!("qemu-img create -q {SECRETS} -f luks -o key-secret=old,iter-time=1 x.luks 1M"),
    );
    let theirs = Place::new(false);
    for name in ["old", "new", "x.luks"] {
        std::fs::copy(ours.path().join(name), theirs.path().join(name)).unwrap();
    }
    for change in [
        "state=active",
        "state=active,new-secret=new,keyslot=0",
        "state=active,new-secret=new,keyslot=9",
        "state=active,new-secret=new,old-secret=bad",
        "state=inactive",
        "state=inactive,old-secret=old",
        "state=inactive,old-secret=bad",
        "state=inactive,keyslot=0",
        "state=inactive,keyslot=0,old-secret=bad",
        "state=inactive,keyslot=3",
        "state=inactive,keyslot=9",
        "state=inactive,keyslot=0,iter-time=10",
        "state=inactive,new-secret=new",
        "state=bogus",
        "keyslot=1",
    ] {
        let line = format!("qemu-img amend {SECRETS} -o {change} {}", image("old"));
        let [ours, theirs] = [ours.run(&line), theirs.run(&line)];
        assert_eq!(theirs.code, Some(1), "{change}");
        assert_eq!(ours, theirs, "{change}");
    }
}

#[test]
fn damaged_and_hostile_headers_are_refused_in_one_line() {
    let place = place();
    ok(
        &place,
        &format!("qemu-img create -q {SECRETS} -f luks -o key-secret=old,iter-time=1 x.luks 1M"),
    );
    let path = place.path().join("x.luks");
    let good = std::fs::read(&path).unwrap();
    for (what, at, bytes, wanted) in [
        ("key material", 5000, &[0x55; 64][..], "Invalid password, cannot unlock any keyslot"),
        ("digest", 112, &[0; 4], "Invalid password, cannot unlock any keyslot"),
        ("iterations", 212, &[0xff; 4], "iterations to unlock it, more than"),
        ("digest iterations", 164, &[0xff; 4], "iterations to unlock it, more than"),
        ("overlap", 296, &[0, 0, 0, 8], "key slots 0 and 1 overlap"),
        ("payload", 104, &[0x7f, 0, 0, 0], "behind the end of the file"),
        ("stripes", 252, &[0xff; 4], "stripes, not 4000"),
        ("key length", 108, &[0xff; 4], "a key of 4294967295 bytes"),
    ] {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, &bad).unwrap();
        let ended = place.run(&reads("old", "qemu-io"));
        assert_eq!(ended.code, Some(1), "{what}");
        assert!(ended.stderr.contains(wanted), "{what}: {}", ended.stderr);
        assert_eq!(ended.stderr.lines().count(), 1, "{what}: {}", ended.stderr);
    }
    std::fs::write(&path, &good[..300_000]).unwrap();
    let ended = place.run(&reads("old", "qemu-io"));
    assert!(ended.stderr.contains("behind the end of the file"), "{}", ended.stderr);
}

#[test]
fn resizing_converting_and_measuring_agree_with_qemu() {
    let place = place();
    ok(
        &place,
        &format!("qemu-img create -q {SECRETS} -f luks -o key-secret=old,iter-time=1 x.luks 2M"),
    );
    ok(&place, &writes("old", "qemu-io"));
    ok(&place, &format!("qemu-img resize -q {SECRETS} {} 3M", image("old")));
    let len = std::fs::metadata(place.path().join("x.luks")).unwrap().len();
    assert_eq!(len, (3 << 20) + 2068480);
    ok(&place, &format!("qemu-img convert {SECRETS} {} -O raw out.raw", image("old")));
    let theirs = format!("qemu-img compare {SECRETS} {} out.raw", image("old"));
    let theirs = theirs.replace(" out.raw", "");
    let ended =
        place.run_theirs(&format!("{theirs} driver=raw,file.driver=file,file.filename=out.raw"));
    assert_eq!(ended.stdout, "Images are identical.\n", "{ended:?}");
    ok(
        &place,
        &format!(
            "qemu-img convert {SECRETS} -f raw -O luks -o key-secret=new,iter-time=1 out.raw x.luks"
        ),
    );
    assert!(!ok(&place, &reads("new", "qemu-io")).contains("failed"));
    let measured = ok(
        &place,
        &format!("qemu-img measure -O luks {SECRETS} -o key-secret=old,iter-time=1 --size 3M"),
    );
    assert_eq!(measured, format!("required size: {len}\nfully allocated size: {len}\n"));
}
