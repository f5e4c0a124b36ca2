//! Raw: the bytes of the file as they are, or a window of them (`offset`, `size`).
//!
//! Several users on one raw node are legal if they allow each other. Below it, nobody else may write
//! or resize: a second guest on the same file, through another node or another process, destroys its
//! file system. (qemu-storage-daemon allows it; its guests' devices, like us, do not.)

use crate::block::create::{CreateEntry, CreateOption, Creation, Made, ValueType};
use crate::block::pass_through::{PassThrough, status_of};
use crate::block::registry::{DriverEntry, Kind, OptionHelp};
use crate::block::*;
use crate::io::{InFlight, IoResult, IoVec};
use crate::options::{Map, NodeRef, Value};
use serde::Deserialize;

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File],
    options: &[
        OptionHelp { name: "file", value: "node", help: "The node whose bytes these are" },
        OptionHelp { name: "offset", value: "int", help: "Where the disk begins in it, in bytes" },
        OptionHelp { name: "size", value: "int", help: "The disk's length, a multiple of 512" },
    ],
    create: Some(&CreateEntry {
        options: &[CreateOption::new("size", ValueType::Size, "Virtual disk size")],
        create: |creation, options| Box::pin(create(creation, options)),
        amend: &[],
        on_nodes: None,
        measure: Some(|_, size, source| {
            let bytes = source.map_or(size, |node| node.len()).next_multiple_of(SECTOR);
            let measured = Measurement { required: bytes, fully_allocated: bytes, bitmaps: None };
            Box::pin(std::future::ready(Ok(measured)))
        }),
    }),
    probe: Some(Probe::Anything),
    growth: Growth::Below,
    ..DriverEntry::new("raw", Kind::Format, |opening, options| Box::pin(open(opening, options)))
};

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    file: NodeRef,
    offset: Option<i64>,
    size: Option<i64>,
}

struct Raw {
    file: [Child; 1],
    /// Of the disk in the file, in bytes.
    offset: u64,
    /// The disk's length in bytes, a multiple of [`SECTOR`]; none to follow the file's.
    size: Option<u64>,
    /// Both, as far as they were given.
    window: Map,
    /// [`OpenPolicy::readers_share`](crate::block::OpenPolicy).
    readers_share: bool,
}

async fn open(opening: &mut Opening, options: Map) -> Result<Box<dyn Driver>, Error> {
    let options: Options = opening.parse(options)?;
    let offset = non_negative("offset", options.offset)?;
    let size = non_negative("size", options.size)?;
    let readers_share = opening.policy().readers_share;
    let mut window = Map::new();
    for (name, value) in [("offset", offset), ("size", size)] {
        value.and_then(|value| window.insert(name, value));
    }
    let file = opening.child(Role::File, options.file, Perms::NONE).await?;
    let node = file.node();
    let offset = check_window(offset.unwrap_or(0), size, node.len())?;
    Ok(Box::new(Raw { file: [file], offset, size, window, readers_share }))
}

fn non_negative(name: &str, value: Option<i64>) -> Result<Option<u64>, Error> {
    let checked = value.map(u64::try_from).transpose();
    checked.map_err(|_| {
        Error::new(format!("Parameter '{name}' expects a non-negative number below 2^64"))
    })
}

/// Whether the window is in a file of `file_len` bytes; its offset.
fn check_window(offset: u64, size: Option<u64>, file_len: u64) -> Result<u64, Error> {
    if offset > file_len {
        return Err(Error::new(format!(
            "Offset ({offset}) cannot be greater than size of the containing file ({file_len})"
        )));
    }
    let Some(size) = size else { return Ok(offset) };
    if size > file_len - offset {
        // The two blanks are QEMU's.
        return Err(Error::new(format!(
            "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  \
             actual size of the containing file ({file_len})"
        )));
    }
    if !size.is_multiple_of(SECTOR) {
        return Err(Error::new("Specified size is not multiple of 512"));
    }
    Ok(offset)
}

/// The file's traits, but for alignments that the window's offset breaks: a request that is aligned
/// here would not be so there, and the file's node aligns it.
fn traits(file: Traits, offset: u64) -> Traits {
    let keeps = |align: u32| offset.is_multiple_of(align as u64);
    let (request_align, buffer_align) = match keeps(file.request_align) {
        true => (file.request_align, file.buffer_align),
        false => (1, 1),
    };
    Traits {
        request_align,
        buffer_align,
        zero_align: if keeps(file.zero_align) { file.zero_align } else { request_align },
        discard_align: if keeps(file.discard_align) { file.discard_align } else { request_align },
        // A guest's disk has the length that it has.
        abilities: file.abilities - Abilities::GROW,
        ..file
    }
}

impl Raw {
    /// How long the file is to be for a disk of `len` bytes.
    fn len_of_file(&self, len: u64) -> Result<u64, Error> {
        if self.size.is_some() {
            return Err(Error::new("Cannot resize fixed-size raw disks"));
        }
        let len = self.offset.checked_add(len).filter(|&len| i64::try_from(len).is_ok());
        len.ok_or_else(|| Error::new("Disk size too large for the chosen offset"))
    }

    /// Of `len` bytes from `at` on, how many the file has. A request that was rounded out to the alignment may go
    /// beyond the disk's end; what is there is not its own.
    fn clamp(&self, node: &Node, at: u64, len: u64) -> u64 {
        let end = match self.size {
            Some(size) => (self.offset + size).min(node.len()),
            None => node.len(),
        };
        len.min(end.saturating_sub(self.offset + at))
    }
}

impl HandOver for Raw {}

impl PassThrough for Raw {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn below(&self) -> &[Child; 1] {
        &self.file
    }

    fn traits(&self) -> Traits {
        traits(self.node().traits(), self.offset)
    }

    /// Without a size, what the file has from the offset on, in whole sectors: of one that the file
    /// ends in the middle of, a guest could neither read nor write the rest.
    fn len(&self) -> u64 {
        self.size.unwrap_or_else(|| {
            let rest = self.node().len().saturating_sub(self.offset);
            rest - rest % SECTOR
        })
    }

    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        self.file[0].fast(inflight).map(inflight, self.offset + at, want, access)
    }

    async fn read(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        let node = self.node();
        node.event(Event::ReadAio).await;
        let len = self.clamp(&node, at, into.len());
        if len == into.len() {
            return node.read(self.offset + at, into).await;
        }
        into.slice(len, into.len() - len).zero();
        node.read(self.offset + at, &into.slice(0, len)).await
    }

    async fn write(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        let node = self.node();
        node.event(Event::WriteAio).await;
        let len = self.clamp(&node, at, from.len());
        if len == from.len() {
            return node.write(self.offset + at, from, flags).await;
        }
        node.write(self.offset + at, &from.slice(0, len), flags).await
    }

    async fn zero(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        let node = self.node();
        node.zero(self.offset + at, self.clamp(&node, at, len), flags).await
    }

    async fn discard(&self, at: u64, len: u64) -> IoResult {
        let node = self.node();
        node.discard(self.offset + at, self.clamp(&node, at, len)).await
    }

    async fn status(&self, at: u64, len: u64, precision: Precision) -> IoResult<Extent> {
        let extent = status_of(&self.node(), self.offset + at, len, precision).await?;
        Ok(Extent { status: extent.status | Status::ALLOCATED, ..extent })
    }

    fn perms(&self, own: Perms) -> Perms {
        // No metadata of its own, so no more is held than the users hold.
        let mut perms = own;
        let writes = own.held.intersects(Perm::WRITE | Perm::WRITE_UNCHANGED | Perm::RESIZE);
        if writes || !own.held.is_empty() && !self.readers_share {
            perms.shared -= Perm::WRITE | Perm::RESIZE;
        } else if self.offset != 0 || self.size.is_some() {
            perms.shared -= Perm::RESIZE;
        }
        perms
    }

    async fn resize(&self, len: u64, shrink: bool) -> Result<(), Error> {
        self.node().resize(self.len_of_file(len)?, shrink).await
    }

    async fn grow(&self, len: u64, preallocation: Preallocation) -> Result<(), Error> {
        self.node().grow(self.len_of_file(len)?, preallocation).await
    }

    fn own_options(&self) -> Map {
        self.window.clone()
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }
}

/// A raw image is what the protocol makes, in whole sectors.
async fn create(creation: &Creation, mut options: Map) -> Result<Made, Error> {
    if let Some(Value::Int(size)) = options.get_mut("size") {
        *size = *size + (SECTOR as i128 - *size % SECTOR as i128) % SECTOR as i128;
    }
    creation.create_file(options).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{AlignedBuf, Errno, Worker, WorkerOptions};
    use crate::options::keyval;
    use crate::protocol;
    use std::path::PathBuf;
    use std::sync::{Arc, LazyLock};

    /// A file whose bytes tell where they are, and a graph to open it in.
    struct Bench {
        graph: Graph,
        worker: Worker,
        path: PathBuf,
        _dir: tempfile::TempDir,
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at / 7 + at / 512) as u8 | 1).collect()
    }

    impl Bench {
        fn new(len: usize) -> Bench {
            static REGISTRY: LazyLock<Registry> =
                LazyLock::new(|| Registry::new(&[&[&ENTRY], protocol::LIST]));
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk");
            std::fs::write(&path, pattern(len)).unwrap();
            let worker = Worker::start("raw", WorkerOptions::default()).unwrap();
            Bench { graph: Graph::new(&REGISTRY), worker, path, _dir: dir }
        }

        fn open(&self, name: &str, options: &str) -> Result<Arc<Node>, String> {
            let options = keyval::parse(options, Some("driver")).unwrap().options;
            let mut options = Map::from_iter(options);
            options.insert("node-name", name);
            self.graph.open_on(&self.worker, options).map_err(|e| e.to_string())
        }

        /// A file node `f`, and `r` over it.
        fn raw(&self, options: &str) -> Result<Arc<Node>, String> {
            if self.graph.find("f").is_err() {
                self.open("f", &format!("file,filename={}", self.path.display()))?;
            }
            self.open("r", &format!("raw,file=f{options}"))
        }

        fn attach(&self, node: &Arc<Node>) -> Attachment {
            let held = Perm::CONSISTENT_READ | Perm::WRITE;
            self.graph.attach(node, "test", Perms { held, shared: Perm::all() }, None).unwrap()
        }

        fn read(&self, node: &Arc<Node>, at: u64, len: usize) -> Result<Vec<u8>, Errno> {
            let node = node.clone();
            self.worker.block_on(move || async move {
                let mut buf = AlignedBuf::new(len, 1).unwrap();
                buf.fill(0xee);
                node.read(at, &buf.io_vec()).await?;
                Ok(buf.to_vec())
            })
        }

        fn write(&self, node: &Arc<Node>, at: u64, len: usize, byte: u8) -> Result<(), Errno> {
            let node = node.clone();
            self.worker.block_on(move || async move {
                let bytes = vec![byte; len];
                node.write(at, &IoVec::from_ref(&bytes), WriteFlags::empty()).await
            })
        }

        fn resize(&self, node: &Arc<Node>, len: u64) -> Result<(), String> {
            let (graph, node) = (self.graph.clone(), node.clone());
            let result =
                self.worker.block_on(move || async move { graph.resize(&node, len).await });
            result.map_err(|e| e.to_string())
        }
    }

    #[test]
    fn a_window_is_all_that_is_read_and_written() {
        for (offset, size) in [(0, 8192), (512, 4096), (100, 1024), (4096, 512)] {
            let bench = Bench::new(16384);
            let node = bench.raw(&format!(",offset={offset},size={size}")).unwrap();
            let _hold = bench.attach(&node);
            assert_eq!(node.len(), size as u64);
            let mut wanted = pattern(16384);
            assert_eq!(bench.read(&node, 0, size).unwrap(), wanted[offset..][..size]);
            assert_eq!(bench.read(&node, 3, 500).unwrap(), wanted[offset + 3..][..500]);
            bench.write(&node, 0, 7, 0xaa).unwrap();
            bench.write(&node, size as u64 - 9, 9, 0xbb).unwrap();
            assert_eq!(bench.write(&node, size as u64 - 9, 10, 0), Err(Errno::EIO));
            wanted[offset..][..7].fill(0xaa);
            wanted[offset + size - 9..][..9].fill(0xbb);
            assert!(std::fs::read(&bench.path).unwrap() == wanted, "offset {offset}, size {size}");
        }
    }

    #[test]
    fn wrong_windows_are_refused_in_qemus_words() {
        let bench = Bench::new(10240);
        for (options, wanted) in [
            (",size=1000", "Specified size is not multiple of 512"),
            (
                ",size=10240,offset=512",
                "The sum of offset (512) and size (10240) has to be smaller or equal to the  actual \
                 size of the containing file (10240)",
            ),
            (
                ",size=20001",
                "The sum of offset (0) and size (20001) has to be smaller or equal to the  actual \
                 size of the containing file (10240)",
            ),
            (
                ",offset=10241,size=1",
                "Offset (10241) cannot be greater than size of the containing file (10240)",
            ),
            (",size=-1", "Parameter 'size' expects a non-negative number below 2^64"),
            (",size=1M", "Parameter 'size' expects integer"),
            (",bogus=1", "Parameter 'bogus' is unexpected"),
        ] {
            assert_eq!(bench.raw(options).err().as_deref(), Some(wanted), "{options}");
        }
        assert_eq!(bench.raw(",offset=10240").unwrap().len(), 0);
    }

    #[test]
    fn a_disk_is_whole_sectors() {
        let bench = Bench::new(1000);
        let node = bench.raw("").unwrap();
        assert_eq!(node.len(), 1024);
        let mut wanted = pattern(1000);
        wanted.resize(1024, 0);
        assert_eq!(bench.read(&node, 0, 1024).unwrap(), wanted);

        let bench = Bench::new(10240);
        assert_eq!(bench.raw(",offset=1").unwrap().len(), 10240 - 512);
    }

    #[test]
    fn a_window_does_not_let_its_file_change_length() {
        let bench = Bench::new(10240);
        let node = bench.raw(",size=512").unwrap();
        let file = bench.graph.find("f").unwrap();
        let error = bench.resize(&file, 512).unwrap_err();
        assert!(error.contains("permissions 'resize' are both required"), "{error}");
        assert_eq!(bench.resize(&node, 1024).unwrap_err(), "Cannot resize fixed-size raw disks");

        let bench = Bench::new(10240);
        let node = bench.raw("").unwrap();
        let _hold = bench.attach(&node);
        bench.resize(&node, 20480).unwrap();
        assert_eq!(node.len(), 20480);
        assert_eq!(std::fs::metadata(&bench.path).unwrap().len(), 20480);
    }

    #[test]
    fn a_length_set_behind_an_offset_is_the_disks_own() {
        let bench = Bench::new(10240);
        let node = bench.raw(",offset=1024").unwrap();
        bench.resize(&node, 4096).unwrap();
        assert_eq!(node.len(), 4096);
        assert_eq!(std::fs::metadata(&bench.path).unwrap().len(), 5120);
        let error = bench.resize(&node, i64::MAX as u64 - 1000).unwrap_err();
        assert_eq!(error, "Disk size too large for the chosen offset");
    }

    #[test]
    fn users_of_the_disk_get_along_and_others_only_read_its_file() {
        let bench = Bench::new(10240);
        let node = bench.raw("").unwrap();
        let file = bench.graph.find("f").unwrap();
        let _holds = [bench.attach(&node), bench.attach(&node)];
        assert_eq!(file.held(), Perm::CONSISTENT_READ | Perm::WRITE);
        let take = |held| {
            let perms = Perms { held, shared: Perm::all() };
            bench.graph.attach(&file, "test", perms, None).map(drop)
        };
        take(Perm::CONSISTENT_READ).unwrap();
        let error = take(Perm::WRITE).unwrap_err().to_string();
        assert!(error.contains("'write' are both required by test"), "{error}");
    }

    /// The bytes of the file that are locked, as the kernel lists them.
    fn locked_bytes(path: &std::path::Path) -> Vec<u64> {
        use std::os::unix::fs::MetadataExt;
        let inode = format!(":{}", std::fs::metadata(path).unwrap().ino());
        let list = std::fs::read_to_string("/proc/locks").unwrap();
        let lines = list.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let ours = lines.filter(|fields| fields.iter().any(|field| field.ends_with(&inode)));
        let mut bytes: Vec<u64> = ours
            .flat_map(|fields| {
                let [.., first, last] = fields[..] else { panic!("{fields:?}") };
                first.parse().unwrap()..=last.parse().unwrap()
            })
            .collect();
        bytes.sort();
        bytes
    }

    #[test]
    fn the_locks_say_what_is_done_and_that_nobody_else_may_write() {
        // 100 + i for what is held (0 reads, 1 writes), 200 + i for what nobody else may do
        // (1 write, 3 resize).
        let bench = Bench::new(10240);
        let node = bench.raw("").unwrap();
        assert!(locked_bytes(&bench.path).is_empty());
        let holds = [bench.attach(&node), bench.attach(&node)];
        assert_eq!(locked_bytes(&bench.path), [100, 101, 201, 203]);
        drop(holds);
        assert!(locked_bytes(&bench.path).is_empty());
    }

    #[test]
    fn where_bytes_are_is_reported_in_the_files_terms() {
        let bench = Bench::new(10240);
        let node = bench.raw(",offset=1024,size=2048").unwrap();
        let extent = bench.worker.block_on(move || async move {
            node.status(512, 1024, Precision::Zeroes).await.unwrap()
        });
        assert_eq!(extent.len, 1024);
        assert_eq!(extent.place, Some(Place { child: Some(0), offset: 1536 }));
        assert_eq!(extent.status, Status::DATA | Status::ALLOCATED);
    }

    #[test]
    fn an_offset_that_breaks_the_alignment_leaves_it_to_the_file() {
        let file = Traits { request_align: 512, buffer_align: 512, ..Traits::default() };
        let file = Traits { zero_align: 4096, discard_align: 65536, ..file };
        assert_eq!(traits(file, 65536), file);
        let wanted = Traits { discard_align: 512, ..file };
        assert_eq!(traits(file, 4096), wanted);
        let wanted = Traits { zero_align: 512, ..wanted };
        assert_eq!(traits(file, 512), wanted);
        let wanted = Traits { request_align: 1, buffer_align: 1, ..wanted };
        let wanted = Traits { zero_align: 1, discard_align: 1, ..wanted };
        assert_eq!(traits(file, 100), wanted);
    }

    #[test]
    fn a_new_image_is_whole_sectors_and_said_as_qemu_says_it() {
        let bench = Bench::new(0);
        let name = bench.path.display().to_string();
        let file = Map::from_iter([("driver", "file"), ("filename", &name)]);
        let given = crate::options::qemuopts::parse("preallocation=off", None).unwrap().options;
        let registry = bench.graph.registry();
        let creation = Creation::new(registry, "raw", (&name, file), given, Some(1000)).unwrap();
        let line = format!("Formatting '{name}', fmt=raw size=1000 preallocation=off");
        assert_eq!(creation.describe(), line);
        bench.worker.block_on(move || async move { creation.run().await }).unwrap();
        assert_eq!(std::fs::metadata(&bench.path).unwrap().len(), 1024);
    }
}
