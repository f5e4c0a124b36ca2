//! Texts of the man pages besides the options: examples, exit codes, references.

/// The texts of one page.
pub struct Page {
    /// The page's name.
    pub name: &'static str,
    /// What each is for, and its commands, one a line.
    pub examples: &'static [(&'static str, &'static str)],
    pub exit: &'static [(&'static str, &'static str)],
    /// Pages of other programs and commands.
    pub see: &'static [&'static str],
}

/// The texts of a page; those of the last one, without examples, where there are none.
pub fn find(name: &str) -> &'static Page {
    PAGES.iter().find(|page| page.name == name).unwrap_or(&NONE)
}

const OK_OR_ERROR: &[(&str, &str)] =
    &[("0", "Success."), ("1", "An error, reported in one line on standard error.")];

const NONE: Page = Page { name: "", examples: &[], exit: OK_OR_ERROR, see: &[] };

const IMG: &[&str] = &["qemu-img"];

const PAGES: &[Page] = &[
    Page {
        name: "vublk",
        examples: &[(
            "Make an image and serve it to a virtual machine",
            "vublk create -f qcow2 disk.qcow2 10G\nvublk serve -f qcow2 disk.qcow2 --socket disk.sock",
        )],
        see: &["qemu-storage-daemon", "qemu-img"],
        ..NONE
    },
    Page {
        name: "vublk-serve",
        examples: &[
            ("Serve an image", "vublk serve -f raw disk.img --socket disk.sock"),
            (
                "Serve two block devices, and offer metrics",
                "vublk serve -f raw /dev/vg0/a /dev/vg0/b --socket a.sock --socket b.sock --metrics 127.0.0.1:9100",
            ),
            (
                "Attach the disk to a guest of QEMU's, whose memory must be shared; since QEMU 9.2, reconnect=1 is \
                 spelt reconnect-ms=1000",
                "qemu-system-x86_64 -m 4G -object memory-backend-memfd,id=mem,size=4G,share=on \\\n    \
                 -machine memory-backend=mem -chardev socket,id=disk,path=disk.sock,reconnect=1 \\\n    \
                 -device vhost-user-blk-pci,chardev=disk,num-queues=4",
            ),
        ],
        see: &["vublk-daemon", "vublk-top", "qemu-system-x86_64"],
        exit: &[
            ("0", "A signal ended the program: SIGTERM, SIGINT or SIGHUP."),
            ("1", "An error, reported in one line on standard error."),
        ],
    },
    Page {
        name: "vublk-daemon",
        examples: &[
            (
                "Serve a disk, with a monitor",
                "vublk daemon --blockdev driver=file,node-name=f0,filename=disk.img \
                 --blockdev driver=raw,node-name=d0,file=f0 \
                 --export type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path=e0.sock,writable=on \
                 --chardev socket,id=m,path=m.sock,server=on,wait=off --monitor m",
            ),
            (
                "List the drivers, and the options of one",
                "vublk daemon --blockdev help\nvublk daemon --blockdev driver=raw,help",
            ),
        ],
        see: &["vublk-ctl", "vublk-serve", "qemu-storage-daemon"],
        exit: &[
            ("0", "A signal or the command quit ended the program, or it only printed help."),
            ("1", "An error, reported in one line on standard error."),
        ],
    },
    Page {
        name: "vublk-ctl",
        examples: &[
            ("List the exports", "vublk ctl --socket m.sock query-block-exports"),
            ("Make a disk larger", "vublk ctl --socket m.sock block_resize node-name=d0,size=20G"),
            (
                "Add a node, with arguments in JSON",
                "vublk ctl --socket m.sock blockdev-add '{\"driver\": \"null-co\", \"node-name\": \"n\"}'",
            ),
        ],
        see: &["vublk-daemon"],
        ..NONE
    },
    Page {
        name: "vublk-top",
        examples: &[
            (
                "Watch a daemon that was started with --metrics unix:metrics.sock",
                "vublk top --socket metrics.sock",
            ),
            ("Print one interval for a script", "vublk top --socket metrics.sock --once --json"),
        ],
        see: &["vublk-serve"],
        ..NONE
    },
    Page {
        name: "vublk-nvme",
        examples: &[("Use a controller, and give it back", NVME)],
        see: &["vublk-serve"],
        ..NONE
    },
    Page {
        name: "vublk-nvme-list",
        examples: &[("Say more of one controller", "vublk nvme list -v 0000:01:00.0")],
        ..NONE
    },
    Page {
        name: "vublk-nvme-bind",
        examples: &[("Use a controller, and give it back", NVME)],
        see: &["vublk-nvme-unbind"],
        ..NONE
    },
    Page {
        name: "vublk-nvme-unbind",
        examples: &[("Give a controller back to the kernel", "vublk nvme unbind 0000:01:00.0")],
        see: &["vublk-nvme-bind"],
        ..NONE
    },
    Page {
        name: "vublk-amend",
        examples: &[(
            "Change the version of a qcow2 image",
            "vublk amend -o compat=1.1 disk.qcow2",
        )],
        see: IMG,
        ..NONE
    },
    Page {
        name: "vublk-bench",
        examples: &[(
            "Time 10,000 reads at depth 32",
            "vublk bench -c 10000 -d 32 -f raw -t none disk.img",
        )],
        see: IMG,
        ..NONE
    },
    Page {
        name: "vublk-bitmap",
        examples: &[
            ("Add a bitmap", "vublk bitmap --add -g 64k disk.qcow2 backup0"),
            ("Remove it", "vublk bitmap --remove disk.qcow2 backup0"),
        ],
        see: IMG,
        ..NONE
    },
    Page {
        name: "vublk-check",
        examples: &[
            ("Check an image", "vublk check disk.qcow2"),
            ("Give leaked clusters back", "vublk check -r leaks disk.qcow2"),
        ],
        exit: &[
            ("0", "The image is consistent, or was repaired."),
            ("1", "The check could not be made."),
            ("2", "The image is corrupt."),
            ("3", "The image has leaked clusters, and is not corrupt."),
            ("63", "The format has no check."),
        ],
        see: IMG,
    },
    Page {
        name: "vublk-commit",
        examples: &[(
            "Write an overlay's data into its backing file",
            "vublk commit -p overlay.qcow2",
        )],
        see: IMG,
        ..NONE
    },
    Page {
        name: "vublk-compare",
        examples: &[("Compare an image with its copy", "vublk compare -p disk.qcow2 copy.img")],
        exit: &[
            ("0", "The images are identical."),
            ("1", "They differ."),
            ("2", "An image could not be opened."),
            ("3", "What is allocated could not be asked."),
            ("4", "Data could not be read."),
        ],
        see: IMG,
    },
    Page {
        name: "vublk-convert",
        examples: &[
            (
                "Copy an image to a raw file, with progress",
                "vublk convert -p -O raw disk.qcow2 disk.img",
            ),
            (
                "Make a compressed image",
                "vublk convert -c -O qcow2 -o compression_type=zstd disk.img small.qcow2",
            ),
        ],
        see: IMG,
        ..NONE
    },
    Page {
        name: "vublk-create",
        examples: &[
            ("Make an image", "vublk create -f qcow2 disk.qcow2 10G"),
            ("Make an overlay", "vublk create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2"),
            ("List the options of a format", "vublk create -f qcow2 -o help"),
        ],
        see: IMG,
        ..NONE
    },
    Page {
        name: "vublk-dd",
        examples: &[(
            "Copy the first MiB",
            "vublk dd -f raw -O raw bs=1M count=1 if=disk.img of=head.img",
        )],
        see: IMG,
        ..NONE
    },
    Page {
        name: "vublk-info",
        examples: &[
            ("Describe an image and those below it", "vublk info --backing-chain overlay.qcow2"),
            ("For a script, of an image that is in use", "vublk info -U --output=json disk.qcow2"),
        ],
        see: IMG,
        ..NONE
    },
    Page {
        name: "vublk-map",
        examples: &[("List the parts of an image", "vublk map --output=json disk.qcow2")],
        see: IMG,
        ..NONE
    },
    Page {
        name: "vublk-measure",
        examples: &[("How large a volume must be", "vublk measure -O qcow2 disk.img")],
        see: IMG,
        ..NONE
    },
    Page {
        name: "vublk-rebase",
        examples: &[
            (
                "Give an overlay another backing file",
                "vublk rebase -b new.qcow2 -F qcow2 overlay.qcow2",
            ),
            ("Make it independent", "vublk rebase -b '' overlay.qcow2"),
        ],
        see: IMG,
        ..NONE
    },
    Page {
        name: "vublk-resize",
        examples: &[
            ("Make a disk 10 GiB larger", "vublk resize -f raw disk.img +10G"),
            (
                "Make it smaller, which loses the data beyond the new end",
                "vublk resize --shrink disk.qcow2 5G",
            ),
        ],
        see: IMG,
        ..NONE
    },
    Page {
        name: "vublk-snapshot",
        examples: &[
            ("Make a snapshot", "vublk snapshot -c before disk.qcow2"),
            ("Revert the disk to it", "vublk snapshot -a before disk.qcow2"),
        ],
        see: IMG,
        ..NONE
    },
    Page {
        name: "vublk-io",
        examples: &[(
            "Write a pattern, and read it back",
            "vublk io -f raw -c 'write -P 7 0 64k' -c 'read -P 7 0 64k' disk.img",
        )],
        see: &["qemu-io"],
        ..NONE
    },
];

const NVME: &str = "vublk nvme list\nvublk nvme bind 0000:01:00.0\n\
                    vublk serve -f raw nvme://0000:01:00.0/1 --socket disk.sock\n\
                    vublk nvme unbind 0000:01:00.0";
