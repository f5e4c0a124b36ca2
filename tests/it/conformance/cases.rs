//! The configurations of drivers that the conformance suite runs.

use super::*;

/// A configuration that opens a disk of [`LEN`] zero bytes.
pub(super) struct Case {
    pub(super) options: String,
    /// Whether writes are kept.
    pub(super) keeps: bool,
    /// What the disk lives in.
    hold: Hold,
}

enum Hold {
    Nothing,
    Sim { _disk: SimDisk },
    File { _file: tempfile::NamedTempFile },
    Nvme { fake: Fake },
}

impl Case {
    /// The device found nothing that a driver must not do.
    pub(super) fn check_device(&self) {
        if let Hold::Nvme { fake } = &self.hold {
            assert_eq!(fake.complaints(), Vec::<String>::new(), "{}", self.options);
        }
    }
}

fn case(options: String, hold: Hold) -> Case {
    Case { options, keeps: true, hold }
}

/// Everything that stands at the bottom of a graph.
fn bottoms(len: u64) -> Vec<Case> {
    let mut cases = vec![];
    for (request_align, buffer_align, rest_align) in
        [(1, 1, 1), (512, 4, 512), (512, 512, 4096), (4096, 512, 4096), (4096, 4096, 8192)]
    {
        for (fast, able) in [(true, true), (true, false), (false, true)] {
            let mut options = SimOptions { fast, ..SimOptions::new(len) };
            let traits = &mut options.traits;
            (traits.request_align, traits.buffer_align) = (request_align, buffer_align);
            (traits.zero_align, traits.discard_align) = (rest_align, rest_align);
            (traits.max_transfer, traits.max_segments) = (16384, 3);
            (traits.max_zero, traits.max_discard) = (8192, 16384);
            if !able {
                traits.abilities = Abilities::empty();
            }
            let (disk, options) = sim_disk(options);
            cases.push(case(options, Hold::Sim { _disk: disk }));
        }
    }
    for (block_shift, mdts, able) in [(9, 2, true), (12, 0, true), (12, 1, false)] {
        let namespaces = vec![Media::new(len, block_shift)];
        let optional_commands = if able { Config::default().optional_commands } else { 0 };
        let config = Config { namespaces, mdts, optional_commands, ..Config::default() };
        let (fake, options) = nvme_disk(config);
        cases.push(case(options, Hold::Nvme { fake }));
    }
    for direct in ["off", "on"] {
        let file = file_on_disk(len);
        let path = file.path().display();
        let options = format!("driver=file,filename={path},cache.direct={direct}");
        cases.push(case(options, Hold::File { _file: file }));
    }
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        let file = tempfile::NamedTempFile::new_in(memory).unwrap();
        file.as_file().set_len(len).unwrap();
        let options = format!("driver=file,filename={}", file.path().display());
        cases.push(case(options, Hold::File { _file: file }));
    }
    for name in ["null-co", "null-aio"] {
        for latency in [0, 1000] {
            let options = format!("driver={name},size={len},read-zeroes=on,latency-ns={latency}");
            cases.push(Case { options, keeps: false, hold: Hold::Nothing });
        }
    }
    cases
}

/// Images of qcow2 on disks of several kinds.
fn images() -> Vec<Case> {
    let kinds = [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=4k,compat=0.10",
    ];
    let mut cases = Vec::new();
    for create in kinds {
        let bytes = qcow2::sim::image(LEN, create);
        for (request_align, buffer_align) in [(1, 1), (512, 512), (4096, 4096)] {
            let shape = |options: &mut SimOptions| {
                let traits = &mut options.traits;
                (traits.request_align, traits.buffer_align) = (request_align, buffer_align);
                (traits.zero_align, traits.discard_align) = (request_align, request_align);
                (traits.max_transfer, traits.max_segments) = (16384, 3);
            };
            let (disk, options) = qcow2::sim::disk(&bytes, 1 << 20, shape);
            let options = format!("driver=qcow2{}", qcow2::sim::below("file", &options));
            cases.push(case(options, Hold::Sim { _disk: disk }));
        }
        let file = file_on_disk(0);
        std::fs::write(file.path(), &bytes).unwrap();
        let path = file.path().display();
        let options = format!("driver=qcow2,file.driver=file,file.filename={path}");
        cases.push(case(options, Hold::File { _file: file }));
    }
    cases
}

/// What needs more than its entry says: a block device, for which the tests of host_device make loop devices; an
/// image that compresses, of which each unit is written once; formats that are only read, whose images the tests of the
/// tools make; a file that grows (the model tests have `flat`); a server, for which the tests of nbd start several.
pub(super) const ELSEWHERE: [&str; 7] =
    ["host_device", "compress", "bochs", "cloop", "dmg", "flat", "nbd"];

/// The disk of `lower`, with a node of the driver over it.
fn over_as(entry: &DriverEntry, more: &str, lower: Case) -> Case {
    let role = entry.children[0];
    let lower_options = lower.options.split(',').map(|option| format!("{role}.{option}"));
    let upper = format!("driver={}{more}", entry.name);
    let options = [upper].into_iter().chain(lower_options).collect::<Vec<_>>();
    Case { options: options.join(","), ..lower }
}

/// A new image of a format.
fn image_of(entry: &'static DriverEntry) -> Case {
    let (file, options) = new_image(entry, LEN);
    case(options, Hold::File { _file: file })
}

/// Each driver with the defaults of its options: those that stand on another over every bottom, but for formats
/// whose images have to be made first.
fn plain() -> Vec<Case> {
    let mut cases = bottoms(LEN);
    for entry in REGISTRY.iter().filter(|entry| !ELSEWHERE.contains(&entry.name)) {
        match (entry.kind, entry.create) {
            (Kind::Protocol, _) => {}
            (Kind::Format, Some(_)) if !entry.is_raw() => cases.push(image_of(entry)),
            _ => cases.extend(bottoms(LEN).into_iter().map(|lower| over_as(entry, "", lower))),
        }
    }
    cases
}

/// Every driver as its entry has it, and what its options and the nodes below it change.
pub(super) fn cases() -> Vec<Case> {
    let over = |upper: &str, lower: Case| {
        let (name, more) = upper.split_at(upper.find(',').unwrap_or(upper.len()));
        over_as(REGISTRY.get(name).unwrap(), more, lower)
    };
    let mut cases = plain();
    for offset in [512, 4096, 12288] {
        let window = format!("raw,offset={offset},size={LEN}");
        cases.extend(bottoms(LEN + 20480).into_iter().map(|lower| over(&window, lower)));
    }
    for lower in bottoms(LEN) {
        cases.push(over("copy-on-read", over("layer", lower)));
    }
    let steps = "preallocate,prealloc-align=4096,prealloc-size=4096";
    cases.extend(bottoms(LEN).into_iter().map(|lower| over(steps, lower)));
    cases.extend(images());
    for limits in [
        ",align=4096",
        ",align=16384,max-transfer=16384",
        ",align=8192,opt-write-zero=24576,max-write-zero=24576,opt-discard=40960,max-discard=40960",
        ",align=512,max-transfer=1024,max-write-zero=49152,max-discard=512",
    ] {
        let upper = format!("blkdebug{limits}");
        for lower in bottoms(LEN) {
            // Limits that do not suit what is below are refused, which a test of blkdebug shows.
            let has_limits = ["sim", "nvme"].iter().any(|name| lower.options.contains(name));
            if !limits.ends_with("max-discard=512") || !has_limits {
                cases.push(over(&upper, lower));
            }
        }
    }
    for case in &mut cases {
        case.options += ",discard=unmap";
    }
    cases
}
