//! Every crash while a header changes: each subset of the sectors of each step.

use super::super::extensions::{BitmapsPointer, feature_names};
use super::super::header::{Autoclear, Compatible};
use super::*;

/// A header that a test changes, or changes to.
#[derive(Clone, Debug)]
struct Shape {
    version: u32,
    name: usize,
    format: &'static str,
    features: bool,
    bitmaps: Option<u64>,
    data_file: usize,
    unknown: usize,
}

const PLAIN: Shape = Shape {
    version: 3,
    name: 0,
    format: "",
    features: false,
    bitmaps: None,
    data_file: 0,
    unknown: 0,
};

impl Shape {
    /// Every byte of a name tells which one it is, and where in it.
    fn header(&self, bits: u32) -> Header {
        let text = |len: usize| (0..len).map(|n| b'a' + ((n + len) % 23) as u8).collect::<Vec<_>>();
        let mut header = Header::new(bits, 1 << 20);
        header.version = self.version;
        header.refcount_table_clusters = 1;
        header.l1_size = header.geometry().l1_entries_for(header.size) as u32;
        header.backing_file = (self.name > 0).then(|| text(self.name));
        if !self.format.is_empty() {
            header.extensions.push(Extension::BackingFormat(self.format.into()));
        }
        if self.data_file > 0 {
            header.extensions.push(Extension::DataFile(text(self.data_file)));
        }
        if self.features {
            header.extensions.push(feature_names());
        }
        if let Some(at) = self.bitmaps {
            let pointer = BitmapsPointer::new(1, 24, at << bits);
            header.extensions.push(Extension::Bitmaps(pointer));
            header.autoclear |= Autoclear::BITMAPS;
        }
        if self.unknown > 0 {
            let data = text(self.unknown);
            header.extensions.push(Extension::Unknown { kind: 0x1234_5678, data });
        }
        header
    }
}

/// What a program that opens the image relies on.
fn shown(header: &Header) -> Header {
    let mut shown = without_feature_names(header);
    shown.extensions.sort_by_key(|extension| format!("{extension:?}"));
    shown.take_places(&Header::new(header.cluster_bits, 0));
    shown
}

/// Takes the steps, and looks at what each crash on the way leaves; how many steps there were, or none
/// if the change was refused.
fn crash_everywhere(old: &Header, disk: &[u8], new: &Header) -> Option<usize> {
    let steps = steps(old, disk, new.clone()).ok()?;
    let allowed = [shown(old), shown(new)];
    let mut disk = disk.to_vec();
    let judge = |state: &[u8]| {
        let found = Header::parse(state).unwrap_or_else(|error| panic!("{error}"));
        assert!(allowed.contains(&shown(&found)), "{found:?}");
        let allowed = [old, new].map(|one| one.extensions.iter().find(is_names));
        let found = found.extensions.iter().find(is_names);
        assert!(found.is_none() || allowed.contains(&found));
    };
    fn is_names(extension: &&Extension) -> bool {
        matches!(extension, Extension::FeatureNames(_)) && !extension.is_filler()
    }
    let count = steps.len();
    for Step { header, rest, switch } in steps {
        assert!(rest.len() <= 12, "too many sectors to try every subset");
        for kept in 0..1u32 << rest.len() {
            let mut state = disk.clone();
            for (n, (at, bytes)) in rest.iter().enumerate() {
                assert!(bytes.len() == FIRST && at % SECTOR == 0);
                if kept >> n & 1 == 1 {
                    state[*at as usize..][..FIRST].copy_from_slice(bytes);
                }
            }
            judge(&state);
        }
        for (at, bytes) in rest.iter().chain([&switch]) {
            disk[*at as usize..][..FIRST].copy_from_slice(bytes);
        }
        judge(&disk);
        let found = Header::parse(&disk).unwrap();
        assert_eq!((shown(&found), found.name_range()), (shown(&header), header.name_range()));
    }
    let found = Header::parse(&disk).unwrap();
    assert_eq!(shown(&found), shown(new));
    assert_eq!(found.extensions.iter().find(is_names), new.extensions.iter().find(is_names));
    Some(count)
}

/// All changes between these headers; how many there were, and how many were refused.
fn change_each_to_each(bits: u32, shapes: &[Shape]) -> (usize, usize) {
    let (mut changes, mut refused) = (0, 0);
    for from in shapes {
        let mut old = from.header(bits);
        let Ok(disk) = old.encode() else { continue };
        for to in shapes {
            let new = to.header(bits);
            if new.clone().place(0).is_err() {
                continue;
            }
            println!("{bits}: {from:?} to {to:?}");
            changes += 1;
            refused += usize::from(crash_everywhere(&old, &disk, &new).is_none());
        }
    }
    (changes, refused)
}

fn named(names: &[usize], of: &[Shape]) -> Vec<Shape> {
    let format = |name| if name % 2 == 1 { "qcow2" } else { "" };
    let with = |shape: &Shape, &name: &usize| Shape { name, format: format(name), ..shape.clone() };
    of.iter().flat_map(|shape| names.iter().map(move |name| with(shape, name))).collect()
}

#[test]
fn a_crash_while_a_header_changes_leaves_the_old_one_or_the_new_one() {
    let names = [0, 1, 9, 300, 381, 500, 900, 1023];
    let kinds = [
        PLAIN,
        Shape { version: 2, ..PLAIN },
        Shape { features: true, ..PLAIN },
        Shape { bitmaps: Some(5), ..PLAIN },
        Shape { features: true, bitmaps: Some(7), ..PLAIN },
    ];
    let shapes = named(&names, &kinds);
    for (bits, has_room) in [(9, true), (10, false), (11, false), (12, true), (16, true)] {
        let (changes, refused) = change_each_to_each(bits, &shapes);
        println!("{bits}: {changes} changes, {refused} refused");
        assert!(changes >= 100 && (refused == 0 || !has_room), "{bits}: {refused} of {changes}");
    }
}

#[test]
fn extensions_that_reach_behind_the_first_sector_change_without_a_tear_too() {
    let kinds = [
        Shape { data_file: 700, features: true, ..PLAIN },
        Shape { data_file: 701, features: true, bitmaps: Some(3), ..PLAIN },
        Shape { data_file: 400, unknown: 300, ..PLAIN },
        Shape { unknown: 600, bitmaps: Some(4), ..PLAIN },
        Shape { unknown: 600, ..PLAIN },
        PLAIN,
    ];
    let (changes, refused) = change_each_to_each(16, &named(&[0, 300, 501, 1023], &kinds));
    assert!(changes >= 500 && refused == 0, "{refused} of {changes} changes refused");
}

#[test]
fn a_change_for_which_there_is_no_room_is_refused_before_anything_is_written() {
    let old = Shape { name: 500, ..PLAIN };
    let mut header = old.header(10);
    let disk = header.encode().unwrap();
    let new = Shape { bitmaps: Some(3), ..old }.header(10);
    let error = steps(&header, &disk, new.clone()).err().unwrap();
    assert_eq!(error.errno(), Some(Errno(libc::ENOSPC)));
    assert_eq!(check(&header, new).unwrap_err().to_string(), error.to_string());
}

#[test]
fn fields_alone_are_one_write_of_the_first_sector_and_leave_the_rest_as_it_is() {
    let old = Shape { name: 700, features: true, ..PLAIN };
    let mut header = old.header(12);
    let mut disk = header.encode().unwrap();
    // Some other program's order.
    header = Header::parse(&disk).unwrap();
    disk[3000..].fill(7);
    let mut new = header.clone();
    new.compatible |= Compatible::LAZY_REFCOUNTS;
    let steps = steps(&header, &disk, new.clone()).unwrap();
    assert_eq!(steps.len(), 1);
    assert!(steps[0].rest.is_empty() && steps[0].switch.0 == 0);
    assert_eq!(steps[0].switch.1[112..], disk[112..512]);
    assert_eq!(steps[0].header, new);
}
