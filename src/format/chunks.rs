//! Packed chunks of read-only formats, unpacked off the workers and cached.
//!
//! The kept chunks are bounded in bytes, for each image: [`LIMIT`], or one chunk if that is larger. Memory for a chunk that
//! is being unpacked comes from the disk's budget. Tasks that want the same chunk unpack it once.

use crate::block::Node;
use crate::cow::read_padded;
use crate::io::budget::Budget;
use crate::io::sync::{Mutex, Waiters};
use crate::io::{AlignedBuf, Blocking, Errno, IoResult};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of unpacked chunks that are kept.
const LIMIT: u64 = 32 << 20;
/// What a chunk takes in memory beside its bytes, about.
const OVERHEAD: u64 = 256;

/// An unpacked chunk.
pub type Chunk = Arc<Vec<u8>>;

/// See the module's text.
pub struct Chunks {
    blocking: Blocking,
    room: Arc<Budget>,
    cache: Mutex<Cache>,
}

/// The chunks of an image that are kept, by number.
#[derive(Default)]
struct Cache {
    chunks: BTreeMap<u64, Kept>,
    /// Which chunk was used when.
    by_use: BTreeMap<u64, u64>,
    clock: u64,
    bytes: u64,
    /// Chunks that are being unpacked.
    loading: Vec<u64>,
    waiting: Waiters,
}

struct Kept {
    chunk: Chunk,
    used: u64,
}

/// What a look at the cache comes to.
enum Lookup {
    There(Chunk),
    /// The caller unpacks it.
    Absent,
}

/// A chunk that the holder of this unpacks.
struct Loading<'a> {
    cache: &'a Mutex<Cache>,
    number: u64,
}

impl Chunks {
    /// `blocking`: the work of the image's node.
    pub fn new(blocking: Blocking) -> Chunks {
        Chunks { blocking, room: Budget::of_disk(), cache: Mutex::default() }
    }

    /// The chunk of this number: `len` bytes, which `unpack` makes of those that are stored in a range of the file. What
    /// the file does not have of them reads as zeroes. `scratch`: bytes of memory that `unpack` takes beside both.
    ///
    /// # Errors
    /// EIO where the file ends before the chunk begins; those of `unpack`; I/O failed.
    pub async fn get(
        &self,
        number: u64,
        file: &Node,
        stored: Range<u64>,
        (len, scratch): (usize, u64),
        unpack: impl FnOnce(&[u8], &mut [u8]) -> IoResult + Send + 'static,
    ) -> IoResult<Chunk> {
        let found =
            self.cache.wait_for(|cache| cache.lookup(number).ok_or(&mut cache.waiting)).await;
        if let Lookup::There(chunk) = found {
            return Ok(chunk);
        }
        let loading = Loading { cache: &self.cache, number };
        if stored.start >= file.len() {
            return Err(Errno::EIO);
        }
        let packed = (stored.end - stored.start) as usize;
        let _room = self.room.take((packed + len) as u64 + scratch).await;
        let mut bytes = AlignedBuf::new(packed, 4096).ok_or(Errno::ENOMEM)?;
        read_padded(file, stored.start, &bytes.io_vec()).await?;
        let work = move || {
            let mut chunk = vec![0; len];
            unpack(&bytes[..packed], &mut chunk).map(|()| Arc::new(chunk))
        };
        let chunk = self.blocking.compute(work).await?;
        self.cache.lock().keep(number, &chunk);
        drop(loading);
        Ok(chunk)
    }
}

impl Cache {
    /// None: another task unpacks it.
    fn lookup(&mut self, number: u64) -> Option<Lookup> {
        self.clock += 1;
        if let Some(kept) = self.chunks.get_mut(&number) {
            self.by_use.remove(&kept.used);
            kept.used = self.clock;
            self.by_use.insert(self.clock, number);
            return Some(Lookup::There(kept.chunk.clone()));
        }
        if self.loading.contains(&number) {
            return None;
        }
        self.loading.push(number);
        Some(Lookup::Absent)
    }

    /// Keeps a chunk, and no more than the limit of the others.
    fn keep(&mut self, number: u64, chunk: &Chunk) {
        self.clock += 1;
        let kept = Kept { chunk: chunk.clone(), used: self.clock };
        self.bytes += cost(chunk);
        self.chunks.insert(number, kept);
        self.by_use.insert(self.clock, number);
        while self.bytes > LIMIT && self.chunks.len() > 1 {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            let gone = self.chunks.remove(&oldest);
            self.bytes -= gone.map_or(0, |kept| cost(&kept.chunk));
        }
    }
}

fn cost(chunk: &Chunk) -> u64 {
    chunk.len() as u64 + OVERHEAD
}

impl Drop for Loading<'_> {
    /// Also when it failed or was cancelled: tasks that wait for it try by themselves.
    fn drop(&mut self) {
        let mut cache = self.cache.lock();
        cache.loading.retain(|number| *number != self.number);
        let waiting = cache.waiting.take();
        drop(cache);
        waiting.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(len: usize) -> Chunk {
        Arc::new(vec![0; len])
    }

    #[test]
    fn what_was_not_used_for_longest_goes_when_the_limit_is_reached() {
        let mut cache = Cache::default();
        let quarter = LIMIT as usize / 4 - OVERHEAD as usize;
        (0..4).for_each(|number| cache.keep(number, &chunk(quarter)));
        assert_eq!((cache.bytes, cache.chunks.len()), (LIMIT, 4));
        assert!(matches!(cache.lookup(0), Some(Lookup::There(_))));
        cache.keep(4, &chunk(1));
        let kept: Vec<u64> = cache.chunks.keys().copied().collect();
        assert_eq!(kept, [0, 2, 3, 4]);
        cache.keep(5, &chunk(2 * LIMIT as usize));
        assert_eq!(cache.chunks.keys().copied().collect::<Vec<_>>(), [5], "one may be larger");
        cache.keep(6, &chunk(1));
        assert_eq!((cache.bytes, cache.by_use.len()), (1 + OVERHEAD, 1));
    }

    #[test]
    fn a_chunk_is_unpacked_by_one_task_at_a_time() {
        let cache = Mutex::<Cache>::default();
        assert!(matches!(cache.lock().lookup(3), Some(Lookup::Absent)));
        assert!(cache.lock().lookup(3).is_none(), "another one does it");
        assert!(matches!(cache.lock().lookup(4), Some(Lookup::Absent)));
        drop(Loading { cache: &cache, number: 3 });
        assert!(matches!(cache.lock().lookup(3), Some(Lookup::Absent)), "the first one has failed");
    }
}
