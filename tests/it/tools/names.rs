//! File names combined with options: the nodes that they describe, and their names.

use super::{Place, assert_same, assert_same_disks};

/// A raw file of ones, an overlay of it and one above that, and an image without a backing file.
const IMAGES: [&str; 7] = [
    "qemu-img create -f raw b.raw 1M",
    "qemu-io -f raw -c 'write -P 1 0 1M' b.raw",
    "qemu-img create -f raw x.raw 1M",
    "qemu-io -f raw -c 'write -P 2 0 1M' x.raw",
    "qemu-img create -f qcow2 -b b.raw -F raw top.qcow2",
    "qemu-img create -f qcow2 -b top.qcow2 -F qcow2 top2.qcow2",
    "qemu-img create -f qcow2 alone.qcow2 1M",
];

fn owned(lines: &[&str]) -> Vec<String> {
    lines.iter().map(|&line| line.to_owned()).collect()
}

fn same(prepare: &[String], lines: &[String]) {
    let prepare: Vec<&str> = prepare.iter().map(|line| &**line).collect();
    let lines: Vec<&str> = lines.iter().map(|line| &**line).collect();
    assert_same_disks(&prepare, &lines);
}

#[test]
fn options_beside_a_name_are_merged_with_what_the_name_and_the_headers_say() {
    let opens = [
        "-o driver=raw,file.locking=off x.raw",
        "-o driver=raw,file.align=4096 blkdebug::x.raw",
        "-o driver=raw,file.image.locking=off blkdebug::x.raw",
        "-o driver=raw,file.image.driver=file blkdebug::x.raw",
        "-o driver=blkdebug,align=512 blkdebug::x.raw",
        "-o driver=blkdebug,image.driver=raw,image.file.locking=off x.raw",
        "-o driver=raw,file.driver=blkdebug x.raw",
        "-o driver=raw,file.driver=raw,file.file.locking=off x.raw",
        "-o driver=raw,file.driver=preallocate x.raw",
        "-o driver=raw,file.driver=file file:x.raw",
        "-o driver=raw,file.driver=host_device host_device:x.raw",
        "-o driver=raw,file.driver=host_device x.raw",
        "-o driver=raw,file.driver=null-co x.raw",
        "-o driver=raw,file.driver=null-aio null-co://",
        "-o driver=raw,file.size=1M,file.read-zeroes=on null-co://",
        "-o driver=file,locking=off x.raw",
        "-o driver=file,filename=x.raw x.raw",
        "-o driver=raw,size=64k x.raw",
        "-o driver=raw,file.driver=bogus x.raw",
        "-o driver=bogus x.raw",
        "-o file=foo top.qcow2",
        "-o file.filename=x.raw top.qcow2",
        "-o backing.driver=raw top.qcow2",
        "-o backing.driver=qcow2 top.qcow2",
        "-o backing.driver=raw,driver=qcow2 top.qcow2",
        "-o backing.driver=raw,backing.file.driver=raw top.qcow2",
        "-o backing.driver=bogus top.qcow2",
        "-o backing.driver=file,backing.locking=off top.qcow2",
        "-o backing.driver=blkdebug,backing.image.locking=off top.qcow2",
        "-o backing.file.driver=blkdebug,backing.file.image.locking=off top.qcow2",
        "-o backing.file.locking=off top.qcow2",
        "-o backing.file.filename=x.raw top.qcow2",
        "-o backing.size=64k top.qcow2",
        "-o backing=foo top.qcow2",
        "-o backing.driver=raw top2.qcow2",
        "-o backing.backing.driver=raw top2.qcow2",
        "-o backing.backing.file.locking=off top2.qcow2",
        "-o backing.backing.file.filename=x.raw top2.qcow2",
        "-o backing.file.filename=x.raw alone.qcow2",
        "-o backing.file.filename=top.qcow2,backing.backing.driver=raw alone.qcow2",
        "-o backing.filename=x.raw alone.qcow2",
        "-o driver=qcow2,file.locking=off json:{\"driver\":\"qcow2\",\"file.filename\":\"top.qcow2\"}",
        "-o driver=raw json:{\"driver\":\"qcow2\",\"file.filename\":\"top.qcow2\"}",
        "-o file.filename=x.raw json:{\"driver\":\"raw\",\"file.filename\":\"b.raw\"}",
        "-o backing.file.locking=off json:{\"file.filename\":\"top.qcow2\"}",
        "-o locking=off json:{\"driver\":\"file\",\"filename\":\"x.raw\"}",
    ];
    let lines =
        opens.map(|open| format!("qemu-io -c 'open -r {open}' -c 'read -P 1 0 64k' -c length"));
    same(&owned(&IMAGES), &lines);
}

#[test]
fn image_options_leave_open_what_the_headers_say() {
    let options = [
        "driver=qcow2,file.filename=top.qcow2,backing.driver=raw",
        "driver=qcow2,file.filename=top.qcow2,backing.file.locking=off",
        "driver=qcow2,file.filename=top.qcow2,backing.file.filename=x.raw",
        "driver=qcow2,file.filename=top.qcow2,backing.offset=65536",
        "driver=qcow2,file.filename=top2.qcow2,backing.backing.file.locking=off",
        "driver=qcow2,file.filename=top2.qcow2,backing.driver=raw",
        "file.filename=top.qcow2,backing.driver=raw",
        "driver=raw,file.driver=blkdebug,file.image.filename=x.raw",
        "driver=blkdebug,image.filename=x.raw",
        "driver=copy-on-read,file.driver=qcow2,file.file.filename=top.qcow2,file.backing.driver=raw",
    ];
    let lines = options
        .map(|options| format!("qemu-io --image-opts -c 'read -P 1 0 64k' -c length '{options}'"));
    same(&owned(&IMAGES), &lines);
}

#[test]
fn backing_names_in_json_say_as_much_as_they_want_to() {
    let names = [
        r#"{"driver":"raw","file.filename":"b.raw"}"#,
        r#"{"file.filename":"b.raw"}"#,
        r#"{"file":{"driver":"file","filename":"b.raw"},"size":"64k"}"#,
        r#"{"driver":"raw","file":{"driver":"raw","file":{"filename":"b.raw"}}}"#,
        r#"{"driver":"raw","file":{"driver":"blkdebug","image":{"filename":"b.raw"}}}"#,
    ];
    let mut prepare = owned(&IMAGES);
    let mut lines = Vec::new();
    for (n, name) in names.iter().enumerate() {
        prepare.push(format!("qemu-img create -f qcow2 -u -b 'json:{name}' -F raw {n}.qcow2 1M"));
        let read = "-c 'read -P 1 0 64k'";
        lines.push(format!("qemu-io -r {read} {n}.qcow2"));
        if n < 3 {
            let open = format!("open -r -o backing.file.locking=off {n}.qcow2");
            lines.push(format!("qemu-io -c '{open}' {read}"));
        }
        lines.push(format!("qemu-io -c 'open -r -o backing.driver=raw {n}.qcow2' {read}"));
        lines.push(format!("qemu-img map --output=json {n}.qcow2"));
        lines.push(format!("qemu-img create -f qcow2 -b 'json:{name}' -F raw new{n}.qcow2"));
        lines.push(format!("qemu-img rebase -b 'json:{name}' -F raw alone.qcow2"));
        if !name.contains("size") {
            lines.push(format!("qemu-img commit {n}.qcow2"));
        }
    }
    same(&prepare, &lines);
}

#[test]
fn an_overlay_is_committed_to_where_its_backing_name_says_the_disk_begins() {
    let mut prepare = owned(&IMAGES);
    prepare.push(
        "qemu-img create -f qcow2 -u -F raw -b \
         'json:{\"driver\":\"raw\",\"offset\":65536,\"file.filename\":\"b.raw\"}' o.qcow2 512k"
            .into(),
    );
    let lines = [
        "qemu-io -c 'write -P 9 0 64k' o.qcow2",
        "qemu-img commit o.qcow2",
        "qemu-io -f raw -c 'read -P 1 0 64k' -c 'read -P 9 64k 64k' b.raw",
    ];
    same(&prepare, &owned(&lines));
}

#[test]
fn what_is_given_for_a_data_file_is_merged_with_the_recorded_name() {
    let place = Place::new(true);
    for line in [
        "qemu-img create -f qcow2 -o data_file=d.raw ext.qcow2 1M",
        "qemu-io -c 'write -P 1 0 1M' ext.qcow2",
        "qemu-img create -f raw e.raw 1M",
        "qemu-io -c 'open -o data-file.locking=off ext.qcow2' -c 'read -P 1 0 1M'",
        "qemu-io -c 'open -o data-file.driver=raw ext.qcow2' -c 'read -P 1 0 1M'",
        "qemu-io -c 'open -o data-file.filename=e.raw ext.qcow2' -c 'read -P 0 0 1M'",
        "qemu-io -c 'open -o data-file.driver=blkdebug,data-file.image.driver=file,data-file.image.filename=e.raw ext.qcow2' -c 'read -P 0 0 1M'",
    ] {
        let ended = place.run(line);
        assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
    }
}

#[test]
fn what_reopen_gives_again_is_compared_and_the_rest_is_changed() {
    let mut lines = Vec::new();
    for (image, options) in [
        ("-f raw x.raw", "driver=raw"),
        ("-f raw x.raw", "driver=raw,size=64k"),
        ("-f raw x.raw", "driver=raw,size=64k,offset=512"),
        ("-f raw x.raw", "driver=qcow2"),
        ("-f raw x.raw", "file.driver=file,file.filename=x.raw"),
        ("-f raw x.raw", "bogus=1"),
        ("-f raw x.raw", "file.cache.direct=off"),
        ("-f raw x.raw", "auto-read-only=on"),
        ("-f qcow2 top.qcow2", "driver=qcow2,lazy-refcounts=on"),
        ("-f qcow2 top.qcow2", "l2-cache-size=1M,driver=qcow2"),
        ("-f qcow2 top.qcow2", "driver=raw"),
        ("-f qcow2 top.qcow2", "overlap-check=all,overlap-check.active-l1=off"),
        ("-f qcow2 top.qcow2", "backing.driver=raw"),
        ("-f qcow2 top.qcow2", "backing.size=64k"),
        ("-f file x.raw", "driver=file"),
        ("-f file x.raw", "locking=on"),
        ("-f raw blkdebug::x.raw", "driver=raw,size=1M"),
        ("-f raw null-co://", "driver=raw,size=1M"),
        ("--image-opts driver=raw,size=1M,file.filename=x.raw", "driver=raw,size=512k"),
        (
            "--image-opts driver=raw,size=1M,file.filename=x.raw",
            "file.filename=x.raw,file.driver=file,size=512",
        ),
        ("--image-opts driver=raw,file.filename=x.raw,file.locking=off", "file.locking=off"),
        ("--image-opts driver=null-co,size=1M", "size=2M"),
    ] {
        lines.push(format!("qemu-io -c 'reopen -o {options}' -c length -c 'read 0 512' {image}"));
    }
    same(&owned(&IMAGES), &lines);
}

/// Images in files whose names look like those of protocols.
const COLONS: [&str; 6] = [
    "qemu-img create -f qcow2 b.qcow2 1M",
    "qemu-io -c 'write -P 1 0 1M' b.qcow2",
    "qemu-img create -f qcow2 file:a:b.qcow2 1M",
    "qemu-img create -f qcow2 -b b.qcow2 -F qcow2 file:a:t.qcow2",
    "qemu-img create -f qcow2 -b file:a:t.qcow2 -F qcow2 c.qcow2",
    "qemu-img create -f qcow2 -b c.qcow2 -F qcow2 file:c:t.qcow2",
];

#[test]
fn files_whose_names_have_colons_find_their_backing_files() {
    let mut lines = Vec::new();
    for name in ["file:a:t.qcow2", "./a:t.qcow2", "a:t.qcow2", "c.qcow2", "file:c:t.qcow2"] {
        lines.push(format!("qemu-img info --backing-chain {name}"));
        lines.push(format!("qemu-img info --backing-chain --output=json {name}"));
        lines.push(format!("qemu-img map {name}"));
        lines.push(format!("qemu-io -r -c 'read -P 1 0 64k' {name}"));
        lines.push(format!("qemu-img compare b.qcow2 {name}"));
    }
    same(&owned(&COLONS), &lines);
}

#[test]
fn names_with_colons_are_given_to_every_command() {
    let write = "qemu-io -c 'write -P 3 0 64k' file:c:t.qcow2";
    for line in [
        "qemu-img commit file:c:t.qcow2",
        "qemu-img commit -b file:a:t.qcow2 file:c:t.qcow2",
        "qemu-img commit -b b.qcow2 file:c:t.qcow2",
        "qemu-img rebase -b file:a:b.qcow2 -F qcow2 file:c:t.qcow2",
        "qemu-img rebase -b ./a:b.qcow2 -F qcow2 file:c:t.qcow2",
        "qemu-img rebase -b a:b.qcow2 -F qcow2 file:c:t.qcow2",
        "qemu-img rebase -b b.qcow2 -F qcow2 file:c:t.qcow2",
        "qemu-img create -f qcow2 -b file:a:b.qcow2 -F qcow2 file:e:n.qcow2",
        "qemu-img create -f qcow2 -b b.qcow2 -F qcow2 file:e:n.qcow2",
        "qemu-img convert -O qcow2 -B b.qcow2 -F qcow2 file:c:t.qcow2 file:e:n.qcow2",
        "qemu-img resize file:c:t.qcow2 2M",
        "qemu-img dd if=file:c:t.qcow2 of=file:e:n.raw bs=64k count=1",
    ] {
        let mut prepare = owned(&COLONS);
        prepare.push(write.into());
        same(&prepare, &[line.into(), "qemu-img info --backing-chain file:c:t.qcow2".into()]);
    }
}

#[test]
fn nodes_that_no_plain_name_describes_are_called_by_their_options() {
    let mut lines = Vec::new();
    for name in [
        "blkdebug::x.raw",
        "blkdebug::top.qcow2",
        "blkdebug::blkdebug::x.raw",
        "null-co://",
        r#"json:{"driver":"null-co","size":"64k","read-zeroes":true}"#,
        r#"json:{"driver":"raw","size":65536,"file":{"driver":"file","filename":"x.raw"}}"#,
        r#"json:{"driver":"raw","offset":"512","size":"64k","file.filename":"x.raw"}"#,
        r#"json:{"driver":"raw","file":{"driver":"raw","file":{"filename":"x.raw"}}}"#,
        r#"json:{"driver":"qcow2","file":{"driver":"raw","file":{"filename":"top.qcow2"}}}"#,
        r#"json:{"driver":"qcow2","file":{"driver":"raw","offset":0,"file":{"filename":"top.qcow2"}}}"#,
        r#"json:{"driver":"qcow2","lazy-refcounts":true,"file":{"filename":"top.qcow2"}}"#,
        r#"json:{"driver":"raw","file":{"driver":"blkdebug","align":512,"image":{"driver":"file","filename":"x.raw"}}}"#,
        r#"json:{"driver":"preallocate","file":{"driver":"file","filename":"x.raw"}}"#,
        r#"json:{"driver":"raw","read-only":true,"file":{"driver":"file","filename":"x.raw","locking":"off"}}"#,
        r#"json:{"driver":"raw","size":512,"file":{"driver":"null-co","size":1024}}"#,
        r#"json:{"file.filename":"x.raw","size":512}"#,
    ] {
        lines.push(format!("qemu-img info '{name}'"));
        lines.push(format!("qemu-img info --output=json '{name}'"));
    }
    for options in [
        "driver=raw,size=64k,file.filename=x.raw",
        "driver=raw,file.driver=null-co,file.size=64k",
        "driver=raw,file.driver=blkdebug,file.align=512,file.image.filename=x.raw",
        "size=512,file.filename=x.raw",
    ] {
        lines.push(format!("qemu-img info --image-opts '{options}'"));
    }
    let [ours, theirs] = [true, false].map(Place::new);
    for line in IMAGES {
        assert_eq!((ours.run(line).code, theirs.run(line).code), (Some(0), Some(0)), "{line}");
    }
    for line in &lines {
        let names = |place: &Place| -> Vec<String> {
            let ended = place.run(line);
            assert_eq!(ended.code, Some(0), "{line}: {ended:?}");
            let is_name = |line: &&str| line.contains("image: ") || line.contains("filename\"");
            ended.stdout.lines().filter(is_name).map(str::to_owned).collect()
        };
        assert_eq!(names(&ours), names(&theirs), "{line}");
    }
}

#[test]
fn a_character_device_that_cannot_be_flushed_is_closed_without_an_error() {
    let lines = [
        "qemu-io -f raw -c 'write 0 512' -c flush /dev/null",
        "qemu-io -f raw -c flush /dev/zero",
        "qemu-img info /dev/null",
    ];
    assert_same(&[], &lines);
}

#[test]
fn a_prefix_that_names_the_given_driver_is_no_part_of_the_path() {
    let prepare = ["qemu-img create -f raw plain.raw 64k", "qemu-img create -f raw ./a:b 64k"];
    let mut lines = Vec::new();
    for name in ["file:plain.raw", "file:a:b", "plain.raw", "./a:b"] {
        lines.extend([
            format!("qemu-img info -f file {name}"),
            format!("qemu-img convert -f raw -O file plain.raw {name}2"),
            format!("qemu-img convert -n -f raw -O file plain.raw {name}"),
            format!("qemu-img compare -f raw -F file plain.raw {name}"),
            format!("qemu-io -f file -c 'write -P 5 0 512' {name}"),
        ]);
    }
    same(&owned(&prepare), &lines);
}
