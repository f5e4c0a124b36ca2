//! Images of fixed size: the bytes of the disk, and a footer behind them.

use super::footer::{self, Footer};
use crate::block::*;
use crate::cow::{read_padded, stored_status};
use crate::io::{InFlight, IoResult, IoVec};
use crate::options::Map;

/// An open image.
pub struct Fixed {
    file: [Child; 1],
    /// Of the disk, in bytes. The file has more.
    size: u64,
    /// The options that were given beside the file.
    asked: Map,
    is_writable: bool,
}

impl Fixed {
    /// The disk of `size` bytes at the beginning of a file.
    ///
    /// # Errors
    /// The file is too short.
    pub fn new(file: Child, size: u64, asked: Map, is_writable: bool) -> Result<Fixed, Error> {
        let len = file.node().driver().len();
        let room = len.div_ceil(SECTOR) * SECTOR - footer::LEN as u64;
        if size > room {
            return Err(Error::new(format!(
                "VHD footer: the disk has {size} bytes, and the file has only {room} before the footer"
            )));
        }
        Ok(Fixed { file: [file], size, asked, is_writable })
    }

    /// Of `len` bytes from `at` on, how many are the disk's: a request that was rounded out to the alignment may go on
    /// beyond it, to the footer.
    fn clamp(&self, at: u64, len: u64) -> u64 {
        len.min(self.size.saturating_sub(at))
    }

    async fn read_inside(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        let node = self.file[0].node();
        node.event(Event::ReadAio).await;
        let len = self.clamp(at, into.len());
        into.slice(len, into.len() - len).zero();
        read_padded(&node, at, &into.slice(0, len)).await
    }

    async fn write_inside(&self, at: u64, from: &IoVec<'_>, flags: WriteFlags) -> IoResult {
        let node = self.file[0].node();
        node.event(Event::WriteAio).await;
        node.write(at, &from.slice(0, self.clamp(at, from.len())), flags).await
    }
}

impl Driver for Fixed {
    fn entry(&self) -> &'static DriverEntry {
        &super::ENTRY
    }

    /// What is rounded out to a larger alignment than a sector would be the footer's.
    fn traits(&self) -> Traits {
        let file = self.file[0].node().traits();
        let fits = self.size.is_multiple_of(file.request_align.into());
        let (request_align, buffer_align) =
            if fits { (file.request_align, file.buffer_align) } else { (1, 1) };
        let keeps = |align: u32| match self.size.is_multiple_of(align.into()) {
            true => align,
            false => request_align,
        };
        let abilities = match self.is_writable {
            true => file.abilities - Abilities::GROW,
            false => Abilities::READ_ONLY,
        };
        Traits {
            request_align,
            buffer_align,
            zero_align: keeps(file.zero_align),
            discard_align: keeps(file.discard_align),
            abilities,
            ..file
        }
    }

    fn len(&self) -> u64 {
        self.size
    }

    fn children(&self) -> &[Child] {
        &self.file
    }

    fn filename(&self) -> Option<String> {
        self.file[0].node().driver().filename()
    }

    fn own_options(&self) -> Map {
        self.asked.clone()
    }

    fn map<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        if at + want > self.size {
            return Mapping::slow(want);
        }
        self.file[0].fast(inflight).map(inflight, at, want, access)
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(self.read_inside(at, into))
    }

    fn write<'a>(
        &'a self,
        at: u64,
        from: &'a IoVec<'a>,
        flags: WriteFlags,
    ) -> LocalFuture<'a, IoResult> {
        Box::pin(self.write_inside(at, from, flags))
    }

    fn zero<'a>(&'a self, at: u64, len: u64, flags: ZeroFlags) -> LocalFuture<'a, IoResult> {
        // The disk stays allocated.
        let flags = flags - ZeroFlags::UNMAP;
        Box::pin(async move { self.file[0].node().zero(at, self.clamp(at, len), flags).await })
    }

    /// The disk stays allocated.
    fn discard<'a>(&'a self, _: u64, _: u64) -> LocalFuture<'a, IoResult> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(async move { self.file[0].node().flush().await })
    }

    fn child_perms(&self, _: usize, own: Perms) -> Perms {
        Perms::format(own)
    }

    fn hand_over(&self) -> Option<&dyn HandOver> {
        Some(self)
    }

    fn status(&self, at: u64, len: u64, precision: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        Box::pin(async move {
            let node = self.file[0].node();
            let (len, status) = match precision {
                Precision::Allocation => (len, Status::DATA | Status::ALLOCATED),
                _ => stored_status(&node, at, len, precision).await?,
            };
            Ok(Extent { len, status, place: Some(Place { child: Some(0), offset: at }) })
        })
    }

    fn image(&self) -> Option<&dyn Image> {
        Some(self)
    }
}

impl HandOver for Fixed {}

impl Image for Fixed {
    fn resize(&self, _: u64, _: bool) -> LocalFuture<'_, Result<(), Error>> {
        let error = Error::new("Image format driver does not support resize");
        Box::pin(std::future::ready(Err(error)))
    }

    fn grow(&self, len: u64, _: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        self.resize(len, false)
    }

    fn allocated(&self) -> LocalFuture<'_, IoResult<u64>> {
        allocated_in(self.file[0].node())
    }

    /// There is only the footer, without which the image does not open.
    fn check<'a>(
        &'a self,
        _: Fix,
        _: &'a mut dyn FnMut(&str),
    ) -> LocalFuture<'a, Result<CheckReport, Error>> {
        Box::pin(async move {
            let _: Footer = footer::read(&self.file[0].node()).await?.footer;
            Ok(CheckReport::default())
        })
    }
}
