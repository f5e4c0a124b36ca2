//! Allocation of clusters at the end of the file ([`crate::cow::Appending`]).
//!
//! The file grows in larger steps than needed, as the options say.

use super::Parallels;
use super::catalogue::Named;
use super::header::Header;
use crate::block::{Node, Preallocation, ZeroFlags};
use crate::cow::{
    Allocator, Appending, FileEnd, FileExtent, Run, Taken, file, lengthen, take_at_end,
};
use crate::io::{Errno, IoResult};
use crate::options::{Map, Size, Value};
use serde::Deserialize;

/// Bytes that the file gets longer at once, unless the options say something else.
const AHEAD: u64 = 128 << 20;

/// How the file gets longer, as `prealloc-mode` has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// New space is allocated.
    #[default]
    Falloc,
    /// New space is a hole.
    Truncate,
}

/// How the file gets longer.
pub struct Preallocating {
    mode: Mode,
    ahead: u64,
}

impl Preallocating {
    pub fn new(mode: Mode, ahead: Option<Size>) -> Preallocating {
        Preallocating { mode, ahead: ahead.map_or(AHEAD, |size| size.0) }
    }
}

/// The options that say the same.
pub fn options(mode: Mode, ahead: Option<Size>) -> Map {
    let mode = match mode {
        Mode::Falloc => "falloc",
        Mode::Truncate => "truncate",
    };
    let mut options = Map::from_iter([("prealloc-mode", mode)]);
    if let Some(size) = ahead {
        options.insert("prealloc-size", Value::from(size.0));
    }
    options
}

/// The space of an image with these clusters, in a file of so many bytes.
pub(super) fn space(header: &Header, named: Named, file_len: u64) -> FileEnd {
    let space = FileEnd::new(extent(header, named.end, file_len), header.cluster_size());
    // Where a crash has left some. New data may go there.
    named.gaps.into_iter().for_each(|gap| space.put_back(gap));
    space
}

/// What an image has whose clusters before `end` may be named.
pub(super) fn extent(header: &Header, end: u64, file_len: u64) -> FileExtent {
    let fresh_from = header.clusters_before(file_len);
    // Clusters that are not named yet, behind those that are.
    let limit = (end + u64::from(header.entries)).min(header.most_clusters());
    FileExtent { used: end, fresh_from, limit }
}

/// Makes a file at least so long, durably; it may get up to `wanted` bytes.
async fn grow(file: &Node, mode: Mode, least: u64, wanted: u64) -> IoResult {
    let image = file.driver().image().ok_or(Errno::ENOSPC)?;
    let preallocation = match mode {
        Mode::Falloc => Preallocation::Falloc,
        Mode::Truncate => Preallocation::Off,
    };
    if i64::try_from(wanted).is_err() || image.grow(wanted, preallocation).await.is_err() {
        // What is needed may be had where more is not, or not in this way.
        lengthen(file, least).await?;
    }
    file.flush().await
}

impl Allocator for Parallels {
    async fn take(&self, most: u64) -> IoResult<Taken<'_, Parallels>> {
        if !self.stretch.has_gaps() {
            return take_at_end(self, 1, most).await;
        }
        // The layer would write zeroes to the end of the gap behind the cluster.
        let mut taken = take_at_end(self, 1, 1).await?;
        if !taken.run.is_fresh {
            let file = file(self);
            file.zero(taken.host(), self.header.cluster_size(), ZeroFlags::UNMAP).await?;
            file.flush().await?;
            taken.run.is_fresh = true;
        }
        Ok(taken)
    }

    fn put_back(&self, run: Run) {
        self.space.put_back(run);
    }
}

impl Appending for Parallels {
    fn file_end(&self) -> &FileEnd {
        &self.space
    }

    fn place_of(&self, cluster: u64) -> u64 {
        self.header.place_of(cluster)
    }

    async fn extend(&self, end: u64) -> IoResult {
        let file = file(self);
        let (least, len) = (self.header.place_of(end), file.driver().len());
        if least <= len {
            return Ok(());
        }
        // A disk needs no more clusters than it has, unless some were lost.
        let most = self.header.place_of(end.max(self.header.entries.into()));
        let wanted = least.max(len.saturating_add(self.preallocating.ahead)).min(most);
        grow(&file, self.preallocating.mode, least, wanted).await
    }
}
