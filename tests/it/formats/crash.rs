//! Crashes of a machine with an image open.
//!
//! The next opening repairs the image, and each sector holds what was last flushed or something written since.

use crate::disks::{crashes, seed, simulated};
use crate::qcow2::sim::{Image, disk, passing};
use std::process::{Command, Output};
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{self, IoVec};
use vublk::protocol::sim::SimOptions;

/// A kind of image, and where on its disk the test works.
pub struct Kind {
    pub format: &'static str,
    pub options: &'static str,
    /// Of the disk, in bytes.
    len: u64,
    /// Bytes that the image's file may have.
    pub most: u64,
    /// Where the areas begin that are used, and their bytes.
    pub areas: &'static [u64],
    pub area: u64,
    /// How many crashes are tried after each change.
    crashes: usize,
    /// All that QEMU may find wrong before the image has been opened again.
    unclean: &'static [&'static str],
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

const QED: Kind = Kind {
    format: "qed",
    options: "",
    len: 64 * KIB,
    most: MIB,
    areas: &[0],
    area: 64 * KIB,
    crashes: 8,
    unclean: &[],
};

/// Of blocks of 1 MiB, little around their borders is used.
const VDI: Kind = Kind {
    format: "vdi",
    options: "static=off",
    len: 4 * MIB + 8 * KIB,
    most: 8 * MIB,
    areas: &[0, MIB - 4 * KIB, 2 * MIB - 4 * KIB, 3 * MIB - 4 * KIB, 4 * MIB],
    area: 8 * KIB,
    crashes: 3,
    unclean: &["allocated blocks mismatch"],
};

/// Its log is replayed when it is opened again.
const VHDX: Kind = Kind {
    format: "vhdx",
    options: "block_size=1M",
    most: 26 * MIB,
    crashes: 1,
    unclean: &[],
    ..VDI
};

/// Of grains of 64 KiB, little around their borders is used.
const VMDK: Kind = Kind {
    format: "vmdk",
    options: "zeroed_grain=on",
    len: 4 * 64 * KIB + 8 * KIB,
    most: 4 * MIB,
    areas: &[0, 60 * KIB, 124 * KIB, 188 * KIB, 256 * KIB],
    area: 8 * KIB,
    crashes: 3,
    unclean: &[],
};

const PARALLELS: Kind = Kind {
    format: "parallels",
    options: "cluster_size=1M",
    crashes: 1,
    unclean: &["image was not closed correctly", "space leaked at the end of the image"],
    ..VDI
};

/// The end of its file is put in order when it is opened again.
const VPC: Kind = Kind { format: "vpc", options: "force_size=on", crashes: 2, unclean: &[], ..VDI };

pub const KINDS: [Kind; 12] = [
    Kind { options: "cluster_size=4k,table_size=2", ..QED },
    Kind { options: "cluster_size=8k,table_size=2", ..QED },
    VDI,
    Kind { options: "static=on", ..VDI },
    PARALLELS,
    Kind { options: "cluster_size=32256", ..PARALLELS },
    VHDX,
    Kind { options: "block_size=1M,subformat=fixed,block_state_zero=off", ..VHDX },
    VMDK,
    Kind { options: "zeroed_grain=off", ..VMDK },
    VPC,
    // Its footer is the end of the file, which a crash leaves as long as it may be.
    Kind { options: "force_size=on,subformat=fixed", most: 4 * MIB + 8 * KIB + 512, ..VPC },
];

impl Kind {
    /// A new image's file.
    pub fn image(&self) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", self.format, "-o", self.options]).arg(file.path());
        assert!(command.arg(self.len.to_string()).status().unwrap().success());
        std::fs::read(file.path()).unwrap()
    }

    pub fn over(&self, options: &str) -> String {
        let format = self.format;
        format!("driver={format},discard=unmap,file.{}", options.replace(',', ",file."))
    }

    fn sectors_of_area(&self) -> usize {
        (self.area / SECTOR) as usize
    }

    fn sectors(&self) -> usize {
        self.areas.len() * self.sectors_of_area()
    }

    /// Where a sector lies on the disk.
    fn place(&self, sector: usize) -> u64 {
        let of_area = self.sectors_of_area();
        self.areas[sector / of_area] + (sector % of_area) as u64 * SECTOR
    }

    /// What QEMU says of an image's file.
    pub fn check(&self, file: &[u8]) -> Output {
        let kept = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(kept.path(), file).unwrap();
        let mut command = Command::new("qemu-img");
        // It has no checks of vpc images: it opens them, at least.
        let verb = if self.format == "vpc" { "info" } else { "check" };
        command.args([verb, "-f", self.format]).arg(kept.path()).output().unwrap()
    }
}

/// Requests are whole sectors: a transfer that comes out short tears none.
pub fn sectors(options: &mut SimOptions) {
    options.traits.request_align = 512;
}

/// What each sector may hold: the number of the write that is durable, and of those after it.
type Allowed = Vec<Vec<u8>>;

/// Writes, zeroes, discards and flushes at random. Returns, for each length of the log, what may be found from there on.
async fn work(
    kind: &Kind,
    image: &Image,
    seed: u64,
    changes: impl Fn() -> usize,
) -> Vec<(usize, Allowed)> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut allowed = vec![vec![0]; kind.sectors()];
    let mut history = vec![(0, allowed.clone())];
    for number in 1..=70u8 {
        let of_area = kind.sectors_of_area();
        let area = rng.usize(0..kind.areas.len()) * of_area;
        let first = rng.usize(0..of_area);
        let count = rng.usize(1..=(of_area - first).min(24));
        let (at, len) = (kind.place(area + first), count as u64 * SECTOR);
        let value = if number % 4 == 0 { 0 } else { number };
        let sectors = area + first..area + first + count;
        allowed[sectors].iter_mut().for_each(|sector| sector.push(value));
        history.push((changes(), allowed.clone()));
        match number % 8 {
            0 => image.node.zero(at, len, ZeroFlags::UNMAP).await.unwrap(),
            4 => image.node.zero(at, len, ZeroFlags::empty()).await.unwrap(),
            _ => {
                let bytes = vec![value; len as usize];
                image.node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await.unwrap();
            }
        }
        flush_at_times(image, &mut rng, &mut allowed).await;
        history.push((changes(), allowed.clone()));
        io::sleep(Duration::from_micros(10)).await;
    }
    // The second half of the disk is emptied: closing may give back what it had.
    let half = kind.len / 2 / MIB.min(kind.len / 2) * MIB.min(kind.len / 2);
    for (sector, values) in allowed.iter_mut().enumerate() {
        if kind.place(sector) >= half {
            values.push(0);
        }
    }
    history.push((changes(), allowed.clone()));
    image.node.zero(half, kind.len - half, ZeroFlags::UNMAP).await.unwrap();
    flush_at_times(image, &mut rng, &mut allowed).await;
    history.push((changes(), allowed));
    history
}

async fn flush_at_times(image: &Image, rng: &mut fastrand::Rng, allowed: &mut Allowed) {
    if rng.u8(0..5) == 0 {
        image.node.flush().await.unwrap();
        for sector in allowed {
            *sector = vec![*sector.last().unwrap()];
        }
    }
}

/// What the areas hold after the image was opened to be written, which brings it to order, and closed; and the file
/// then.
fn reopened(kind: &'static Kind, state: &[u8]) -> (Vec<Vec<u8>>, Vec<u8>) {
    let orderly = Disorder { seed: 1, max_delay: Duration::ZERO, short: 0.0, interrupted: 0.0 };
    let (disk, options) = passing(state, kind.most, sectors);
    let (sender, receiver) = std::sync::mpsc::channel();
    simulated(orderly, |_| async move {
        let image = Image::open(&kind.over(&options)).await;
        let mut found = Vec::new();
        for &area in kind.areas {
            let mut bytes = vec![0xff; kind.area as usize];
            image.node.read(area, &IoVec::from_mut(&mut bytes)).await.unwrap();
            found.extend(bytes.chunks(SECTOR as usize).map(<[u8]>::to_vec));
        }
        // The disk cannot be cut.
        let mut say = |line: &str| assert!(line.contains("space leaked at the end"), "{line}");
        let checked = image.node.driver().image().unwrap().check(Fix::Nothing, &mut say).await;
        let checked = checked.unwrap();
        assert_eq!((checked.corruptions, checked.check_errors), (0, 0));
        image.close().await;
        sender.send(found).unwrap();
    });
    (receiver.recv().unwrap(), disk.bytes())
}

#[test]
fn what_was_flushed_survives_every_crash_of_an_image() {
    let seed = seed();
    for (n, kind) in KINDS.iter().enumerate() {
        let what = format!("seed {seed}, {} with {}", kind.format, kind.options);
        let (disk, name) = disk(&kind.image(), kind.most, |options| {
            options.log = true;
            sectors(options);
        });
        let (sender, receiver) = std::sync::mpsc::channel();
        let log_of = disk.clone();
        simulated(Disorder::wild(seed), |_| async move {
            let image = Image::open(&kind.over(&name)).await;
            let history =
                work(kind, &image, seed + n as u64, || log_of.log().changes().len()).await;
            image.close().await;
            sender.send(history).unwrap();
        });
        let history = receiver.recv().unwrap();
        let closed = kind.check(&disk.bytes()).status.code();
        assert!(matches!(closed, Some(0 | 3)), "{what}: it was closed");
        let log = disk.log();
        let mut tried = 0;
        for crash in log.crashes(seed, crashes(kind.crashes)) {
            let known = history.iter().rev().find(|(from, _)| *from <= crash.prefix);
            let (_, allowed) = known.expect("the first holds from the beginning");
            let state = log.image(&crash);
            let (found, file) = reopened(kind, &state);
            for (n, sector) in found.iter().enumerate() {
                let whole = sector.iter().all(|&byte| byte == sector[0]);
                assert!(
                    whole && allowed[n].contains(&sector[0]),
                    "{what}, after {} changes: sector {n} holds {}, not one of {:?}",
                    crash.prefix,
                    sector[0],
                    allowed[n]
                );
            }
            if tried % 100 == 0 {
                let checked = kind.check(&file);
                assert!(matches!(checked.status.code(), Some(0 | 3)), "{what}: {checked:?}");
                if !kind.unclean.is_empty() {
                    let reported = kind.check(&state);
                    let reported =
                        String::from_utf8_lossy(&[reported.stdout, reported.stderr].concat())
                            .into_owned();
                    let mut errors = reported.lines().filter(|line| line.starts_with("ERROR"));
                    assert!(
                        errors.all(|line| kind.unclean.iter().any(|known| line.contains(known))),
                        "{what}: {reported}"
                    );
                }
            }
            tried += 1;
        }
        assert!(tried > 150, "{what}: only {tried} crashes were tried");
    }
}
