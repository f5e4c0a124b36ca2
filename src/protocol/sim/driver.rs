//! The driver over a simulated disk, which asserts that requests obey [`crate::block::driver`].

use super::*;

/// How the driver's requests look as fallocate modes on the ring.
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
pub(super) const ZERO_UNMAP: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// With FALLOC_FL_NO_HIDE_STALE, which libc does not name: what is read afterwards is not defined.
pub(super) const DISCARD: i32 = ZERO_UNMAP | 4;

/// The driver: one opening of a disk.
pub(super) struct Sim {
    pub(super) disk: Arc<Disk>,
    pub(super) fd: SimFd,
    /// As of an fsync: what it was to make durable is not.
    pub(super) flush_failed: AtomicBool,
}

impl Sim {
    fn traits(&self) -> &Traits {
        &self.disk.options.traits
    }

    /// Whether operations go through the ring, which reorders them.
    fn is_reordered(&self, io: &io::Io) -> bool {
        io.is_simulated() && !self.disk.options.at_once
    }

    /// Holds a transfer to the contract.
    fn check_transfer(&self, at: u64, segments: &[libc::iovec]) {
        let traits = self.traits();
        let len: u64 = segments.iter().map(|s| s.iov_len as u64).sum();
        let unit = SECTOR.max(traits.request_align as u64);
        let end = self.len().next_multiple_of(unit);
        assert!(len > 0 && at + len <= end, "sim: {at}+{len} is outside the disk ({end})");
        let align = traits.request_align as u64;
        assert!((at | len).is_multiple_of(align), "sim: {at}+{len} is not aligned to {align}");
        assert!(len <= traits.max_transfer as u64, "sim: {len} bytes in one transfer");
        assert!(segments.len() <= traits.max_segments as usize, "sim: {} segments", segments.len());
        let lengths = traits.buffer_align.min(traits.request_align) as usize;
        for segment in segments {
            let base = segment.iov_base as usize;
            assert!(base.is_multiple_of(traits.buffer_align as usize), "sim: memory at {base:#x}");
            let len = segment.iov_len;
            assert!(len.is_multiple_of(lengths), "sim: a segment of {len} bytes");
        }
    }

    /// Makes the disk as long as a write that may do so wants it.
    fn grow(&self, end: u64) -> IoResult {
        assert!(self.traits().abilities.contains(Abilities::GROW), "sim: it cannot grow");
        let unit = SECTOR.max(self.traits().request_align as u64);
        if end > self.disk.room().next_multiple_of(unit) {
            return Err(Errno::ENOSPC);
        }
        self.disk.len.fetch_max(end, Ordering::SeqCst);
        Ok(())
    }

    /// Holds a zero or discard request to the contract.
    fn check_range(&self, at: u64, len: u64, align: u32, most: u64, needs: Abilities) {
        let end = self.len().next_multiple_of(SECTOR);
        assert!(len > 0 && at + len <= end, "sim: {at}+{len} is outside the disk ({end})");
        assert!(
            (at | len).is_multiple_of(align as u64),
            "sim: {at}+{len} is not aligned to {align}"
        );
        assert!(len <= most, "sim: {len} bytes at once");
        assert!(self.traits().abilities.contains(needs), "sim: it cannot {needs:?}");
    }

    /// An operation on a real ring: performed here, faults waited for.
    async fn perform(&self, op: &SimOp<'_>) -> IoResult<u64> {
        let mut ticket = 0;
        loop {
            match self.disk.execute(op, &mut ticket) {
                Executed::Now(result) => return result,
                Executed::After(time) => io::sleep(time).await,
                Executed::Hung => io::sleep(Duration::from_micros(100)).await,
            }
        }
    }

    async fn allocate(&self, mode: i32, at: u64, len: u64) -> IoResult {
        if self.is_reordered(&io::current()) {
            return io::fallocate(self.fd.as_raw_fd(), mode, at, len).await;
        }
        self.perform(&SimOp::Allocate { mode, offset: at, len }).await.map(drop)
    }
}

impl Driver for Sim {
    fn entry(&self) -> &'static DriverEntry {
        &ENTRY
    }

    fn traits(&self) -> Traits {
        self.disk.options.traits
    }

    fn len(&self) -> u64 {
        self.disk.len.load(Ordering::SeqCst)
    }

    fn map<'a>(&'a self, _: &'a InFlight, at: u64, want: u64, access: Access) -> Mapping<'a> {
        let slow = !self.disk.options.fast
            || access != Access::Read
                && at + want > self.len().next_multiple_of(SECTOR.max(self.traits().request_align as u64))
            || access == Access::DurableWrite && !self.traits().abilities.contains(Abilities::FUA)
            // On a real ring only the slow path can wait.
            || self.disk.waits.load(Ordering::SeqCst) && !self.is_reordered(&io::current());
        if slow {
            return Mapping::slow(want);
        }
        let data = Target::Data { leaf: self, offset: at };
        match access {
            Access::Read => match self.disk.run(at, want) {
                (sector::DATA, len) => Mapping { len, target: data },
                (_, len) => Mapping { len, target: Target::Zero },
            },
            _ => Mapping { len: want, target: data },
        }
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        self.check_transfer(at, into.as_raw());
        Box::pin(async move {
            if self.is_reordered(&io::current()) {
                return io::read(self.fd.as_raw_fd(), at, into).await;
            }
            let mut done = 0;
            while done < into.len() {
                let into = into.slice(done, into.len() - done);
                done += self.perform(&SimOp::Read { offset: at + done, into }).await?;
            }
            Ok(())
        })
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        flags: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        if flags.contains(WriteFlags::GROW)
            && let Err(errno) = self.grow(at + from.len())
        {
            return Box::pin(std::future::ready(Err(errno)));
        }
        self.check_transfer(at, from.as_raw());
        let fua = flags.contains(WriteFlags::FUA);
        assert!(!fua || self.traits().abilities.contains(Abilities::FUA), "sim: it cannot FUA");
        Box::pin(async move {
            let durable = if fua { Durable::Yes } else { Durable::No };
            if self.is_reordered(&io::current()) {
                return io::write(self.fd.as_raw_fd(), at, from, durable).await;
            }
            let mut done = 0;
            while done < from.len() {
                let from = from.slice(done, from.len() - done);
                let op = SimOp::Write { offset: at + done, from, durable };
                done += self.perform(&op).await?;
            }
            Ok(())
        })
    }

    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        let traits = self.traits();
        if flags.contains(ZeroFlags::GROW)
            && let Err(errno) = self.grow(at + len)
        {
            return Box::pin(std::future::ready(Err(errno)));
        }
        self.check_range(at, len, traits.zero_align, traits.max_zero, Abilities::ZERO);
        let unmap =
            flags.contains(ZeroFlags::UNMAP) && traits.abilities.contains(Abilities::ZERO_UNMAP);
        Box::pin(self.allocate(if unmap { ZERO_UNMAP } else { ZERO }, at, len))
    }

    fn discard<'a>(&'a self, at: u64, len: u64) -> LocalFuture<'a, IoResult> {
        let traits = self.traits();
        self.check_range(at, len, traits.discard_align, traits.max_discard, Abilities::DISCARD);
        Box::pin(self.allocate(DISCARD, at, len))
    }

    fn is_poisoned(&self) -> bool {
        self.flush_failed.load(Ordering::Relaxed)
    }

    fn forgive(&self) {
        self.flush_failed.store(false, Ordering::Relaxed);
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        let covers = self.disk.state.lock().log.changes().len();
        Box::pin(async move {
            if self.is_reordered(&io::current()) {
                io::fsync(self.fd.as_raw_fd()).await?;
            } else {
                let synced = self.perform(&SimOp::Sync).await;
                if synced.is_err() {
                    self.flush_failed.store(true, Ordering::Relaxed);
                }
                synced?;
            }
            let mut state = self.disk.state.lock();
            self.disk.log(&mut state, || Change::Flush { covers });
            Ok(())
        })
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        let place = Some(Place { child: None, offset: at });
        let (status, len) = match (precision, self.disk.run(at, len)) {
            (Precision::Allocation, _) => (Status::DATA, len),
            (Precision::Zeroes, (sector::DATA, len)) => (Status::DATA, len),
            (Precision::Zeroes, (_, len)) => (Status::ZERO, len),
        };
        let extent = Extent { len, status: status | Status::ALLOCATED, place };
        Box::pin(std::future::ready(Ok(extent)))
    }

    /// What it has not done when its process dies it never does.
    fn fence(&self, _: Perms) -> Fence {
        Fence::Storage
    }

    fn leaf(&self) -> Option<&dyn Leaf> {
        Some(self)
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }
}

impl Leaf for Sim {
    unsafe fn start(&self, io: &io::Io, op: Op, token: io::Token) -> Started {
        let (offset, segments, write) = match op {
            Op::Read { offset, segments } => (offset, segments, None),
            Op::Write { offset, segments, durable } => (offset, segments, Some(durable)),
            _ => return Started::Done(Err(Errno::ENOTSUP)),
        };
        // SAFETY: the caller keeps the list in place.
        let segments = unsafe { segments.as_slice() };
        self.check_transfer(offset, segments);
        if self.is_reordered(io) {
            // SAFETY: the caller's promise.
            return unsafe { io.start(self.fd.as_raw_fd(), op, token) };
        }
        // SAFETY: as above.
        let list = unsafe { IoVec::from_raw(segments) };
        let mut done = 0;
        while done < list.len() {
            let (offset, rest) = (offset + done, list.slice(done, list.len() - done));
            let op = match write {
                None => SimOp::Read { offset, into: rest },
                Some(durable) => SimOp::Write { offset, from: rest, durable },
            };
            let result = match self.disk.execute(&op, &mut 0) {
                Executed::Now(result) => result,
                // What waits is sent to the slow path by `map`; a fault that came since passes.
                _ => match self.disk.execute(&op, &mut PASSED.clone()) {
                    Executed::Now(result) => result,
                    _ => Err(Errno::EIO),
                },
            };
            match result {
                Ok(bytes) => done += bytes,
                Err(errno) => return Started::Done(Err(errno)),
            }
        }
        Started::Done(Ok(()))
    }
}

impl Image for Sim {
    fn resize(&self, len: u64, shrink: bool) -> LocalFuture<'_, Result<(), Error>> {
        let old = self.len();
        let result = if self.disk.options.fixed && len != old {
            Err(Error::os("cannot resize a device", Errno::ENOSPC))
        } else if len > self.disk.room() {
            Err(Error::os(format!("cannot grow to {len} bytes"), Errno::ENOSPC))
        } else if len < old && !shrink {
            Err(Error::new(format!("shrinking from {old} to {len} bytes was not allowed")))
        } else {
            let mut state = self.disk.state.lock();
            let end = len.max(old).next_multiple_of(self.disk.options.unit());
            self.disk.zero(&mut state, len.min(old)..end, true);
            self.disk.len.store(len, Ordering::SeqCst);
            Ok(())
        };
        Box::pin(std::future::ready(result))
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        let used = |s: &&AtomicU8| s.load(Ordering::SeqCst) != sector::HOLE;
        let sectors = self.disk.sectors.iter().filter(used).count() as u64;
        Box::pin(std::future::ready(Ok(sectors * SECTOR)))
    }
}
