//! Overlays of images that a daemon serves and writes, as in the first step of a snapshot.

use super::Place;
use crate::vhost_user::Daemon;
use vublk_testkit::Options;

/// A daemon that serves an image to a guest that may write.
fn serving(program: &[&str], image: &std::path::Path) -> Daemon {
    let node =
        format!("driver=qcow2,node-name=q,file.driver=file,file.filename={}", image.display());
    let export =
        "type=vhost-user-blk,id=e0,node-name=q,writable=on,addr.type=unix,addr.path=DIR/e0.sock";
    let arguments = ["--blockdev", &node, "--export", export];
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start_in(dir, program, &arguments);
    daemon.open(&Options::default()).write(0, &[1; 4096]).unwrap();
    daemon
}

#[test]
fn an_overlay_is_created_over_an_image_that_is_being_served() {
    let lines = [
        "qemu-img create -f qcow2 -F qcow2 -b q.qcow2 a.qcow2",
        "qemu-img create -f qcow2 -F qcow2 -b q.qcow2 b.qcow2 16M",
        // The format is not told, and has to be looked for.
        "qemu-img create -f qcow2 -b q.qcow2 c.qcow2",
        // The served image is two images down.
        "qemu-img create -f qcow2 -F qcow2 -b over.qcow2 d.qcow2",
        "qemu-img create -f qcow2 -o extended_l2=on,preallocation=full -F qcow2 -b q.qcow2 e.qcow2",
        "qemu-img create -f qcow2 -F qcow2 -o backing_file=q.qcow2 f.qcow2",
        "qemu-img create -f qcow2 -F qcow2 -b 'json:{\"driver\":\"qcow2\",\"force-share\":false,\
         \"file\":{\"driver\":\"file\",\"filename\":\"q.qcow2\",\"locking\":\"on\"}}' g.qcow2",
        // Whoever reads or writes it is kept out, as before.
        "qemu-img info q.qcow2",
        "qemu-img convert -O qcow2 -F qcow2 -B q.qcow2 plain.qcow2 h.qcow2",
        "qemu-img rebase -F qcow2 -b q.qcow2 plain.qcow2",
    ];
    let ours = [env!("CARGO_BIN_EXE_vublk"), "daemon"];
    for daemon in [&["qemu-storage-daemon"][..], &ours] {
        let ended = [true, false].map(|ours| {
            let place = Place::new(ours);
            for line in [
                "qemu-img create -q -f qcow2 q.qcow2 8M",
                "qemu-img create -q -f qcow2 plain.qcow2 8M",
                "qemu-img create -q -f qcow2 -F qcow2 -b q.qcow2 over.qcow2",
            ] {
                assert_eq!(place.run_theirs(line).code, Some(0), "{line}");
            }
            let mut served = serving(daemon, &place.path().join("q.qcow2"));
            let ended = lines.map(|line| (line, place.run(line)));
            served.assert_serves(0);
            ended
        });
        let [ours, theirs] = ended;
        for (ours, theirs) in ours.into_iter().zip(theirs) {
            assert_eq!(ours, theirs, "{daemon:?}");
        }
    }
}
