//! `flat`: a small test format on the layer of tables, as unlike qcow2 as the layer allows.
//!
//! It has one flat table of 32-bit entries, the last slice of which is shorter; clusters are appended to the file and
//! never freed.
//!
//! The file may hold anything when it is opened: table and data are behind that, so an image cannot be opened again.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use vublk::block::registry::{DriverEntry, Kind};
use vublk::block::*;
use vublk::cow::{self, *};
use vublk::io::{Errno, InFlight, IoResult, IoVec};
use vublk::options::NodeRef;

pub static ENTRY: DriverEntry = DriverEntry {
    children: &[Role::File],
    ..DriverEntry::new("flat", Kind::Format, |opening, mut options| {
        Box::pin(async move {
            let file: NodeRef = options.take_as("file")?.expect("a test gives a file");
            let file = opening.child(Role::File, file, Perms::NONE).await?;
            let node = file.node();
            let len = node.len();
            let table = len.next_multiple_of(CLUSTER);
            let shape = Shape { cluster_bits: 12, table_bits: 32, entry_bytes: 4 };
            let cache = TableCache::new(0, SLICE, 1).expect("there is memory");
            let entries = len.div_ceil(CLUSTER);
            let first = (table + entries * 4).div_ceil(CLUSTER);
            let traits = Traits {
                abilities: node.traits().abilities & Abilities::READ_ONLY,
                ..node.traits()
            };
            let flat = Flat {
                traits: Traits { zero_align: traits.request_align, ..traits },
                tables: Tables::new(shape, cache),
                children: vec![file],
                len,
                table,
                next: Mutex::new((first, Vec::new())),
                growing: Lock::new(()),
                is_prepared: AtomicBool::new(false),
            };
            Ok(Box::new(flat) as Box<dyn Driver>)
        })
    })
};

const CLUSTER: u64 = 4096;
const SLICE: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq)]
struct Entry(u32);

impl TableEntry for Entry {
    fn from_words(first: u64, _: u64) -> Entry {
        Entry(first as u32)
    }

    fn words(self) -> [u64; 2] {
        [u64::from(self.0), 0]
    }
}

impl Entry {
    fn host(self) -> u64 {
        u64::from(self.0) * CLUSTER
    }
}

struct Flat {
    traits: Traits,
    tables: Tables<Entry>,
    children: Vec<Child>,
    len: u64,
    /// Where the table is.
    table: u64,
    /// The next cluster that was never taken, and those that were given back.
    next: Mutex<(u64, Vec<u64>)>,
    growing: Lock<()>,
    is_prepared: AtomicBool,
}

impl Flat {
    async fn grow(&self, len: u64) -> IoResult {
        let _turn = self.growing.lock().await;
        let node = self.children[0].node();
        if len <= node.driver().len() {
            return Ok(());
        }
        let image = node.driver().image().ok_or(Errno::ENOSPC)?;
        let grown = image.grow(len, Preallocation::Off).await;
        grown.map_err(|error| error.errno().unwrap_or(Errno::ENOSPC))
    }

    fn entries(&self) -> u64 {
        self.len.div_ceil(CLUSTER)
    }
}

impl Format for Flat {
    type Entry = Entry;
    type Bad = ();

    fn tables(&self) -> &Tables<Entry> {
        &self.tables
    }

    fn file_child(&self) -> &Child {
        &self.children[0]
    }

    /// What the file has there before the first write is not a table.
    fn has_table(&self, _: u64) -> bool {
        self.is_prepared.load(Ordering::Acquire)
    }

    fn slice_offset(&self, guest: u64) -> IoResult<u64> {
        Ok(self.table + self.tables.slice_in_table(guest))
    }

    fn slice_len(&self, guest: u64) -> usize {
        let first = self.tables.shape.entry_index(guest) / SLICE as u64 * SLICE as u64;
        (self.entries() - first).min(SLICE as u64) as usize
    }

    fn parse(bytes: &[u8]) -> Entry {
        Entry(u32::from_le_bytes(bytes.try_into().unwrap()))
    }

    fn decode(&self, entry: Entry, at: u64, want: u64) -> Result<Piece, ()> {
        let found = match entry.0 {
            0 => Found::Unallocated { host: None },
            _ => Found::Data { host: entry.host() + at % CLUSTER, exclusive: true },
        };
        Ok(Piece { len: want, found })
    }

    fn bad_entry(&self, _: u64, _: Entry, (): (), _: Access) -> Errno {
        Errno::EIO
    }

    fn table_outside(&self, _: u64) -> Errno {
        Errno::EIO
    }
}

impl Writable for Flat {
    fn store(entry: Entry, bytes: &mut [u8]) {
        bytes.copy_from_slice(&entry.0.to_le_bytes());
    }

    /// The first write makes the table.
    async fn prepare(&self) -> IoResult {
        if !self.is_prepared.load(Ordering::Acquire) {
            self.grow((self.table + self.entries() * 4).next_multiple_of(CLUSTER)).await?;
            self.is_prepared.store(true, Ordering::Release);
        }
        self.tables.end_rest();
        Ok(())
    }
}

impl Journaling for Flat {
    fn refers_to_nothing(&self, entry: Entry) -> bool {
        entry == Entry(0)
    }
}

impl Allocator for Flat {
    async fn take(&self, most: u64) -> IoResult<Taken<'_, Flat>> {
        let mut next = self.next.lock().unwrap();
        let run = match next.1.pop() {
            Some(first) => Run { first, count: 1, is_fresh: false },
            None => {
                let run = Run { first: next.0, count: most.min(3), is_fresh: true };
                next.0 += run.count;
                run
            }
        };
        Ok(Taken::new(self, run, run.offset(12)))
    }

    fn put_back(&self, run: Run) {
        self.next.lock().unwrap().1.extend(run.first..run.first + run.count);
    }
}

impl Writer for Flat {
    async fn ensure_table(&self, _: u64) -> IoResult {
        Ok(())
    }

    fn need(&self, entry: Entry) -> Result<Need, ()> {
        Ok(if entry.0 == 0 { Need::Cluster } else { Need::Nothing })
    }

    fn entry_showing(&self, _: Entry, host: u64, _: std::ops::Range<u64>) -> Entry {
        Entry((host / CLUSTER) as u32)
    }

    fn references(&self, _: Entry) -> Option<Release> {
        None
    }

    async fn write_data(&self, host: u64, from: &IoVec<'_>) -> IoResult {
        self.grow((host + from.len()).next_multiple_of(CLUSTER)).await?;
        let file = cow::file(self);
        file.event(Event::WriteAio).await;
        file.write(host, from, WriteFlags::empty()).await
    }

    fn guest_end(&self, _: u64) -> u64 {
        self.len
    }
}

impl Driver for Flat {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        self.traits
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn children(&self) -> &[Child] {
        &self.children
    }

    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        cow::map(self, inflight, at, want, access)
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(read_range(self, at, into))
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        _: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(write_range(self, at, from))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move {
            write_suspects(self).await?;
            cow::file(self).flush().await
        })
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(status(self, at, len, precision))
    }
}
