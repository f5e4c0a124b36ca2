//! Files whose names are not UTF-8; to Linux, any bytes are a name.

use super::Place;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::process::Command;

/// What a command line is and comes to, in bytes; `?` in a word stands for a byte that is no text.
fn run(place: &Place, line: &str) -> (Option<i32>, Vec<u8>, Vec<u8>) {
    let bytes = |word: &str| {
        OsString::from_vec(word.bytes().map(|b| if b == b'?' { 0xe9 } else { b }).collect())
    };
    let mut words = line.split(' ');
    let program = place.program(words.next().unwrap());
    let output = Command::new(program)
        .args(words.map(|word| bytes(&word.replace('_', " "))))
        .current_dir(place.path())
        .output()
        .unwrap();
    (output.status.code(), output.stdout, output.stderr)
}

#[test]
fn files_whose_names_are_no_text_are_made_read_and_reported_as_by_qemu() {
    let [ours, theirs] = [true, false].map(Place::new);
    for line in [
        "qemu-img create -f raw b?.raw 1M",
        "qemu-io -f raw -c write_-P_1_0_1M b?.raw",
        "qemu-img create -f qcow2 -b b?.raw -F raw t?.qcow2",
        "qemu-img info t?.qcow2",
        "qemu-img info --output=json t?.qcow2",
        "qemu-img map t?.qcow2",
        "qemu-io -c open_t?.qcow2 -c read_-P_1_0_1M",
        "qemu-img rebase -u -b ./b?.raw -F raw t?.qcow2",
        "qemu-img check t?.qcow2",
        "qemu-io -c write_-P_2_0_64k t?.qcow2",
        "qemu-img commit -q -b ./b?.raw t?.qcow2",
        "qemu-img compare -f raw -F qcow2 b?.raw t?.qcow2",
        "qemu-img convert -O qcow2 t?.qcow2 c?.qcow2",
        "qemu-img info not?here",
        "qemu-img info json:{\"driver\":\"raw\",\"file.filename\":\"b?.raw\"}",
    ] {
        let [mine, judge] = [&ours, &theirs].map(|place| run(place, line));
        assert_eq!(mine.0, judge.0, "{line}: {}", String::from_utf8_lossy(&mine.2));
        if !line.contains("qemu-io") && !line.contains("not?here") && !line.contains("json:{") {
            // How much of a file is stored is the file system's to say.
            let compared = |text: &[u8]| -> Vec<String> {
                let text = String::from_utf8_lossy(text).into_owned();
                let is_compared =
                    |line: &&str| !line.contains("disk size") && !line.contains("actual");
                text.lines().filter(is_compared).map(str::to_owned).collect()
            };
            assert_eq!(compared(&mine.1), compared(&judge.1), "{line}");
        }
    }
}
