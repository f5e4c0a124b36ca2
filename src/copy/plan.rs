//! The plan of a copy: the remaining ranges, handed out piece by piece.

use super::control::Member;
use super::{Copy, Part, Trouble};
use crate::block::extents::{self, Run};
use crate::block::{Precision, Status};
use crate::io::Errno;
use crate::io::sync::{Mutex, Waiters};
use crate::io::task::yield_now;

/// What is done with a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read and written.
    Data,
    /// Made zeroes, in whatever way is quick.
    Zeroes,
    /// Written as zeroes, because all of the target is to have its place.
    WrittenZeroes,
    /// Compared with what the target is to stand on, and written where that differs.
    Compared,
}

/// A range that one copier moves.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Counts pieces from 0, in the order of their offsets.
    pub ticket: u64,
    pub kind: Kind,
    /// In the target, in bytes; the sources are there one behind the other.
    pub at: u64,
    pub len: u64,
    /// How many bytes more of the copy are done with it, told in steps that people know from QEMU: of
    /// several pieces, the last tells for all.
    pub reported: u64,
}

/// The longest step in which progress is reported, in bytes. Compressed copies report each unit.
pub const STEP: u64 = 2 << 20;

/// The pieces of a copy.
pub struct Plan {
    /// Away while somebody finds out about the next piece.
    place: Mutex<Option<Place>>,
    freed: Mutex<Waiters>,
    /// Bytes that will be written as data.
    total: u64,
}

/// How far the pieces have been dealt out.
#[derive(Clone, Default)]
struct Place {
    ticket: u64,
    /// In the target, in bytes.
    at: u64,
    /// The status of what comes next, but not dealt out yet.
    known: Option<(Option<Kind>, u64)>,
    /// Bytes dealt out that no piece has reported yet.
    untold: u64,
}

impl Plan {
    /// Looks through all sources once, for the sum of what there is to do.
    pub async fn new(copy: &Copy, planner: &Member) -> Result<Plan, Trouble> {
        let mut place = Place::default();
        let mut total = 0;
        loop {
            planner.gate(0).await?;
            // The status of a large disk without asking its storage holds up nobody else.
            yield_now().await;
            let Some(piece) = place.next(copy, u64::MAX).await? else { break };
            if piece.kind != Kind::Zeroes {
                total += piece.len;
            }
        }
        let place = Mutex::new(Some(Place::default()));
        Ok(Plan { place, freed: Mutex::default(), total })
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    /// The next piece, or none if all are dealt out.
    pub async fn next(&self, copy: &Copy) -> Result<Option<Piece>, Trouble> {
        let mut place = loop {
            if let Some(place) = self.place.lock().take() {
                break place;
            }
            self.freed.wait_until(|| self.place.lock().is_some()).await;
        };
        let next = place.next(copy, copy.chunk()).await;
        *self.place.lock() = Some(place);
        self.freed.wake_all();
        next
    }
}

impl Place {
    async fn next(&mut self, copy: &Copy, most: u64) -> Result<Option<Piece>, Trouble> {
        let (end, unit) = (copy.len(), copy.planned_unit());
        while self.at < end {
            let (known, run) = match self.known.take() {
                Some(known) => known,
                None => self.classify(copy).await?,
            };
            let (kind, len) = match unit {
                Some(unit) => in_units(known, run, unit, (end - self.at, most)),
                None if known == Some(Kind::Zeroes) => (known, run),
                None => (known, run.min(most)),
            };
            if len < run {
                self.known = Some((known, run - len));
            }
            let at = self.at;
            self.at += len;
            let Some(kind) = kind else { continue };
            let reported = match kind {
                Kind::Zeroes => 0,
                Kind::Compared => len,
                Kind::Data | Kind::WrittenZeroes => {
                    self.progress_of(len, unit.is_some() || len == run)
                }
            };
            let piece = Piece { ticket: self.ticket, kind, at, len, reported };
            self.ticket += 1;
            return Ok(Some(piece));
        }
        Ok(None)
    }

    /// The progress that a piece of data of this length reports; `at_once`: in any case.
    fn progress_of(&mut self, len: u64, at_once: bool) -> u64 {
        self.untold += len;
        match at_once || self.untold >= STEP {
            true => std::mem::take(&mut self.untold),
            false => 0,
        }
    }

    /// What comes next, and how long it is. None is nothing to do.
    async fn classify(&self, copy: &Copy) -> Result<(Option<Kind>, u64), Trouble> {
        if let Part::Rebased(_) = copy.part {
            return self.classify_own(copy).await;
        }
        let failed = |errno| Trouble::Status(self.at, errno);
        let (source, from, left) = copy.source_at(self.at).ok_or(failed(Errno::EIO))?;
        // Behind the end of the base the source has zeroes, which the target's may lack.
        let supplied = copy.base().map_or(0, |base| base.len().saturating_sub(from));
        let left = [supplied, copy.zero_from.saturating_sub(self.at)]
            .into_iter()
            .filter(|&len| len > 0)
            .fold(left, u64::min);
        let run = extents::query(source.node(), from, left, Precision::Zeroes, copy.base()).await;
        let run = match run {
            Ok(run) => run,
            // Reading will tell.
            Err(_) if copy.salvage => return Ok((Some(Kind::Data), left.min(copy.chunk()))),
            Err(errno) => return Err(failed(errno)),
        };
        let is_left_out = supplied > 0 && !run.has(Status::ALLOCATED);
        let kind = if is_left_out { None } else { kind_of(copy, self.at, &run) };
        Ok((kind, run.len))
    }

    /// As [`Place::classify`], of an image that is about to stand on another one: it keeps what it has itself.
    async fn classify_own(&self, copy: &Copy) -> Result<(Option<Kind>, u64), Trouble> {
        let failed = |errno| Trouble::Status(self.at, errno);
        let (image, at, left) = copy.source_at(self.at).ok_or(failed(Errno::EIO))?;
        let own = image.node().status(at, left, Precision::Allocation).await.map_err(failed)?;
        let is_own = own.status.contains(Status::ALLOCATED);
        Ok(((!is_own).then_some(Kind::Compared), own.len))
    }
}

/// What is done with the whole units at the beginning of a run, which is at the beginning of one, and
/// how long they are. `left` bytes are left in all; of data, at most `most` are wanted.
fn in_units(
    kind: Option<Kind>,
    run: u64,
    unit: u64,
    (left, most): (u64, u64),
) -> (Option<Kind>, u64) {
    let whole = if run >= left { left } else { run / unit * unit };
    match kind {
        Some(Kind::Data) => (kind, run.min(most).next_multiple_of(unit).min(left)),
        // A unit of which only a part is so.
        _ if whole == 0 => (Some(Kind::Data), unit.min(left)),
        Some(Kind::WrittenZeroes) => (kind, whole.min(most)),
        _ => (kind, whole),
    }
}

/// What is done with a run that goes to `at` of the target, on one side of where its zeroes begin.
fn kind_of(copy: &Copy, at: u64, run: &Run) -> Option<Kind> {
    match (run.has(Status::ZERO), copy.sparse) {
        (true, None) => Some(Kind::WrittenZeroes),
        (true, Some(_)) if at >= copy.zero_from => None,
        (true, Some(_)) => Some(Kind::Zeroes),
        (false, _) => Some(Kind::Data),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compressed_goes_in_whole_units_and_a_unit_with_any_data_is_data() {
        let (data, zeroes) = (Some(Kind::Data), Some(Kind::Zeroes));
        for (kind, run, left, most, wanted) in [
            (data, 100, 1000, 256, (data, 128)),
            (data, 1000, 1000, 256, (data, 256)),
            (data, 10, 40, 256, (data, 40)),
            (zeroes, 300, 1000, 256, (zeroes, 256)),
            (zeroes, 63, 1000, 256, (data, 64)),
            (zeroes, 63, 63, 256, (zeroes, 63)),
            (zeroes, 10, 40, 256, (data, 40)),
            (None, 200, 1000, 64, (None, 192)),
            (Some(Kind::WrittenZeroes), 200, 1000, 64, (Some(Kind::WrittenZeroes), 64)),
        ] {
            assert_eq!(in_units(kind, run, 64, (left, most)), wanted, "{kind:?} {run} {left}");
        }
    }
}
