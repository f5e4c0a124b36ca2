//! Read-only formats: bochs, cloop and dmg.
//!
//! Nothing here writes them, so the tests make their images by the specifications; QEMU reads them beside us, but for
//! what it lacks.

use super::{Place, assert_same, fixture};
use base64::Engine;
use std::io::Write;
use std::path::Path;

/// Lines that read an image.
const READS: [&str; 12] = [
    "qemu-img info FILE",
    "qemu-img info --output=json FILE",
    "qemu-img map FILE",
    "qemu-img map --output=json FILE",
    "qemu-img check FILE",
    "qemu-img convert -O raw FILE out.raw",
    "qemu-img convert -f FORMAT -O raw FILE out.raw && qemu-img compare out.raw FILE",
    "qemu-img measure -O qcow2 FILE",
    "qemu-img dd -f FORMAT -O raw bs=1000 skip=1 count=30 if=FILE of=out.raw",
    "qemu-io -r -c 'read -v 4090 20' -c 'read -v 65530 9' -c 'map' -c 'alloc 0 40k' FILE",
    "qemu-img create -q -f qcow2 -b FILE -F FORMAT over.qcow2 && qemu-img map over.qcow2",
    "qemu-img resize FILE 1M",
];

/// Runs lines with both programs on an image, which is `x.FORMAT`.
fn assert_read_alike(format: &str, image: &[u8], lines: &[&str]) {
    let kept = tempfile::tempdir().unwrap();
    let name = format!("x.{format}");
    std::fs::write(kept.path().join(&name), image).unwrap();
    let copy = format!("cp {} .", kept.path().join(&name).display());
    let lines: Vec<String> =
        lines.iter().map(|line| line.replace("FILE", &name).replace("FORMAT", format)).collect();
    assert_same(&[&copy], &lines.iter().map(|line| &**line).collect::<Vec<_>>());
}

/// What our tools say of an image that cannot be opened.
fn refusal(format: &str, image: &[u8]) -> String {
    let place = Place::new(true);
    let name = format!("x.{format}");
    std::fs::write(place.path().join(&name), image).unwrap();
    let ended = place.run(&format!("qemu-img info -f {format} {name}"));
    assert_eq!(ended.code, Some(1), "{ended:?}");
    let start = format!("qemu-img: Could not open '{name}': ");
    let text = ended.stderr.strip_prefix(&start).unwrap_or_else(|| panic!("{ended:?}"));
    assert_eq!(text.lines().count(), 1, "{text}");
    text.trim_end().to_owned()
}

/// The bytes of an image, read by our tools.
fn contents(format: &str, image: &[u8]) -> Option<Vec<u8>> {
    let place = Place::new(true);
    fixture(place.path());
    let name = format!("x.{format}");
    std::fs::write(place.path().join(&name), image).unwrap();
    let ended = place.run(&format!("qemu-img convert -f {format} -O raw {name} out.raw"));
    (ended.code == Some(0)).then(|| std::fs::read(place.path().join("out.raw")).unwrap())
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut to = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    to.write_all(bytes).unwrap();
    to.finish().unwrap()
}

/// Bytes that a packer makes smaller.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n / 700 % 251) as u8).collect()
}

// ---- bochs

const EXTENT: u32 = 65536;

/// A redolog of 1 MiB in which the first extent is the second in the file, and the third the first: of the one every
/// third sector is there, of the other the first and the last.
fn bochs(version: u32) -> Vec<u8> {
    let text = |text: &str, len: usize| {
        let mut bytes = text.as_bytes().to_vec();
        bytes.resize(len, 0);
        bytes
    };
    let mut image =
        [text("Bochs Virtual HD Image", 32), text("Redolog", 16), text("Growing", 16)].concat();
    image.extend([version << 16, 512, 16, 16, EXTENT].map(u32::to_le_bytes).concat());
    if version == 2 {
        image.extend([0; 4]);
    }
    image.extend((1u64 << 20).to_le_bytes());
    image.resize(512, 0);
    let mut catalog = [u32::MAX; 16];
    (catalog[0], catalog[2]) = (1, 0);
    image.extend(catalog.map(u32::to_le_bytes).concat());
    for (value, sectors) in [(1, (0..128).step_by(3).collect::<Vec<_>>()), (100, vec![0, 127])] {
        let (mut bitmap, mut extent) = (vec![0; 512], vec![0; EXTENT as usize]);
        for sector in sectors {
            bitmap[sector / 8] |= 1 << (sector % 8);
            extent[sector * 512..][..512].fill(value + (sector % 50) as u8);
        }
        image.extend(bitmap);
        image.extend(extent);
    }
    image
}

/// An image with other bytes at a place.
fn with(image: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = image.to_vec();
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

#[test]
fn redologs_of_both_versions_are_read_as_qemu_reads_them() {
    for version in [1, 2] {
        assert_read_alike("bochs", &bochs(version), &READS);
    }
    // A size that is no whole sector.
    assert_read_alike("bochs", &with(&bochs(2), 88, &1_000_000u64.to_le_bytes()), &READS);
}

#[test]
fn redologs_that_make_no_sense_are_refused_in_qemus_words() {
    let image = bochs(2);
    for (at, value) in [
        (0, *b"boch"),
        (32, *b"Flat"),
        (48, *b"Undo"),
        (64, 0x3_0000u32.to_le_bytes()),
        (72, 15u32.to_le_bytes()),
        (72, 0x10_0001u32.to_le_bytes()),
        (80, 0u32.to_le_bytes()),
        (80, 256u32.to_le_bytes()),
        (80, 768u32.to_le_bytes()),
        (80, (16u32 << 20).to_le_bytes()),
        (92, 1u32.to_le_bytes()),
    ] {
        let line = ["qemu-img info -f FORMAT FILE", "qemu-io -r -f FORMAT -c 'read 0 512' FILE"];
        assert_read_alike("bochs", &with(&image, at, &value), &line);
    }
    for (image, wanted) in [
        (with(&image, 76, &[0; 4]), "The bitmap size 0 is too small for extents of 65536 bytes"),
        (
            with(&image, 68, &[0, 0, 16, 0]),
            "The catalog ends at 0x100040, past the end of the file",
        ),
    ] {
        let refused = refusal("bochs", &image);
        assert!(refused.starts_with(wanted), "{refused}");
    }
    // An extent past the end of the file.
    assert_eq!(contents("bochs", &with(&image, 512, &[9])), None);
}

// ---- cloop

const CLOOP_SCRIPT: &str =
    "#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n";

/// An image of these blocks, of `size` bytes each.
fn cloop(blocks: &[&[u8]], size: u32) -> Vec<u8> {
    let packed: Vec<Vec<u8>> = blocks.iter().map(|block| zlib(block)).collect();
    let mut image = CLOOP_SCRIPT.as_bytes().to_vec();
    image.resize(128, 0);
    image.extend([size, blocks.len() as u32].map(u32::to_be_bytes).concat());
    let mut at = 136 + 8 * (blocks.len() as u64 + 1);
    image.extend(at.to_be_bytes());
    for block in &packed {
        at += block.len() as u64;
        image.extend(at.to_be_bytes());
    }
    image.extend(packed.concat());
    image
}

#[test]
fn cloop_images_are_read_as_qemu_reads_them() {
    for (len, size) in [(5 * 65536, 65536), (200 * 512, 512), (3 << 20, 1 << 20)] {
        let disk = bytes(len);
        let blocks: Vec<&[u8]> = disk.chunks(size as usize).collect();
        assert_read_alike("cloop", &cloop(&blocks, size), &READS);
    }
}

#[test]
fn the_last_block_of_a_cloop_image_may_be_short_which_qemu_refuses() {
    let disk = bytes(150_000);
    let blocks: Vec<&[u8]> = disk.chunks(65536).collect();
    let mut wanted = disk.clone();
    wanted.resize(3 * 65536, 0);
    assert!(contents("cloop", &cloop(&blocks, 65536)).unwrap() == wanted);
    let short_first = [blocks[2], blocks[0], blocks[1]];
    assert_eq!(contents("cloop", &cloop(&short_first, 65536)), None);
}

#[test]
fn cloop_images_that_make_no_sense_are_refused_in_qemus_words() {
    let disk = bytes(5 * 65536);
    let image = cloop(&disk.chunks(65536).collect::<Vec<_>>(), 65536);
    for (at, bytes) in [
        (128, 0u32.to_be_bytes()),
        (128, 1000u32.to_be_bytes()),
        (128, ((64u32 << 20) + 512).to_be_bytes()),
        (132, (1u32 << 26).to_be_bytes()),
        // The third offset, and the last one.
        (152, 1u32.to_be_bytes()),
        (156, 1u32.to_be_bytes()),
        (176, 1u32.to_be_bytes()),
    ] {
        assert_read_alike("cloop", &with(&image, at, &bytes), &["qemu-img info -f FORMAT FILE"]);
    }
    let many = with(&image, 132, &0x10_0000u32.to_be_bytes());
    assert!(refusal("cloop", &many).starts_with("the offsets of 1048576 blocks end at"));
    for (at, bytes) in [(image.len() - 3, [1, 2, 3]), (300, [1, 2, 3])] {
        assert_eq!(contents("cloop", &with(&image, at, &bytes)), None);
    }
}

// ---- dmg

const ZERO: u32 = 0;
const RAW: u32 = 1;
const IGNORED: u32 = 2;
const ADC: u32 = 0x8000_0004;
const ZLIB: u32 = 0x8000_0005;
const BZIP2: u32 = 0x8000_0006;
const LZFSE: u32 = 0x8000_0007;
const LZMA: u32 = 0x8000_0008;
const COMMENT: u32 = 0x7fff_fffe;
const TERMINATOR: u32 = 0xffff_ffff;

/// A disk image: chunks of a kind, with this many sectors, stored so.
#[derive(Clone)]
struct Dmg {
    chunks: Vec<(u32, u64, Vec<u8>)>,
    /// The tables are in a property list, not in a resource fork.
    is_list: bool,
    /// Sectors that the first table has; the second has the rest.
    split: u64,
    before: usize,
    behind: usize,
}

impl Dmg {
    fn sectors(&self) -> u64 {
        self.chunks.iter().map(|chunk| chunk.1).sum()
    }

    /// The table of some of the chunks, whose data begins at `offset`.
    fn table(chunks: &[(u32, u64, Vec<u8>)], first: u64, mut offset: u64) -> Vec<u8> {
        let mut entries = Vec::new();
        let mut sector = 0u64;
        let end = (TERMINATOR, 0, Vec::new());
        for (kind, sectors, stored) in chunks.iter().chain([&end]) {
            entries.extend([*kind, 0].map(u32::to_be_bytes).concat());
            let numbers = [sector, *sectors, offset, stored.len() as u64];
            entries.extend(numbers.map(u64::to_be_bytes).concat());
            (sector, offset) = (sector + sectors, offset + stored.len() as u64);
        }
        let mut table = [b"mish\0\0\0\x01".to_vec(), first.to_be_bytes().to_vec()].concat();
        table.extend(sector.to_be_bytes());
        table.resize(200, 0);
        table.extend((chunks.len() as u32 + 1).to_be_bytes());
        [table, entries].concat()
    }

    fn tables(&self) -> Vec<Vec<u8>> {
        let (mut sector, mut offset) = (0, 0);
        let cut = self.chunks.iter().position(|(_, sectors, stored)| {
            let is_there = sector >= self.split;
            if !is_there {
                (sector, offset) = (sector + sectors, offset + stored.len() as u64);
            }
            is_there
        });
        let (first, second) = self.chunks.split_at(cut.unwrap_or(self.chunks.len()));
        vec![Self::table(first, 0, 0), Self::table(second, sector, offset)]
    }

    fn resources(&self) -> Vec<u8> {
        let tables = self.tables();
        if !self.is_list {
            let data = tables.iter().flat_map(|table| {
                [(table.len() as u32).to_be_bytes().to_vec(), table.clone()].concat()
            });
            let data: Vec<u8> = data.collect();
            let mut fork = [256, 256 + data.len() as u32, data.len() as u32, 30]
                .map(u32::to_be_bytes)
                .concat();
            fork.resize(256, 0);
            return [fork, data, vec![0; 30]].concat();
        }
        let mut list = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<!DOCTYPE plist PUBLIC \
                        \"-//Apple//DTD PLIST 1.0//EN\" \"http://www.apple.com/DTDs/PropertyList-1.0.dtd\">\n\
                        <plist version=\"1.0\">\n<dict>\n<key>resource-fork</key>\n<dict>\n\
                        <key>blkx</key>\n<array>\n"
            .to_owned();
        for table in tables {
            let text = base64::engine::general_purpose::STANDARD.encode(table);
            let lines: Vec<&str> =
                text.as_bytes().chunks(52).map(|line| std::str::from_utf8(line).unwrap()).collect();
            list += "<dict>\n<key>CFName</key>\n<string>disk (a &amp; b)</string>\n<key>Data</key>\n<data>\n\t\t";
            list += &lines.join("\n\t\t");
            list += "\n</data>\n</dict>\n";
        }
        list += "</array>\n<key>plst</key>\n<array>\n<dict>\n<key>Data</key>\n<data>\nAAAA\n</data>\n\
                 </dict>\n</array>\n</dict>\n</dict>\n</plist>\n";
        list.into_bytes()
    }

    fn image(&self) -> Vec<u8> {
        let mut image = vec![b'p'; self.before];
        image.extend(self.chunks.iter().flat_map(|chunk| chunk.2.iter().copied()));
        let (data, at) = (image.len() - self.before, image.len() as u64);
        let resources = self.resources();
        image.extend(&resources);
        let len = resources.len() as u64;
        let (fork, list) = if self.is_list { ([0, 0], [at, len]) } else { ([at, len], [0, 0]) };
        let mut end = b"koly\0\0\0\x04\0\0\x02\0\0\0\0\x01".to_vec();
        let places = [0, self.before as u64, data as u64, fork[0], fork[1]];
        end.extend(places.map(u64::to_be_bytes).concat());
        end.extend([1u32, 1].map(u32::to_be_bytes).concat());
        end.resize(216, 0);
        end.extend(list.map(u64::to_be_bytes).concat());
        end.resize(492, 0);
        end.extend(self.sectors().to_be_bytes());
        end.resize(512, 0);
        image.extend(end);
        image.extend(vec![b't'; self.behind]);
        image
    }
}

/// An image that QEMU can read all of, and its bytes.
fn sample() -> (Dmg, Vec<u8>) {
    let (a, b, c) = (bytes(40 * 512), bytes(16 * 512), vec![b'r'; 8 * 512]);
    let chunks = vec![
        (ZLIB, 40, zlib(&a)),
        (COMMENT, 0, b"a comment".to_vec()),
        (RAW, 8, c.clone()),
        (ZERO, 20, Vec::new()),
        (IGNORED, 10, Vec::new()),
        (ZLIB, 16, zlib(&b)),
    ];
    let disk = [a, c, vec![0; 30 * 512], b].concat();
    let dmg = Dmg { chunks, is_list: true, split: 48, before: 0, behind: 0 };
    (dmg, disk)
}

#[test]
fn disk_images_are_read_as_qemu_reads_them() {
    let (dmg, _) = sample();
    for (is_list, split, before, behind) in
        [(true, 48, 0, 0), (false, 48, 0, 0), (true, 1000, 700, 100), (false, 78, 3, 1)]
    {
        let dmg = Dmg { is_list, split, before, behind, ..dmg.clone() };
        assert_read_alike("dmg", &dmg.image(), &READS);
    }
    // Over a thousand chunks.
    let part = bytes(4096);
    let many = (0..1500u32).map(|n| match n % 3 {
        0 => (ZERO, 8, Vec::new()),
        1 => (RAW, 8, part.clone()),
        _ => (ZLIB, 8, zlib(&part)),
    });
    let dmg = Dmg { chunks: many.collect(), ..dmg };
    assert_read_alike("dmg", &dmg.image(), &READS[..7]);
}

#[test]
fn chunks_are_unpacked_in_every_way_there_is_which_qemu_lacks() {
    let part = bytes(30 * 512);
    let adc: Vec<u8> =
        part.chunks(128).flat_map(|run| [&[0x7f + run.len() as u8], run].concat()).collect();
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::default());
    bzip2.write_all(&part).unwrap();
    let mut lzfse = Vec::new();
    lzfse_rust::encode_bytes(&part, &mut lzfse).unwrap();
    let mut lzma = std::process::Command::new("xz")
        .args(["-c", "-6"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    lzma.stdin.take().unwrap().write_all(&part).unwrap();
    let lzma = lzma.wait_with_output().unwrap().stdout;
    let chunks = vec![
        (ADC, 30, adc),
        (BZIP2, 30, bzip2.finish().unwrap()),
        (LZFSE, 30, lzfse),
        (LZMA, 30, lzma),
        (ZLIB, 30, zlib(&part)),
    ];
    let dmg = Dmg { chunks, ..sample().0 };
    assert!(contents("dmg", &dmg.image()).unwrap() == part.repeat(5));
    for index in 0..4 {
        let mut wrong = dmg.clone();
        wrong.chunks[index].1 = 31;
        assert_eq!(contents("dmg", &wrong.image()), None, "chunk {index} is too short");
    }
}

#[test]
fn disk_images_that_make_no_sense_are_refused() {
    let (dmg, mut disk) = sample();
    let image = dmg.image();
    assert!(contents("dmg", &image).unwrap() == disk);
    // Of a chunk that is stored in part the rest reads as zeroes.
    let mut short = dmg.clone();
    short.chunks.push((RAW, 2, vec![b'r'; 1000]));
    disk.extend([vec![b'r'; 1000], vec![0; 24]].concat());
    assert!(contents("dmg", &short.image()).unwrap() == disk);
    let end = image.len() - 512;
    for (image, wanted) in [
        (image[..500].to_vec(), "dmg file must be at least 512 bytes long"),
        (with(&image, end, b"koli"), "Could not locate UDIF trailer in dmg file"),
        ([b"encrcdsa".to_vec(), vec![0; 600]].concat(), "Encrypted dmg images are not supported"),
        (
            with(&image, end + 216, &[0; 16]),
            "dmg file has neither a resource fork nor a property list",
        ),
        (with(&image, end + 216, &[1]), "The property list is said to be "),
        (with(&image, end + 224, &[1]), "The property list has "),
        (with(&image, end + 492, &[1]), "The sector count 720575940379"),
    ] {
        let refused = refusal("dmg", &image);
        assert!(refused.starts_with(wanted), "{refused}");
    }
    for (change, wanted) in [
        ((1u32, 200_000_000_000_000_000), "chunk 1 is too far off"),
        ((ZLIB, 131_073), "sector count 131073 for chunk 1 is larger than max (131072)"),
    ] {
        let mut wrong = dmg.clone();
        (wrong.chunks[2].0, wrong.chunks[2].1) = change;
        let image = wrong.image();
        let sectors = image.len() - 20;
        assert_eq!(refusal("dmg", &with(&image, sectors, &100u64.to_be_bytes())), wanted);
    }
    // More sectors than chunks have, a way to pack that nobody knows, and a chunk past the end of the file.
    assert_eq!(contents("dmg", &with(&image, end + 498, &[1])), None);
    let mut unknown = dmg.clone();
    unknown.chunks[0].0 = 0x8000_0009;
    assert_eq!(contents("dmg", &unknown.image()), None);
    assert_eq!(contents("dmg", &with(&image, end + 24, &[0, 0, 1])), None);
}

#[test]
fn images_of_these_formats_are_opened_for_reading_only() {
    let disk = bytes(65536);
    for (format, image) in
        [("bochs", bochs(1)), ("cloop", cloop(&[&disk], 65536)), ("dmg", sample().0.image())]
    {
        let lines = [
            "qemu-io -c 'write 0 512' FILE",
            "qemu-io -f FORMAT -c 'read 0 512' FILE",
            "qemu-img create -f FORMAT new 1M",
            "qemu-img check -r all FILE",
            "qemu-img convert -O FORMAT a.raw new",
        ];
        assert_read_alike(format, &image, &lines);
        let place = Place::new(true);
        std::fs::write(place.path().join("x"), &image).unwrap();
        assert!(Path::new(&place.path().join("x")).exists());
        let ended = place.run(&format!("qemu-io -r -f {format} -c 'read 0 512' x"));
        assert_eq!(ended.code, Some(0), "{ended:?}");
    }
}
