//! `snapshot`, and internal snapshots in `info`, `convert` and `measure`, beside qemu-img.

use super::{Ended, Place};

/// When something was made, and what the file takes and where, which differ.
pub(super) fn mask(text: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let key = line.trim_start().split(':').next().unwrap_or_default();
        if ["\"date-sec\"", "\"date-nsec\"", "\"actual-size\"", "disk size", "Image end offset"]
            .contains(&key)
        {
            lines.push(format!("{key}: …"));
            continue;
        }
        let digit = |c: &u8| c.is_ascii_digit();
        let date = line.as_bytes().windows(19).position(|part| {
            let shape = b"0000-00-00 00:00:00";
            part.iter().zip(shape).all(|(c, s)| if *s == b'0' { digit(c) } else { c == s })
        });
        lines.push(match date {
            Some(at) => format!("{}DATE{}", &line[..at], &line[at + 19..]),
            None => line.to_owned(),
        });
    }
    lines.join("\n")
}

/// What the steps of a line come to, behind the same preparation by qemu-img.
fn run(ours: bool, line: &str) -> Vec<Ended> {
    let place = Place::new(ours);
    for step in [
        "qemu-img create -q -f qcow2 a 1M",
        "qemu-io -f qcow2 -c 'write -P 1 0 128k' a",
        "qemu-img snapshot -c foo a",
        "qemu-io -f qcow2 -c 'write -P 2 0 128k' a",
        "qemu-img snapshot -c 1 a",
        "qemu-io -f qcow2 -c 'write -P 3 64k 128k' a",
        "qemu-img create -q -f qcow2 -b a -F qcow2 over",
        "qemu-img create -q -f qcow2 -o compat=0.10 old 1M",
        "qemu-img create -q -f raw r 1M",
    ] {
        let mut theirs = std::process::Command::new(super::words(step)[0].clone());
        theirs.args(&super::words(step)[1..]).current_dir(place.path());
        assert!(theirs.output().unwrap().status.success(), "{step}");
    }
    let masked = |ended: Ended| Ended { stdout: mask(&ended.stdout), ..ended };
    line.split(" && ").map(|step| masked(place.run(step))).collect()
}

const LINES: &[&str] = &[
    "qemu-img snapshot a",
    "qemu-img snapshot -l a",
    "qemu-img snapshot -q -l a",
    "qemu-img snapshot -U -l a",
    "qemu-img snapshot -l over",
    "qemu-img snapshot --image-opts -l driver=qcow2,file.filename=a",
    "qemu-img snapshot -c new a && qemu-img snapshot -l a && qemu-img check a && qemu-img info a",
    "qemu-img snapshot -c foo a && qemu-img snapshot -d foo a && qemu-img snapshot -l a",
    "qemu-img snapshot -q -c '' a && qemu-img snapshot -l a && qemu-img snapshot -d '' a && qemu-img snapshot -l a",
    "qemu-img snapshot -c 'a name that is much longer than the column for it' a && qemu-img info a",
    "qemu-img snapshot -c 5 a && qemu-img snapshot -a 5 a && qemu-img snapshot -a 3 a && qemu-img snapshot -d 3 a && qemu-img snapshot -d 5 a && qemu-img snapshot -l a",
    "qemu-img snapshot -a foo a && qemu-io -c 'read -P 1 0 128k' a && qemu-img check a && qemu-img map a",
    "qemu-img snapshot -a 1 a && qemu-io -c 'read -P 1 0 128k' a && qemu-img snapshot -a 2 a && qemu-io -c 'read -P 2 0 128k' a",
    "qemu-img snapshot -d 1 a && qemu-img snapshot -l a && qemu-img check a",
    "qemu-img snapshot -d 2 a && qemu-img snapshot -l a",
    "qemu-img snapshot -d foo a && qemu-img snapshot -d 1 a && qemu-img snapshot -l a && qemu-img info a && qemu-img check a",
    "qemu-img snapshot -a nope a",
    "qemu-img snapshot -d nope a",
    "qemu-img snapshot -q -d nope a",
    "qemu-img snapshot -U -c x a",
    "qemu-img snapshot --image-opts -c x driver=qcow2,file.filename=a && qemu-img snapshot -l a",
    "qemu-img snapshot --image-opts -c x driver=qcow2,file.filename=a,read-only=on",
    "qemu-img snapshot -c x old && qemu-img snapshot -l old && qemu-img snapshot -a x old && qemu-img snapshot -d x old && qemu-img check old && qemu-img info --output=json old",
    "qemu-img snapshot -c x over && qemu-io -c 'write -P 9 0 1M' over && qemu-img snapshot -a x over && qemu-io -c 'read -P 2 0 64k' over && qemu-img check over",
    "qemu-img info a",
    "qemu-img info --output=json a",
    "qemu-img info --backing-chain over",
    "qemu-img convert -l foo -O raw a out && qemu-io -f raw -c 'read -P 1 0 128k' out",
    "qemu-img convert -l 1 -O raw a out && qemu-io -f raw -c 'read -P 1 0 128k' out",
    "qemu-img convert -l 2 -O raw a out && qemu-io -f raw -c 'read -P 2 0 128k' out",
    "qemu-img convert -l snapshot.name=1 -O raw a out && qemu-io -f raw -c 'read -P 2 0 128k' out",
    "qemu-img convert -l snapshot.id=1 -O raw a out && qemu-io -f raw -c 'read -P 1 0 128k' out",
    "qemu-img convert -l snapshot.id=2,snapshot.name=1 -O qcow2 a out && qemu-io -c 'read -P 2 0 128k' out",
    "qemu-img convert -l snapshot.id=1,snapshot.name=1 -O raw a out",
    "qemu-img convert -l snapshot.id=9 -O raw a out",
    "qemu-img convert -l nope -O raw a out",
    "qemu-img convert -l '' -O raw a out",
    "qemu-img convert -l snapshot.bogus=1 -O raw a out",
    "qemu-img convert -l foo -O raw a a out",
    "qemu-img convert -l foo -f raw -O raw r out",
    "qemu-img measure -l nope -O raw a",
    "qemu-img measure --output=json -l snapshot.id=2 -O raw a",
];

#[test]
fn snapshots_are_listed_made_applied_and_deleted_as_by_qemu_img() {
    let mut wrong = String::new();
    for line in LINES {
        let (ours, theirs) = (run(true, line), run(false, line));
        if ours != theirs {
            wrong += &format!("\n{line}\n  ours:   {ours:?}\n  theirs: {theirs:?}\n");
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// QEMU pads the names by their bytes.
#[test]
fn names_of_several_bytes_or_columns_a_letter_leave_the_columns_of_the_list_in_line() {
    let place = Place::new(true);
    place.run("qemu-img create -q -f qcow2 a.qcow2 1M");
    // How many columns each takes.
    let names = [("abc", 3), ("\u{e4}\u{f6}\u{fc}", 3), ("e\u{301}", 1), ("\u{65e5}\u{672c}", 4)];
    for (name, _) in names {
        let made = place.run(&format!("qemu-img snapshot -c {name} a.qcow2"));
        assert_eq!(made.code, Some(0), "{}", made.stderr);
    }
    for line in ["qemu-img snapshot -l a.qcow2", "qemu-img info a.qcow2"] {
        let list = place.run(line).stdout;
        for (index, (name, columns)) in names.iter().enumerate() {
            let blanks = " ".repeat(16 - columns);
            let row = format!("\n{:<9} {name}{blanks}      0 B", index + 1);
            assert!(list.contains(&row), "{line}: {list}");
        }
    }
}
