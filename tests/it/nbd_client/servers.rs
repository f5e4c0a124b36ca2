//! Real servers: what the tools show and copy is what QEMU's show and copy.

use super::{io, program, tool};
use std::process::Command;

/// Lines of servers with a disk of some data and some holes: `DIR/a.raw`.
const SERVERS: [&str; 4] = [
    "nbdkit -f -U SOCKET file DIR/a.raw",
    "nbdkit -f -U SOCKET --filter=noextents --filter=nozero file DIR/a.raw",
    "nbdkit -f -U SOCKET --filter=blocksize-policy file DIR/a.raw blocksize-minimum=4096 \
     blocksize-preferred=64K blocksize-maximum=1M blocksize-error-policy=error",
    "qemu-nbd -t -e 8 -f raw -k SOCKET --discard unmap --detect-zeroes unmap DIR/a.raw",
];

fn theirs(name: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(name).args(arguments).env("LC_ALL", "C").output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout) + &text(&output.stderr))
}

/// Starts a server with its disk.
fn with_disk(line: &str) -> super::Place<vublk_testkit::Server> {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(dir.path().join("a.raw")).unwrap();
    file.set_len(3 << 20).unwrap();
    file.write_all_at(&[7; 65536], 65536).unwrap();
    file.write_all_at(&[9; 4096], 2 << 20).unwrap();
    let server = super::begin(&dir, line);
    super::Place { server, dir }
}

#[test]
fn listings_maps_and_comparisons_are_those_of_qemu() {
    for line in SERVERS {
        let place = with_disk(line);
        let name = place.name("");
        let file = place.dir.path().join("a.raw");
        let file = file.to_str().unwrap();
        for arguments in [
            &["info", "-f", "raw", &name][..],
            &["info", "-f", "raw", "--output=json", &name],
            &["map", "-f", "raw", &name],
            &["map", "-f", "raw", "--output=json", &name],
            &["compare", "-f", "raw", "-F", "raw", &name, file],
        ] {
            let (ours, qemus) = (tool("qemu-img", arguments), theirs("qemu-img", arguments));
            assert_eq!(ours, qemus, "{line}: {arguments:?}");
        }
    }
}

#[test]
fn disks_are_copied_to_and_from_servers() {
    for line in SERVERS {
        let place = with_disk(line);
        let name = place.name("");
        let at = |file: &str| place.dir.path().join(file).to_str().unwrap().to_owned();
        let before = std::fs::read(at("a.raw")).unwrap();
        let (ok, said) =
            tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &name, &at("b.qcow2")]);
        assert!(ok, "{line}: {said}");
        let (ok, said) = theirs("qemu-img", &["compare", &at("a.raw"), &at("b.qcow2")]);
        assert!(ok, "{line}: {said}");
        // Back, over what is there.
        assert!(io(&place.options(""), &["write -P 5 0 3M"]).0, "{line}");
        let convert = ["convert", "-n", "-f", "qcow2", "-O", "raw", &at("b.qcow2"), &name];
        let (ok, said) = tool("qemu-img", &convert);
        assert!(ok, "{line}: {said}");
        assert!(std::fs::read(at("a.raw")).unwrap() == before, "{line}");
    }
}

#[test]
fn images_and_backing_files_lie_on_servers() {
    let place = with_disk(SERVERS[0]);
    let at = |file: &str| place.dir.path().join(file).to_str().unwrap().to_owned();
    let overlay = at("over.qcow2");
    let (ok, said) =
        tool("qemu-img", &["create", "-f", "qcow2", "-b", &place.name(""), "-F", "raw", &overlay]);
    assert!(ok, "{said}");
    let commands =
        ["read -P 7 64k 64k", "write -P 8 64k 4k", "read -P 8 64k 4k", "read -P 7 68k 60k"];
    let options = format!("driver=qcow2,file.filename={overlay}");
    let (ok, said) = io(&options, &commands);
    assert!(ok && !said.contains("failed"), "{said}");
    assert_eq!(
        tool("qemu-img", &["info", "--backing-chain", &overlay]),
        theirs("qemu-img", &["info", "--backing-chain", &overlay])
    );
    // An image in the export itself.
    let (ok, said) = tool("qemu-img", &["create", "-f", "qcow2", &place.name(""), "1M"]);
    assert!(ok, "{said}");
    let options = format!("driver=qcow2,file.driver=nbd,file.path={}", place.socket().display());
    let (ok, said) =
        io(&options, &["write -P 3 0 512k", "read -P 3 0 512k", "read -P 0 512k 512k"]);
    assert!(ok && !said.contains("failed"), "{said}");
    let (ok, said) = theirs("qemu-img", &["check", "-f", "qcow2", &place.name("")]);
    assert!(ok, "{said}");
}

#[test]
fn a_dirty_bitmap_stands_in_for_holes() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    let image = image.to_str().unwrap();
    for arguments in
        [&["create", "-q", "-f", "qcow2", image, "1M"][..], &["bitmap", "--add", image, "b0"]]
    {
        assert!(theirs("qemu-img", arguments).0);
    }
    assert!(theirs("qemu-io", &["-c", "write 64k 128k", image]).0);
    let line = format!("qemu-nbd -t -e 4 -r -f qcow2 -B b0 -k SOCKET {image}");
    let place = super::Place { server: super::begin(&dir, &line), dir };
    let options = place.options(",x-dirty-bitmap=qemu:dirty-bitmap:b0");
    let arguments = ["map", "--output=json", "--image-opts", &options];
    let (ok, said) = theirs("qemu-img", &arguments);
    // What is dirty is there all the same.
    let said = said.replace("\"present\": false", "\"present\": true");
    assert_eq!(tool("qemu-img", &arguments), (ok, said));
    let wrong = place.options(",x-dirty-bitmap=qemu:dirty-bitmap:none");
    let (ok, said) = tool("qemu-img", &["map", "--image-opts", &wrong]);
    assert!(!ok && said.contains("requested x-dirty-bitmap"), "{said}");
    let (ok, said) = io(&place.options(""), &["write 0 512"]);
    assert!(!ok && said.contains("NBD export is read-only"), "{said}");
}

#[test]
fn refusals_are_told_as_by_qemu() {
    let nobody = "nbd+unix:///?socket=/nowhere/s";
    let arguments = ["info", nobody];
    assert_eq!(tool("qemu-img", &arguments), theirs("qemu-img", &arguments));
    let place = with_disk("qemu-nbd -t -e 4 -f raw -x vol -k SOCKET DIR/a.raw");
    let arguments = ["info", &place.name("other")];
    assert_eq!(tool("qemu-img", &arguments), theirs("qemu-img", &arguments));
    let arguments = ["info", &place.name("vol")];
    assert_eq!(tool("qemu-img", &arguments), theirs("qemu-img", &arguments));
    let (ok, said) = tool("qemu-img", &["info", "nbds://localhost/x"]);
    assert!(!ok && said.contains("TLS for NBD is not supported yet"), "{said}");
}

#[test]
fn an_error_of_the_server_is_the_requests_and_the_connection_goes_on() {
    let place = program(
        "nbdkit -f -U SOCKET --filter=error memory 1M error-pwrite=ENOSPC error-pwrite-rate=100% \
         error-pread=EIO error-pread-rate=0%",
    );
    let (_, said) = io(&place.options(""), &["write 0 4096", "read -P 0 0 4096"]);
    assert!(said.contains("write failed: No space left on device"), "{said}");
    assert!(said.contains("read 4096/4096") && !said.contains("NBD server"), "{said}");
}

#[test]
fn the_reference_server_is_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("a.raw"), vec![0; 1 << 20]).unwrap();
    let config = format!(
        "[generic]\nunixsock = {}\n[vol]\nexportname = {}\nflush = true\nfua = true\n",
        path("s"),
        path("a.raw")
    );
    std::fs::write(path("config"), config).unwrap();
    // It goes into the background by itself.
    let (ok, said) = theirs("nbd-server", &["-C", &path("config"), "-p", &path("pid")]);
    assert!(ok, "{said}");
    let options = format!("driver=nbd,path={},export=vol,open-timeout=20", path("s"));
    let commands = ["write -P 7 4096 70000", "flush", "read -P 7 4096 70000", "read -P 0 0 4096"];
    let (ok, said) = io(&options, &commands);
    let pid = std::fs::read_to_string(path("pid")).unwrap().trim().parse().unwrap();
    // SAFETY: the call names no memory.
    unsafe { libc::kill(pid, libc::SIGTERM) };
    assert!(ok && !said.contains("failed"), "{said}");
}
