//! The conformance suite, which runs every driver in every configuration that can be built here.
//!
//! Requests of all alignments against the bytes that they should leave; `status`, the fast path and
//! `read` say the same of every byte; what is outside the disk or not permitted is refused.

mod cases;

use crate::disks::{
    REGISTRY, file_on_disk, new_image, nvme_disk, open, open_holding, sim_disk, simulated,
};
use crate::fast_path::FastPath;
use crate::qcow2;
use cases::{ELSEWHERE, cases};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;
use vublk::block::*;
use vublk::io::sim::Disorder;
use vublk::io::{AlignedBuf, Errno, IoVec, Local, Worker, WorkerOptions};
use vublk::options::Map;
use vublk::protocol::sim::{SimDisk, SimOptions};
use vublk_vfio::fake::{Config, Fake, Media};

const LEN: u64 = 48 << 10;

#[test]
fn every_driver_that_can_be_opened_here_is_in_the_suite() {
    let options: Vec<_> = cases().into_iter().map(|case| case.options).collect();
    let tested: BTreeSet<_> = options
        .iter()
        .flat_map(|options| options.split(','))
        .filter_map(|option| option.rsplit_once("driver=").map(|(_, name)| name))
        .collect();
    for entry in REGISTRY.iter().filter(|entry| !ELSEWHERE.contains(&entry.name)) {
        assert!(tested.contains(entry.name), "the driver '{}' has no case", entry.name);
    }
}

#[test]
fn an_entry_says_one_thing_in_one_way() {
    for entry in REGISTRY.iter() {
        let name = entry.name;
        let nodes = entry.options.iter().filter(|option| option.value == "node");
        let shown: BTreeSet<_> = nodes.map(|option| option.name).collect();
        let children: BTreeSet<_> = entry.children.iter().map(|role| role.name()).collect();
        // The drivers of the tests have no help texts.
        assert!(entry.options.is_empty() || shown == children, "{name}: {shown:?} {children:?}");
        assert_eq!(entry.children.is_empty(), entry.kind == Kind::Protocol, "{name}");
        assert!(entry.probe.is_none() || entry.kind == Kind::Format, "{name}");
        assert!(entry.prefixes.is_empty() || !matches!(entry.naming, Naming::Below), "{name}");
        let takes_filename = entry.options.iter().any(|option| option.name == "filename");
        assert!(!entry.takes_paths() || takes_filename, "{name}");
        if let Some(create) = entry.create {
            let takes = |name: &str| create.options.iter().any(|option| option.name == name);
            assert!(takes("size"), "{name}");
            assert!(entry.has_backing() || !entry.records_backing(), "{name}");
            assert_eq!(takes("backing_file"), takes("backing_fmt"), "{name}");
            let modes = create.options.iter().find_map(|option| match option.value {
                ValueType::Preallocation(modes) => Some(Growth::Own(modes)),
                _ => None,
            });
            assert_eq!(modes.unwrap_or(entry.growth), entry.growth, "{name}");
        }
    }
}

#[test]
fn all_drivers_keep_the_contract_on_a_simulated_ring() {
    for case in cases() {
        println!("{}", case.options);
        let (options, keeps) = (case.options.clone(), case.keeps);
        simulated(Disorder::wild(1), |local| suite(local, options, keeps));
        case.check_device();
    }
}

#[test]
fn all_drivers_keep_the_contract_on_a_real_worker() {
    let options = WorkerOptions { poll_max: Duration::ZERO, ..WorkerOptions::default() };
    let worker = Worker::start("conformance", options).unwrap();
    for case in cases() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (options, keeps) = (case.options.clone(), case.keeps);
        worker.send(move |local| {
            let suite = suite(local, options, keeps);
            local.io().spawn(async move {
                suite.await;
                let _ = sender.send(());
            });
        });
        let done = receiver.recv_timeout(Duration::from_secs(60));
        done.unwrap_or_else(|_| panic!("{}: see the worker's message", case.options));
        case.check_device();
    }
}

fn suite(local: &mut Local, options: String, keeps: bool) -> impl Future<Output = ()> + use<> {
    let fast_path = FastPath::attach(local);
    async move {
        let opened = open(&options).await;
        fast_path.serve(&opened.node);
        let expected = vec![0; LEN as usize];
        let mut disk = Disk { node: opened.node.clone(), fast_path, expected, keeps, options };
        disk.check_traits();
        disk.check_facts().await;
        disk.agree().await;
        disk.write_everywhere().await;
        disk.zero_and_discard().await;
        disk.refuse_what_is_outside().await;
        disk.node.flush().await.unwrap();
        disk.fast_path.close();
        let (node, options) = (std::sync::Arc::downgrade(&disk.node), disk.options.clone());
        drop((disk, opened));
        // The fast path releases it, and of its file's locks, in its own time.
        while node.strong_count() > 0 {
            vublk::io::sleep(Duration::from_micros(50)).await;
        }
        refuse_writes_without_permission(&options).await;
    }
}

struct Disk {
    node: std::sync::Arc<Node>,
    fast_path: FastPath,
    expected: Vec<u8>,
    keeps: bool,
    options: String,
}

const SHAPES: [(u64, u64); 14] = [
    (0, 512),
    (512, 1024),
    (0, 4096),
    (4096, 8192),
    (8192, 40960),
    (1, 1),
    (511, 2),
    (4095, 4098),
    (12288, 512),
    (12800, 3584),
    (20480, 20479),
    (30000, 1),
    (LEN - 4096, 4096),
    (LEN - 1, 1),
];

impl Disk {
    fn check_traits(&self) {
        let traits = self.node.traits();
        let Traits { request_align, buffer_align, zero_align, discard_align, .. } = traits;
        for align in [request_align, buffer_align] {
            assert!(align.is_power_of_two(), "{}: {traits:?}", self.options);
        }
        for align in [zero_align, discard_align] {
            let fits = align > 0 && align.is_multiple_of(request_align);
            assert!(fits, "{}: {traits:?}", self.options);
        }
        assert!(request_align <= 2 << 20);
        assert!(traits.max_transfer > 0 && traits.max_transfer.is_multiple_of(request_align));
        assert!(traits.max_segments > 0);
        assert!(traits.max_zero >= zero_align as u64);
        assert!(traits.max_discard >= discard_align as u64);
        assert_eq!(self.node.len(), LEN, "{}", self.options);
    }

    /// Each node is what its driver's entry says, and can do what it says.
    async fn check_facts(&self) {
        for node in self.node.below().into_iter().chain([self.node.clone()]) {
            let driver = node.driver();
            let entry = driver.entry();
            let registered = REGISTRY.get(driver.name()).unwrap();
            assert!(std::ptr::eq(entry, registered), "{}: {}", self.options, entry.name);
            for child in driver.children() {
                let role = child.role();
                assert!(entry.children.contains(&role), "{}: {role}", self.options);
            }
            self.check_features(driver).await;
        }
    }

    async fn check_features(&self, driver: &dyn Driver) {
        let (entry, image) = (driver.entry(), driver.image());
        let what = format!("{}: {}", self.options, entry.name);
        let mut found = Features::empty();
        found.set(Features::COMPRESSION, driver.compress().is_some());
        found.set(Features::BITMAPS, driver.bitmap_store().is_some());
        if let Some(image) = image {
            found.set(Features::SNAPSHOTS, image.snapshots().is_some());
            found.set(Features::CHECKS, image.check(Fix::Nothing, &mut |_: &str| ()).await.is_ok());
            let mut state = [0; 512];
            let state = image.read_machine(0, &IoVec::from_mut(&mut state)).await;
            found.set(Features::MACHINE_STATE, state.is_ok());
        }
        // A repair changes the image.
        found.set(Features::REPAIRS, entry.features.contains(Features::REPAIRS));
        assert_eq!(entry.features, found, "{what}");
        assert_eq!(entry.growth == Growth::Never, image.is_none(), "{what}");
        let Some(image) = image else { return };
        for mode in Preallocation::ALL {
            let grown = image.grow(driver.len(), mode).await.is_ok();
            if let Growth::Own(modes) = entry.growth {
                assert_eq!(grown, modes.contains(&mode), "{what}: {mode:?}");
            }
        }
        let amends = entry.create.is_some_and(|create| !create.amend.is_empty());
        assert!(amends || image.amend(Map::new()).await.is_err(), "{what}");
        assert!(
            entry.has_backing() || image.set_backing(None, None, None).await.is_err(),
            "{what}"
        );
        assert!(entry.has_backing() || image.make_empty().await.is_err(), "{what}");
    }

    fn expect(&mut self, at: u64, bytes: &[u8]) {
        if self.keeps {
            self.expected[at as usize..][..bytes.len()].copy_from_slice(bytes);
        }
    }

    async fn read(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0xaa; len as usize];
        self.node.read(at, &IoVec::from_mut(&mut bytes)).await.unwrap();
        bytes
    }

    /// `read`, `status` and the fast path tell of the bytes that are expected, and of no others.
    async fn agree(&self) {
        let read = self.read(0, LEN).await;
        if let Some(at) = (0..LEN as usize).find(|&at| read[at] != self.expected[at]) {
            let (found, wanted) = (read[at], self.expected[at]);
            panic!("{}: byte {at} is {found}, not {wanted}", self.options);
        }
        for precision in [Precision::Zeroes, Precision::Allocation] {
            for (from, step) in [(0, LEN), (0, 512), (1, 4097)] {
                self.agree_on_status(from, step, precision).await;
            }
        }
        for block in [512, 4096, 16384] {
            for at in (0..LEN).step_by(block as usize) {
                let mut buf = AlignedBuf::new(block as usize, 4096).unwrap();
                buf.fill(0x55);
                let (buf, result) = self.fast_path.transfer(Access::Read, at, buf).await;
                if let Some(result) = result {
                    assert_eq!(result, Ok(()), "{}", self.options);
                    let wanted = &self.expected[at as usize..(at + block) as usize];
                    assert!(buf[..] == *wanted, "{}: fast read at {at}", self.options);
                }
            }
        }
    }

    async fn agree_on_status(&self, from: u64, step: u64, precision: Precision) {
        let mut at = from;
        while at < LEN {
            let want = step.min(LEN - at);
            let extent = self.node.status(at, want, precision).await.unwrap();
            assert!((1..=want).contains(&extent.len), "{}: {extent:?}", self.options);
            assert!(extent.status.intersects(Status::DATA | Status::ZERO), "{extent:?}");
            if extent.status.contains(Status::ZERO) {
                let said = &self.expected[at as usize..(at + extent.len) as usize];
                assert!(said.iter().all(|&b| b == 0), "{}: {at} {extent:?}", self.options);
            }
            at += extent.len;
        }
    }

    async fn write_everywhere(&mut self) {
        for (n, (at, len)) in SHAPES.into_iter().enumerate() {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 3 + i / 200 + n as u64) as u8 | 1).collect();
            let mut segments = bytes.clone();
            let parts: Vec<_> = segments.chunks_mut(1000).map(IoVec::from_mut).collect();
            let list = IoVec::concat(&parts.iter().collect::<Vec<_>>());
            let flags = if n % 3 == 0 { WriteFlags::FUA } else { WriteFlags::empty() };
            self.node.write(at, &list, flags).await.unwrap();
            self.expect(at, &bytes);
            self.agree_near(at, len).await;
        }
        self.agree().await;
        for (n, (at, len)) in SHAPES.into_iter().enumerate() {
            for access in [Access::Write, Access::DurableWrite] {
                let mut buf = AlignedBuf::new(len as usize, 4096).unwrap();
                buf.fill(0x80 | n as u8 | (access == Access::Write) as u8);
                let (buf, result) = self.fast_path.transfer(access, at, buf).await;
                if let Some(result) = result {
                    assert_eq!(result, Ok(()), "{}", self.options);
                    self.expect(at, &buf);
                }
            }
            self.agree_near(at, len).await;
        }
        self.agree().await;
    }

    async fn zero_and_discard(&mut self) {
        for (n, (at, len)) in SHAPES.into_iter().enumerate().rev() {
            let flags = match n % 3 {
                0 => ZeroFlags::empty(),
                1 => ZeroFlags::UNMAP,
                _ => ZeroFlags::UNMAP | ZeroFlags::FUA,
            };
            self.node.zero(at, len, flags).await.unwrap();
            self.expect(at, &vec![0; len as usize]);
            self.agree_near(at, len).await;
            let quick = self.node.zero(at, len, ZeroFlags::NO_FALLBACK).await;
            assert!(matches!(quick, Ok(()) | Err(Errno::ENOTSUP)), "{}: {quick:?}", self.options);
        }
        self.agree().await;

        let ones = vec![1; LEN as usize];
        self.node.write(0, &IoVec::from_ref(&ones), WriteFlags::empty()).await.unwrap();
        self.expect(0, &ones);
        for (at, len) in SHAPES {
            self.node.discard(at, len).await.unwrap();
            // What was asked for may be gone; nothing else is.
            let found = self.read(at, len).await;
            if self.node.traits().abilities.contains(Abilities::DISCARD_ZEROES) {
                assert!(found.iter().all(|&b| b <= 1), "{}: {at}+{len}", self.options);
            }
            self.expect(at, &found);
            self.agree_near(at, len).await;
        }
        self.agree().await;
    }

    /// The bytes of a range and around it are as expected.
    async fn agree_near(&self, at: u64, len: u64) {
        let (start, end) = (at.saturating_sub(4100), (at + len + 4100).min(LEN));
        let read = self.read(start, end - start).await;
        let wanted = &self.expected[start as usize..end as usize];
        assert!(read == wanted, "{}: around {at}+{len}", self.options);
    }

    async fn refuse_what_is_outside(&self) {
        let mut bytes = [0; 4096];
        for at in [LEN - 4095, LEN, LEN + 4096, u64::MAX - 4095, u64::MAX] {
            let list = IoVec::from_mut(&mut bytes);
            let results = [
                self.node.read(at, &list).await,
                self.node.write(at, &list, WriteFlags::empty()).await,
                self.node.zero(at, 4096, ZeroFlags::empty()).await,
                self.node.discard(at, 4096).await,
                self.node.status(at, 4096, Precision::Zeroes).await.map(drop),
            ];
            assert_eq!(results, [Err(Errno::EIO); 5], "{}: at {at}", self.options);
        }
        self.agree().await;
    }
}

async fn refuse_writes_without_permission(options: &str) {
    let opened = open_holding(options, Perm::CONSISTENT_READ).await.unwrap();
    let mut bytes = [0; 4096];
    let list = IoVec::from_mut(&mut bytes);
    opened.node.read(0, &list).await.unwrap();
    let results = [
        opened.node.write(0, &list, WriteFlags::empty()).await,
        opened.node.zero(0, 4096, ZeroFlags::empty()).await,
        opened.node.discard(0, 4096).await,
    ];
    assert_eq!(results, [Err(Errno::EPERM); 3], "{options}");
    drop(opened);

    let read_only = format!("{options},read-only=on");
    assert!(open_holding(&read_only, Perm::WRITE).await.is_err(), "{read_only}");
    if options.starts_with("driver=copy-on-read") {
        // Reading writes.
        let error = open_holding(&read_only, Perm::CONSISTENT_READ).await.err().expect("refused");
        assert_eq!(error.to_string(), "Block node is read-only");
        return;
    }
    let opened = open_holding(&read_only, Perm::CONSISTENT_READ).await.unwrap();
    opened.node.read(0, &list).await.unwrap();
    opened.node.flush().await.unwrap();
    assert!(opened.node.traits().abilities.contains(Abilities::READ_ONLY));
}
