//! qemu-io, qemu-img and libnbd's programs see the same server in `vublk daemon` as in qemu-storage-daemon.

use std::path::Path;
use std::process::Command;

use super::SERVER;
use crate::cli::VUBLK;
use crate::vhost_user::{Daemon, new_image};

/// What a server is asked, in a directory with its socket. Requests that fail tell the error and its text.
const QUESTIONS: &str = r#"
U="nbd+unix:///vol?socket=nbd.sock"; Q="nbd+unix:///q?socket=nbd.sock"
nbdinfo --list --json "nbd+unix:///?socket=nbd.sock"
for c in base:allocation qemu:allocation-depth qemu:dirty-bitmap:b; do nbdinfo --map=$c "$Q"; done
nbdinfo --map "$U"
nbdinfo "nbd+unix:///nosuch?socket=nbd.sock"
qemu-img map --output=json -f raw "$Q"
qemu-img map --output=json --image-opts driver=nbd,export=q,server.type=unix,server.path=nbd.sock,x-dirty-bitmap=qemu:dirty-bitmap:b
qemu-io -f raw -c 'write -P 5 1M 64k' -c 'write -z 2M 64k' -c 'write -zu 3M 64k' -c 'discard 1M 4k' -c 'flush' \
    -c 'read -P 5 1052672 4k' -c 'read -P 0 2M 64k' -c 'write -f -P 6 100 3' -c 'read -P 6 100 3' -c 'read 8M 1k' "$U" | grep -v ops
nbdcopy "$Q" copy.img; sha256sum < copy.img
nbdcopy --connections=4 copy.img "$U"; nbdcopy "$U" - | sha256sum
/usr/bin/python3 - <<'P'
import nbd
h = nbd.NBD(); h.add_meta_context("base:allocation"); h.add_meta_context("qemu:dirty-bitmap:b")
h.set_export_name("q"); h.set_strict_mode(0); h.connect_unix("nbd.sock")
end = 8 << 20
def told(context, offset, extents, error): print(context, offset, extents)
def ask(name, what):
    try: print(name, what())
    except nbd.Error as error: print(name, error.errnum, error.string)
ask("status of nothing", lambda: h.block_status(0, 0, told))
ask("status", lambda: h.block_status(end, 0, told))
ask("one status", lambda: h.block_status(end, 0, told, nbd.CMD_FLAG_REQ_ONE))
ask("status at the end", lambda: h.block_status(end + 512, 0, told))
ask("read", lambda: len(h.pread(4096, 0)))
ask("empty read", lambda: len(h.pread(0, 0)))
ask("long read", lambda: len(h.pread(33 << 20, 0)))
ask("read at the end", lambda: h.pread(4096, end - 512))
ask("trim at the end", lambda: h.trim(4096, end - 512))
ask("cache at the end", lambda: h.cache(4096, end - 512))
ask("cache", lambda: h.cache(4096, 0))
ask("trim", lambda: h.trim(65536, 0))
ask("zero", lambda: h.zero(65536, 131072, nbd.CMD_FLAG_NO_HOLE))
ask("fast zero", lambda: h.zero(65536, 131072, nbd.CMD_FLAG_FAST_ZERO))
ask("durable write", lambda: h.pwrite(b"a" * 4096, 0, nbd.CMD_FLAG_FUA))
ask("flush", lambda: h.flush())
ask("wrong flag of a read", lambda: h.pread(4096, 0, nbd.CMD_FLAG_NO_HOLE))
ask("wrong flag of a write", lambda: h.pwrite(b"a" * 512, 0, nbd.CMD_FLAG_DF))
ask("wrong flag of a trim", lambda: h.trim(512, 0, nbd.CMD_FLAG_FAST_ZERO))
ask("whole read", lambda: len(h.pread(1 << 20, 0, nbd.CMD_FLAG_DF)))
P
qemu-img info -f raw "$U" | grep -v 'disk size'; ! qemu-img info -f raw nbd+unix:///o?socket=nbd.sock | grep virtual
qemu-io -r -f raw -c 'write 0 512' "nbd+unix:///o?socket=nbd.sock"
"#;

fn run(dir: &Path, script: &str) -> String {
    let output = Command::new("bash").args(["-c", script]).current_dir(dir).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8(text).unwrap();
    text.replace(dir.to_str().unwrap(), "DIR")
}

/// What a daemon of `program` answers.
fn answers(program: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    new_image(&dir.path().join("disk.img"), 8 << 20);
    let made = run(
        dir.path(),
        "qemu-img create -q -f raw base.img 4M; qemu-io -f raw -c 'write -P 7 0 300k' base.img
        qemu-img create -q -f qcow2 -b base.img -F raw q.qcow2 8M
        qemu-io -c 'write -P 1 0 1M' -c 'write -z 2M 1M' q.qcow2
        qemu-img bitmap --add q.qcow2 b; qemu-io -c 'write -P 2 3M 64k' -c 'write -P 2 5M 64k' q.qcow2
        truncate -s 1000 odd.img",
    );
    assert!(!made.contains("rror"), "{made}");
    let more = [
        "--blockdev",
        "driver=qcow2,node-name=q,file.driver=file,file.filename=DIR/q.qcow2",
        "--blockdev",
        "driver=file,node-name=o,filename=DIR/odd.img",
        "--export",
        "type=nbd,id=e2,node-name=q,writable=on,bitmaps.0=b,allocation-depth=on,description=for people",
        "--export",
        "type=nbd,id=e3,node-name=o",
    ];
    let daemon = Daemon::start_in(dir, program, &[&SERVER[..], &more].concat());
    let answers = run(&daemon.path(""), QUESTIONS);
    let log = daemon.server.stderr();
    // What clients do wrong is no reason for more than a line.
    assert!(log.lines().count() < 3, "{log}");
    answers
}

#[test]
fn other_programs_clients_get_the_same_answers_as_from_qemu_storage_daemon() {
    let ours = answers(&[VUBLK, "daemon"]);
    let theirs = answers(&["qemu-storage-daemon"]);
    assert!(
        theirs.contains("qemu:dirty-bitmap:b") && theirs.contains("status at the end 22"),
        "{theirs}"
    );
    let different: Vec<_> =
        ours.lines().zip(theirs.lines()).filter(|(ours, theirs)| ours != theirs).collect();
    assert!(ours == theirs, "{different:#?}\n\nours:\n{ours}");
}

#[test]
fn tcp_clients_are_served_and_clients_beyond_the_limit_wait() {
    let port = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port().to_string()
    };
    let address = format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port},max-connections=1");
    let arguments = [&SERVER[..2], &["--nbd-server", &address], &SERVER[4..]].concat();
    let daemon = Daemon::start(&arguments);
    let script = format!(
        "U=nbd://127.0.0.1:{port}/vol; qemu-io -f raw -c 'write -P 9 0 1M' $U | grep wrote
        nbdinfo --can multi-conn $U; echo $?
        qemu-io -f raw -c 'sleep 300' $U & sleep 0.1; nbdinfo --size $U; wait"
    );
    let said = run(&daemon.path(""), &script);
    assert!(said.starts_with("wrote 1048576/1048576"), "{said}");
    assert!(said.ends_with("2\n8388608\n"), "{said}");
}
