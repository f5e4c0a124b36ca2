//! Advice that the tools add under their own name to QEMU's messages.
//!
//! It suggests what may have been meant, lists what there is, names what is missing, who has an image, and what is
//! left incomplete.

use super::{Place, VUBLK};
use std::process::{Command, Stdio};

/// What a command line says when it fails; each is one of `vublk`'s.
fn said(place: &Place, line: &str) -> String {
    let ended = place.run_program(VUBLK.as_ref(), &super::words(line));
    assert_eq!(ended.code, Some(1), "{line}: {}", ended.stderr);
    ended.stderr
}

#[test]
fn a_misspelt_word_is_answered_with_what_may_have_been_meant() {
    let place = Place::new(true);
    for (line, reported) in [
        (
            "create -f qcow2 -o cluster_siz=64k x 1M",
            "'cluster_siz'\nDid you mean 'cluster_size'?\n",
        ),
        ("create -f qcwo2 x 1M", "'qcwo2'\nDid you mean 'qcow2'?\n"),
        ("create -f tar x 1M", "'tar'\nThe formats are "),
        ("convert -O tar x y", ""),
        ("info -f tar x", "'tar'\nThe formats are "),
        ("info --image-opts driver=file,filenam=x", "Did you mean 'filename' by 'filenam'?\n"),
        ("info --image-opts driver=raw,file.driver=file,file.filename=x,ofset=1", ""),
        (
            "info --backing-chian x",
            "'--backing-chian'\nTry 'vublk --help' for more information\nDid you mean '--backing-chain'?\n",
        ),
        ("daemon --blockdev driver=fil,node-name=a,filename=x", "'fil'\nDid you mean 'file'?\n"),
        ("daemon --blockdev driver=file,nod-name=a,filename=x", ""),
        (
            "daemon --blockdev driver=null-co,node-name=a,sise=1M",
            "'sise' is unexpected\nDid you mean 'size'?\n",
        ),
        (
            "daemon --blockdev driver=null-co,node-name=a,read-onyl=on",
            "Did you mean 'read-only'?\n",
        ),
        (
            "daemon --export vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=s,num-queue=1",
            "Did you mean 'num-queues'?\n",
        ),
        (
            "daemon --export vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=s,writeable=on",
            "Did you mean 'writable'?\n",
        ),
        (
            "daemon --export vhost-user-blk,id=e,nodename=n,addr.type=unix,addr.path=s",
            "Did you mean 'node-name' by 'nodename'?\n",
        ),
        ("daemon --export vhost-user-block,id=e,node-name=n", "Did you mean 'vhost-user-blk'?\n"),
        ("daemon --chardev socket,id=c,pth=x", "'pth'\nDid you mean 'path'?\n"),
        ("daemon --chardev soket,id=c,path=x", "Did you mean 'socket'?\n"),
        ("daemon --object iothred,id=x", "Did you mean 'iothread'?\n"),
    ] {
        let said = said(&place, line);
        assert!(said.contains(reported), "{line}: {said}");
    }
}

#[test]
fn what_qemu_does_not_say_is_not_said_under_its_name() {
    for line in ["qemu-img create -f qcow2 -o cluster_siz=64k x 1M", "qemu-img info -f tar x"] {
        let [ours, theirs] = [true, false].map(|ours| Place::new(ours).run(line));
        assert_eq!(ours, theirs, "{line}");
    }
}

#[test]
fn a_file_that_is_missing_is_named_once_and_its_missing_folder_is_named() {
    let place = Place::new(true);
    let open = "vublk: Could not open 'x.img': No such file or directory\n";
    assert_eq!(said(&place, "info x.img"), open);
    let said = said(&place, "create -q -f raw no/folder/x.img 1M");
    assert!(said.ends_with("No such file or directory\nThere is no folder 'no'.\n"), "{said}");
}

#[test]
fn an_image_that_is_locked_is_reported_of_with_its_holder() {
    let place = Place::new(true);
    assert_eq!(place.run_theirs("qemu-img create -q -f qcow2 d.qcow2 1M").code, Some(0));
    let mut io = Command::new("qemu-io");
    io.arg("d.qcow2").current_dir(place.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut io = io.spawn().unwrap();
    // It asks for commands when it has the image.
    let mut prompt = [0; 8];
    std::io::Read::read_exact(io.stdout.as_mut().unwrap(), &mut prompt).unwrap();
    let said = said(&place, "resize d.qcow2 2M");
    drop(io.stdin.take());
    let id = io.id();
    io.wait().unwrap();
    assert!(said.contains(&format!("It is held by qemu-io (pid {id})\n")), "{said}");
}

#[test]
fn an_image_that_is_there_is_not_overwritten_with_no_clobber() {
    let place = Place::new(true);
    let path = place.path().join("d.img");
    std::fs::write(&path, "mine").unwrap();
    let reported = "vublk: d.img: Could not create 'd.img': File exists\n";
    for format in ["raw", "qcow2"] {
        assert_eq!(said(&place, &format!("create --no-clobber -f {format} d.img 1M")), reported);
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    // A creation that fails leaves no file.
    said(&place, "create --no-clobber -f qcow2 -o cluster_size=3 new.img 1M");
    assert!(!place.path().join("new.img").exists());
    let line = super::words("create -q --no-clobber -f qcow2 new.img 1M");
    assert_eq!(place.run_program(VUBLK.as_ref(), &line).code, Some(0));
    assert_eq!(place.run_theirs("qemu-img check -q new.img").code, Some(0));
}

#[test]
fn an_interrupted_conversion_names_the_image_that_is_incomplete() {
    let place = Place::new(true);
    for line in
        ["qemu-img create -q -f raw d.raw 64M", "qemu-io -f raw -c 'write -P 1 0 64M' d.raw"]
    {
        assert_eq!(place.run_theirs(line).code, Some(0));
    }
    let mut convert = Command::new(VUBLK);
    convert.args(["convert", "-r", "1M", "-f", "raw", "-O", "qcow2", "d.raw", "new.qcow2"]);
    let convert = convert.current_dir(place.path()).stderr(Stdio::piped()).spawn().unwrap();
    while !place.path().join("new.qcow2").exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // SAFETY: the child is ours, and has not been waited for.
    assert_eq!(unsafe { libc::kill(convert.id() as i32, libc::SIGINT) }, 0);
    let ended = convert.wait_with_output().unwrap();
    let signal = std::os::unix::process::ExitStatusExt::signal(&ended.status);
    assert_eq!(signal, Some(libc::SIGINT), "{ended:?}");
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(said, "vublk: interrupted: 'new.qcow2' is incomplete\n");
}
