//! Changes of a descriptor's text, so that a crash leaves what it said before or what it is to say.
//!
//! The storage writes sectors whole, and nothing longer. So a change is one write inside a sector where that is possible.
//! Otherwise new lines are added behind the others first, which do not count as long as those with the same key stand before
//! them, and then these become comments. Where there is no room for that, all of the text is written again.

use super::descriptor::{lines, statement};
use crate::block::SECTOR;
use crate::options::bytes;
use std::ops::Range;

/// Bytes that are written over those of the text from `at` on; the text may get longer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    pub at: usize,
    pub bytes: Vec<u8>,
}

impl Edit {
    pub fn end(&self) -> usize {
        self.at + self.bytes.len()
    }

    /// Changes the whole text.
    pub fn apply(&self, text: &mut Vec<u8>) {
        text.resize(text.len().max(self.end()), 0);
        text[self.at..self.end()].copy_from_slice(&self.bytes);
    }
}

/// A key, and the value that it is to have as it is stored; none for no such line.
type Wanted = (&'static str, Option<Vec<u8>>);

const PARENT_ID: &str = "parentCID";
const PARENT: &str = "parentFileNameHint";

fn lines_of(text: &[u8], key: &str) -> Vec<Range<usize>> {
    let is_it = |line: &Range<usize>| {
        let found = statement(text, line.clone());
        found.is_some_and(|(found, _)| found.eq_ignore_ascii_case(key.as_bytes()))
    };
    lines(text).filter(is_it).collect()
}

/// How many digits the content ID has: an ID with as many takes its place without moving the rest of the text.
pub fn id_digits(text: &[u8]) -> usize {
    let line = lines_of(text, "CID").into_iter().next();
    line.and_then(|line| statement(text, line)).map_or(8, |(_, value)| value.len())
}

/// Sets the content ID, with as many digits as the text has, unless it needs more.
pub fn set_id(text: &[u8], id: u32) -> Option<Edit> {
    let line = lines_of(text, "CID").into_iter().next()?;
    let (_, place) = statement(text, line)?;
    let width = place.len().min(8);
    let mut bytes = format!("{id:0width$x}").into_bytes();
    if bytes.len() != place.len() {
        bytes.extend_from_slice(&bytes::until_nul(text)[place.end..]);
    }
    Some(Edit { at: place.start, bytes })
}

/// Sets the content ID of the parent: changes that are made one after another, each durably.
///
/// `at`: where the text begins in its file. `room`: bytes that it may have. None if there is not enough.
pub fn set_parent_id(text: &[u8], at: u64, room: u64, id: u32) -> Option<Vec<Edit>> {
    change(text, at, room, &[(PARENT_ID, Some(format!("{id:08x}").into_bytes()))])
}

/// Sets the name of the parent and its content ID: as [`set_parent_id`].
pub fn set_parent(
    text: &[u8],
    at: u64,
    room: u64,
    name: Option<&str>,
    id: u32,
) -> Option<Vec<Edit>> {
    let name = name.map(|name| [b"\"", &*bytes::bytes_of(name), b"\""].concat());
    let id = format!("{id:08x}").into_bytes();
    change(text, at, room, &[(PARENT_ID, Some(id)), (PARENT, name)])
}

fn change(text: &[u8], at: u64, room: u64, wanted: &[Wanted]) -> Option<Vec<Edit>> {
    let rewritten = rewritten(text, room, wanted);
    let is_one = |edit: &Edit| is_in_sector(at, &(edit.at..edit.end()));
    in_place(text, at, wanted)
        .or_else(|| rewritten.clone().filter(is_one))
        .map(|edit| vec![edit])
        .or_else(|| added(text, at, room, wanted))
        .or_else(|| rewritten.map(|edit| vec![edit]))
}

/// Whether a range of the text lies in one sector of its file.
fn is_in_sector(at: u64, range: &Range<usize>) -> bool {
    let sector = |place: usize| (at + place as u64) / SECTOR;
    range.is_empty() || sector(range.start) == sector(range.end - 1)
}

/// The change as one write inside a sector, if values have room where they stand.
fn in_place(text: &[u8], at: u64, wanted: &[Wanted]) -> Option<Edit> {
    let mut new = text.to_vec();
    for (key, value) in wanted {
        let lines = lines_of(text, key);
        let Some(value) = value else {
            lines.iter().for_each(|line| new[key_in(text, line)] = b'#');
            continue;
        };
        let line = lines.first()?;
        let equals = line.start + text[line.clone()].iter().position(|&byte| byte == b'=')?;
        let rest = &text[equals + 1..line.end];
        let start = line.end - rest.trim_ascii_start().len();
        let end = equals + 1 + rest.trim_ascii_end().len();
        let place = new.get_mut(start..end.max(start)).filter(|old| old.len() >= value.len())?;
        place[..value.len()].copy_from_slice(value);
        place[value.len()..].fill(b' ');
    }
    let edit = difference(text, &new);
    is_in_sector(at, &(edit.at..edit.end())).then_some(edit)
}

/// What makes a text another one that is at least as long.
fn difference(text: &[u8], new: &[u8]) -> Edit {
    let differs = |&n: &usize| text.get(n) != new.get(n);
    let first = (0..new.len()).find(differs).unwrap_or(0);
    let end = (first..new.len()).rev().find(differs).map_or(first, |last| last + 1);
    Edit { at: first, bytes: new[first..end].to_vec() }
}

/// Where the key of a line begins.
fn key_in(text: &[u8], line: &Range<usize>) -> usize {
    line.end - text[line.clone()].trim_ascii_start().len()
}

fn new_lines(wanted: &[Wanted]) -> Vec<u8> {
    let line = |(key, value): &Wanted| {
        value.as_ref().map(|value| [key.as_bytes(), b"=", value, b"\n"].concat())
    };
    wanted.iter().filter_map(line).flatten().collect()
}

/// The change as lines that are added, and others that become comments.
fn added(text: &[u8], at: u64, room: u64, wanted: &[Wanted]) -> Option<Vec<Edit>> {
    let comment = |line: &Range<usize>| Edit { at: key_in(text, line), bytes: b"#".to_vec() };
    let lines: Vec<Vec<Range<usize>>> = wanted.iter().map(|(key, _)| lines_of(text, key)).collect();
    // Those that a change which was cut short has left would count before the new ones.
    let mut edits: Vec<Edit> =
        lines.iter().flat_map(|lines| lines.iter().skip(1)).map(comment).collect();
    let used = bytes::until_nul(text);
    let is_ended = used.last().is_none_or(|last| matches!(last, b'\n' | b'\r'));
    let mut more = if is_ended { Vec::new() } else { b"\n".to_vec() };
    more.extend(new_lines(wanted));
    if (used.len() + more.len()) as u64 > room {
        return None;
    }
    edits.push(Edit { at: used.len(), bytes: more });
    let keys: Vec<Edit> = lines.iter().filter_map(|lines| lines.first()).map(comment).collect();
    let first = keys.iter().map(|edit| edit.at).min();
    let end = keys.iter().map(Edit::end).max();
    match (first, end) {
        (Some(first), Some(end)) if is_in_sector(at, &(first..end)) => {
            let mut bytes = text[first..end].to_vec();
            keys.iter().for_each(|key| bytes[key.at - first] = b'#');
            edits.push(Edit { at: first, bytes });
        }
        // Between these the name and the content ID of the parent do not agree, and the image is not opened with it.
        _ => edits.extend(keys),
    }
    Some(edits)
}

/// All of the text, with new lines behind the one that says what kind of disk it is, and without what earlier changes have made comments of.
fn rewritten(text: &[u8], room: u64, wanted: &[Wanted]) -> Option<Edit> {
    let used = bytes::until_nul(text);
    let comments = [PARENT_ID, PARENT].map(|key| [b"#", &key.as_bytes()[1..], b"="].concat());
    let goes = |line: &[u8]| {
        let line = line.trim_ascii();
        let key = statement(line, 0..line.len()).map(|(key, _)| key);
        comments.iter().any(|comment| line.starts_with(comment))
            || wanted.iter().any(|(wanted, _)| {
                key.is_some_and(|key| key.eq_ignore_ascii_case(wanted.as_bytes()))
            })
    };
    let mut new = Vec::with_capacity(used.len());
    let mut more = new_lines(wanted);
    for line in used.split_inclusive(|&byte| matches!(byte, b'\n' | b'\r')) {
        if goes(line) {
            continue;
        }
        new.extend_from_slice(line);
        if !lines_of(line, "createType").is_empty() {
            if !line.ends_with(b"\n") && !line.ends_with(b"\r") {
                new.push(b'\n');
            }
            new.append(&mut more);
        }
    }
    if new.len() as u64 > room {
        return None;
    }
    new.resize(new.len().max(used.len()), b'\n');
    new.extend_from_slice(text.get(new.len()..).unwrap_or_default());
    Some(difference(text, &new))
}

#[cfg(test)]
mod tests {
    use super::super::descriptor::{Descriptor, NO_PARENT};
    use super::*;

    const AT: u64 = SECTOR;

    fn says(text: &[u8]) -> (u32, Option<String>) {
        let read = Descriptor::parse(text).unwrap();
        let parent = read.has_parent().then(|| read.parent.clone()).flatten();
        (read.parent_cid, parent)
    }

    /// Makes the changes; after a crash at any moment, with any of the sectors written of the write that was under way,
    /// the text says what it said before or what it is to say.
    fn crash(text: &mut Vec<u8>, edits: &[Edit], is_safe: bool) {
        let before = says(text);
        let mut after = text.clone();
        edits.iter().for_each(|edit| edit.apply(&mut after));
        for edit in edits {
            let mut new = text.clone();
            edit.apply(&mut new);
            text.resize(new.len(), 0);
            let sectors = (edit.at / 512..=edit.end().saturating_sub(1) / 512).collect::<Vec<_>>();
            for torn in 0..1 << sectors.len() {
                let mut disk = text.clone();
                for (n, sector) in sectors.iter().enumerate().filter(|(n, _)| torn >> n & 1 == 1) {
                    let end = ((sector + 1) * 512).min(new.len());
                    disk[sector * 512..end].copy_from_slice(&new[sector * 512..end]);
                    let _ = n;
                }
                let found = says(&disk);
                assert!(!is_safe || found == before || found == says(&after), "{found:?}");
            }
            *text = new;
        }
        assert_eq!(*text, after);
    }

    fn descriptor(padding: usize, room: usize) -> Vec<u8> {
        let head = "# Disk DescriptorFile\nversion=1\nCID=0123abcd\nparentCID=00000007\n";
        let comments = "# a comment that is long\n".repeat(padding);
        let rest =
            "createType=\"monolithicSparse\"\nparentFileNameHint=\"p.vmdk\"\nRW 1 SPARSE \"x\"\n";
        let mut text = format!("{head}{rest}{comments}").into_bytes();
        text.resize(text.len().max(room), 0);
        text
    }

    #[test]
    fn a_crash_leaves_the_old_parent_or_the_new_one() {
        let long = "a-name-that-is-longer-than-what-was-there-".repeat(20);
        for (padding, room) in [(0, 0), (0, 10240), (16, 0), (16, 10240), (13, 0)] {
            let mut text = descriptor(padding, room);
            for (n, name) in
                [Some("q"), Some(&*long), Some("r.vmdk"), None, Some("s.vmdk"), Some(&*long), None]
                    .into_iter()
                    .enumerate()
            {
                let id = if name.is_some() { 0x1000 + n as u32 } else { NO_PARENT };
                let edits = set_parent(&text, AT, 10240, name, id).unwrap();
                crash(&mut text, &edits, true);
                assert_eq!(says(&text), (id, name.map(str::to_owned)), "{padding} {room}");
            }
            let edits = set_parent_id(&text, AT, 10240, 5).unwrap();
            crash(&mut text, &edits, true);
            assert_eq!(says(&text).0, 5);
        }
    }

    #[test]
    fn a_change_that_was_cut_short_is_no_parent_of_the_next() {
        let mut text = descriptor(30, 0);
        let edits = set_parent(&text, AT, 10240, Some("first-longer.vmdk"), 1).unwrap();
        edits[0].apply(&mut text);
        assert_eq!(says(&text), (7, Some("p.vmdk".to_owned())));
        let edits = set_parent(&text, AT, 10240, Some("second-longer.vmdk"), 2).unwrap();
        crash(&mut text, &edits, true);
        assert_eq!(says(&text), (2, Some("second-longer.vmdk".to_owned())));
    }

    #[test]
    fn a_text_that_is_full_is_written_again_without_old_comments() {
        let mut text = descriptor(0, 0);
        let room = text.len() as u64 + 60;
        for n in 0..10u32 {
            let name = format!("name-{}.vmdk", "x".repeat(n as usize));
            let Some(edits) = set_parent(&text, AT, room, Some(&name), n) else {
                assert!(n > 5, "{n}");
                return;
            };
            crash(&mut text, &edits, false);
            assert_eq!(says(&text), (n, Some(name)));
            assert!(text.len() as u64 <= room);
        }
        let long = "x".repeat(200);
        assert_eq!(set_parent(&text, AT, room, Some(&long), 1), None);
    }

    #[test]
    fn an_id_is_changed_where_it_stands() {
        let old = b"# c\r\n CID = 1\r\ncreateType=\"x\"\r\nRW 1 ZERO\r\n\0\0".to_vec();
        assert_eq!(id_digits(&old), 1);
        let mut new = old.clone();
        set_id(&old, 0xab).unwrap().apply(&mut new);
        assert_eq!(new, b"# c\r\n CID = ab\r\ncreateType=\"x\"\r\nRW 1 ZERO\r\n\0");
        let mut text = b"CID=12345678\rcreateType=x\rparentCID=1".to_vec();
        set_id(&text, 9).unwrap().apply(&mut text);
        let edits = set_parent(&text, 0, 100, Some("p"), 3).unwrap();
        edits.iter().for_each(|edit| edit.apply(&mut text));
        let read = Descriptor::parse(&text).unwrap();
        assert_eq!((read.cid, read.parent_cid, read.parent.as_deref()), (9, 3, Some("p")));
    }
}
