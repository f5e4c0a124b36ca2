//! The disk: requests are cut where parts meet, and each piece goes to the node of its part.

use super::{Bundle, Part};
use crate::block::pass_through::{read_inside, write_inside};
use crate::block::*;
use crate::cow::traits_over;
use crate::format::parallels::header::DEFAULT_CLUSTER;
use crate::io::{Errno, InFlight, IoResult, IoVec};

/// What all parts can, the disk can.
const SHARED: Abilities = Abilities::ZERO.union(Abilities::ZERO_UNMAP).union(Abilities::DISCARD);

impl Bundle {
    /// The number of the child that has a byte of the disk, its part, and how many of the bytes from there on it has: all
    /// of them if it is the last, for a request may be rounded out beyond the end of the disk.
    fn part_at(&self, at: u64, len: u64) -> IoResult<(usize, &Part, u64)> {
        let number = self.parts.partition_point(|part| part.end <= at);
        let part = self.parts.get(number).ok_or(Errno::EINVAL)?;
        let there = if number + 1 == self.parts.len() { len } else { len.min(part.end - at) };
        Ok((number + 1, part, there))
    }

    pub(super) fn common_traits(&self) -> Traits {
        let of_parts = || self.nodes().map(|node| node.traits());
        let mut abilities = of_parts().fold(SHARED, |all, of_part| all & of_part.abilities);
        if of_parts().any(|of_part| of_part.abilities.contains(Abilities::READ_ONLY)) {
            abilities = Abilities::READ_ONLY;
        }
        let mut traits: Option<Traits> = None;
        for of_part in of_parts() {
            let unit = u64::from(of_part.optimal_io).max(1);
            let of_part = traits_over(of_part, DEFAULT_CLUSTER, unit, abilities);
            traits = Some(traits.map_or(of_part, |all| Traits {
                request_align: all.request_align.max(of_part.request_align),
                buffer_align: all.buffer_align.max(of_part.buffer_align),
                max_transfer: all.max_transfer.min(of_part.max_transfer),
                max_segments: all.max_segments.min(of_part.max_segments),
                optimal_io: all.optimal_io.max(of_part.optimal_io),
                ..all
            }));
        }
        let file = self.children[0].node().traits();
        let mut traits = traits.unwrap_or_else(|| traits_over(file, DEFAULT_CLUSTER, 1, abilities));
        let align = u64::from(traits.request_align);
        if !self.parts.iter().all(|part| part.start.is_multiple_of(align)) {
            // Nodes below align by themselves what is not.
            (traits.request_align, traits.buffer_align) = (1, 1);
        }
        traits.zero_align = traits.request_align;
        traits.discard_align = traits.request_align;
        traits
    }

    pub(super) fn map_part<'a>(
        &'a self,
        inflight: &'a InFlight,
        at: u64,
        want: u64,
        access: Access,
    ) -> Mapping<'a> {
        let Ok((child, part, len)) = self.part_at(at, want) else { return Mapping::slow(want) };
        let node = self.children[child].fast(inflight);
        let inside = at - part.start;
        if inside + len > node.len() {
            return Mapping::slow(len);
        }
        match access {
            Access::Read => node.map_chain(inflight, inside, len),
            _ => node.map(inflight, inside, len, access),
        }
    }

    pub(super) async fn read_parts(&self, at: u64, into: &IoVec<'_>) -> IoResult {
        let mut done = 0;
        while done < into.len() {
            let (child, part, len) = self.part_at(at + done, into.len() - done)?;
            let node = self.children[child].node();
            read_inside(&node, at + done - part.start, &into.slice(done, len)).await?;
            done += len;
        }
        Ok(())
    }

    pub(super) async fn write_parts(
        &self,
        at: u64,
        from: &IoVec<'_>,
        flags: WriteFlags,
    ) -> IoResult {
        let mut done = 0;
        while done < from.len() {
            let (child, part, len) = self.part_at(at + done, from.len() - done)?;
            let node = self.children[child].node();
            write_inside(&node, at + done - part.start, &from.slice(done, len), flags).await?;
            done += len;
        }
        Ok(())
    }

    pub(super) async fn zero_parts(&self, at: u64, len: u64, flags: ZeroFlags) -> IoResult {
        let mut done = 0;
        while done < len {
            let (child, part, piece) = self.part_at(at + done, len - done)?;
            let node = self.children[child].node();
            node.zero(at + done - part.start, piece, flags).await?;
            done += piece;
        }
        Ok(())
    }

    pub(super) async fn discard_parts(&self, at: u64, len: u64) -> IoResult {
        let mut done = 0;
        while done < len {
            let (child, part, piece) = self.part_at(at + done, len - done)?;
            self.children[child].node().discard(at + done - part.start, piece).await?;
            done += piece;
        }
        Ok(())
    }

    pub(super) async fn status_of(
        &self,
        at: u64,
        len: u64,
        precision: Precision,
    ) -> IoResult<Extent> {
        let (child, part, len) = self.part_at(at, len)?;
        let offset = at - part.start;
        let node = self.children[child].node();
        // What lies beyond the disk's end, if the image has it, is none of its own.
        let extent = node.status(offset, len.min(part.end - at), precision).await?;
        Ok(Extent { place: Some(Place { child: Some(child), offset }), ..extent })
    }

    /// Checks all images, and repairs the top ones.
    pub(super) async fn check_images(
        &self,
        fix: Fix,
        say: &mut dyn FnMut(&str),
    ) -> Result<CheckReport, Error> {
        let mut sum = CheckReport::default();
        let mut is_any = false;
        for (part, top) in self.parts.iter().zip(self.nodes()) {
            let mut next = Some(top);
            for (number, image) in part.images.iter().enumerate() {
                let Some(node) = next.take() else { break };
                let below = node.driver().children().iter().find(|child| child.is_backing());
                next = below.map(Child::node);
                let Some(checked) = node.driver().image() else { continue };
                let fix = if number == 0 { fix } else { Fix::Nothing };
                let mut tell = |line: &str| say(&format!("{}: {line}", image.file.escape_debug()));
                match checked.check(fix, &mut tell).await {
                    Ok(report) => add(&mut sum, &report),
                    // A plain image.
                    Err(error) if error.errno() == Some(Errno::ENOTSUP) => continue,
                    Err(error) => return Err(error.at(image.file.escape_debug().to_string())),
                }
                is_any = true;
            }
        }
        match is_any {
            true => Ok(sum),
            false => {
                Err(Error::new("This image format does not support checks")
                    .with_errno(Errno::ENOTSUP))
            }
        }
    }
}

/// The end of one image says nothing of others.
fn add(sum: &mut CheckReport, report: &CheckReport) {
    sum.corruptions += report.corruptions;
    sum.leaks += report.leaks;
    sum.check_errors += report.check_errors;
    sum.corruptions_fixed += report.corruptions_fixed;
    sum.leaks_fixed += report.leaks_fixed;
    sum.total_clusters += report.total_clusters;
    sum.allocated_clusters += report.allocated_clusters;
    sum.fragmented_clusters += report.fragmented_clusters;
    sum.compressed_clusters += report.compressed_clusters;
}
