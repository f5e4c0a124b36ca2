//! What is left to copy, dealt out piece by piece.

use super::turns::Signal;
use super::{Copy, Trouble};
use crate::block::{Precision, Status};
use crate::io::sync::Mutex;
use crate::tools::extents::{self, Run};

/// What is done with a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read and written.
    Data,
    /// Made zeroes, in whatever way is quick.
    Zeroes,
    /// Written as zeroes, because all of the target is to have its place.
    WrittenZeroes,
}

/// A range that one lane moves.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Counts pieces from 0, in the order of their offsets.
    pub ticket: u64,
    pub kind: Kind,
    pub source: usize,
    /// Offsets in the source and in the target, in bytes.
    pub from: u64,
    pub to: u64,
    pub len: u64,
}

/// The pieces of a copy.
pub struct Plan {
    /// Away while somebody finds out about the next piece.
    place: Mutex<Option<Place>>,
    freed: Signal,
    /// Bytes that will be written as data.
    total: u64,
}

/// How far the pieces have been dealt out.
#[derive(Clone, Default)]
struct Place {
    ticket: u64,
    source: usize,
    /// Offset in the source, in bytes.
    at: u64,
    /// Where the source begins in the target, in bytes.
    start: u64,
    /// What is known of what comes next, but not dealt out yet.
    known: Option<(Option<Kind>, u64)>,
}

impl Plan {
    /// Looks through all sources once, for the sum of what there is to do.
    pub async fn new(copy: &Copy) -> Result<Plan, Trouble> {
        let mut place = Place::default();
        let mut total = 0;
        while let Some(piece) = place.next(copy, u64::MAX).await? {
            if piece.kind != Kind::Zeroes {
                total += piece.len;
            }
        }
        let place = Mutex::new(Some(Place::default()));
        Ok(Plan { place, freed: Signal::default(), total })
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
            self.freed.wait(|| self.place.lock().is_some()).await;
        };
        let next = place.next(copy, copy.chunk()).await;
        *self.place.lock() = Some(place);
        self.freed.notify();
        next
    }
}

impl Place {
    async fn next(&mut self, copy: &Copy, most: u64) -> Result<Option<Piece>, Trouble> {
        loop {
            let Some(source) = copy.sources.get(self.source) else { return Ok(None) };
            let left = source.len() - self.at;
            if left == 0 {
                self.start += source.len();
                self.source += 1;
                self.at = 0;
                continue;
            }
            let (kind, run) = match self.known.take() {
                Some(known) => known,
                None => self.look(copy, left).await?,
            };
            let len = if kind == Some(Kind::Zeroes) { run } else { run.min(most) };
            if len < run {
                self.known = Some((kind, run - len));
            }
            let from = self.at;
            self.at += len;
            let Some(kind) = kind else { continue };
            let piece = Piece {
                ticket: self.ticket,
                kind,
                source: self.source,
                from,
                to: self.start + from,
                len,
            };
            self.ticket += 1;
            return Ok(Some(piece));
        }
    }

    /// What comes next, and how long it is. None is nothing to do.
    async fn look(&self, copy: &Copy, left: u64) -> Result<(Option<Kind>, u64), Trouble> {
        let node = copy.sources[self.source].node();
        let looked = extents::look(node, self.at, left, Precision::Zeroes, None).await;
        let run = match looked {
            Ok(run) => run,
            // Reading will tell.
            Err(_) if copy.salvage => return Ok((Some(Kind::Data), left.min(copy.chunk()))),
            Err(errno) => return Err(Trouble::Status(self.start + self.at, errno)),
        };
        Ok((kind_of(copy, &run), run.len))
    }
}

fn kind_of(copy: &Copy, run: &Run) -> Option<Kind> {
    let from_backing = !run.has(Status::ALLOCATED) || run.depth > 0;
    if copy.has_backing && from_backing {
        return None;
    }
    match (run.has(Status::ZERO), copy.sparse) {
        (true, None) => Some(Kind::WrittenZeroes),
        (true, Some(_)) if copy.target_is_zero => None,
        (true, Some(_)) => Some(Kind::Zeroes),
        (false, _) => Some(Kind::Data),
    }
}
