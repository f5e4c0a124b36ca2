//! Records of failed flushes, beside the images whose data may be lost.
//!
//! A record is a symbolic link that nothing is opened through: one call makes the whole of it. It is called
//! `IMAGE.flush-failed`, and what it points to names the image's inode and when that was made. So it holds for the image
//! when this has got another name in its folder, and not for another image that has got the old one. A device, or a
//! file that can be told apart by nothing else, has its name alone.
//!
//! A file of any kind at a record's place counts as one: a doubt is a loss.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirEntryExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// What the name of a record adds to that of its image.
const SUFFIX: &str = ".flush-failed";

/// What a record points to begins with this.
const TEXT: &str = "vublk: a flush of this image failed";

/// A file by what a new name does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    inode: u64,
    /// Nanoseconds since 1970, where the file system tells. Another file may get the number of one that is gone.
    born: Option<u128>,
}

impl Identity {
    fn of(file: &Path) -> Option<Identity> {
        let found = fs::metadata(file).ok().filter(fs::Metadata::is_file)?;
        let born = found.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        Some(Identity { inode: found.ino(), born: born.map(|since| since.as_nanos()) })
    }

    /// The file that a record names, if it names one.
    fn named_by(record: &Path) -> Option<Identity> {
        let target = fs::read_link(record).ok()?;
        let rest = target.to_str()?.strip_prefix(TEXT)?.strip_prefix(", inode ")?;
        let (inode, born) = match rest.split_once(", born ") {
            Some((inode, born)) => (inode, Some(born.parse().ok()?)),
            None => (rest, None),
        };
        Some(Identity { inode: inode.parse().ok()?, born })
    }

    fn text(self) -> String {
        let born = self.born.map(|born| format!(", born {born}")).unwrap_or_default();
        format!("{TEXT}, inode {}{born}", self.inode)
    }

    /// Whether both can be the same file.
    fn agrees(self, other: Identity) -> bool {
        let same_time = |(own, others)| own == others;
        self.inode == other.inode && self.born.zip(other.born).is_none_or(same_time)
    }
}

/// Makes the record of an image. Blocks.
pub fn make(image: &Path) -> io::Result<()> {
    let identity = Identity::of(image);
    let text = identity.map_or_else(|| TEXT.to_owned(), Identity::text);
    let own = record_of(image, None);
    let made = match (symlink(&text, &own), identity) {
        // The place is taken by the record of an image that had this name before.
        (Err(error), Some(identity)) if error.kind() == ErrorKind::AlreadyExists => {
            match Identity::named_by(&own) {
                Some(named) if !named.agrees(identity) => {
                    symlink(&text, record_of(image, Some(identity.inode)))
                }
                _ => Ok(()),
            }
        }
        (made, _) => made,
    };
    match made {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// The records that there are of these images. Blocks.
pub fn find(images: &[PathBuf]) -> Vec<PathBuf> {
    let mut folders = BTreeMap::new();
    let mut found = Vec::new();
    for image in images {
        let Some(folder) = image.parent() else { continue };
        let others = folders.entry(folder).or_insert_with(|| records_in(folder));
        found.extend(find_of(image, folder, others));
    }
    found.sort();
    found.dedup();
    found
}

fn find_of(image: &Path, folder: &Path, others: &[(PathBuf, Identity)]) -> Vec<PathBuf> {
    let identity = Identity::of(image);
    let own = record_of(image, None);
    let mut found = Vec::new();
    if fs::symlink_metadata(&own).is_ok() {
        let named = Identity::named_by(&own);
        let is_of_another = identity.zip(named).is_some_and(|(identity, named)| {
            // Where the named file is gone, the image may be a copy of it.
            !named.agrees(identity) && has(folder, named)
        });
        if !is_of_another {
            found.push(own);
        }
    }
    if let Some(identity) = identity {
        // By its name, where the folder cannot be listed.
        let second = record_of(image, Some(identity.inode));
        let second = Identity::named_by(&second).map(|named| (second, named));
        let named = others.iter().cloned().chain(second);
        found.extend(named.filter(|(_, named)| named.agrees(identity)).map(|(record, _)| record));
    }
    found
}

fn record_of(image: &Path, inode: Option<u64>) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    if let Some(inode) = inode {
        name.push(format!(".{inode}"));
    }
    name.push(SUFFIX);
    name.into()
}

/// The records in a folder that name a file, and that file. None, if it cannot be listed.
fn records_in(folder: &Path) -> Vec<(PathBuf, Identity)> {
    let is_record = |name: &[u8]| name.ends_with(SUFFIX.as_bytes());
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let records = entries.filter(|entry| is_record(entry.file_name().as_encoded_bytes()));
    records
        .map(|entry| entry.path())
        .filter_map(|record| Identity::named_by(&record).map(|named| (record, named)))
        .collect()
}

/// Whether a folder has this file, under whatever name.
fn has(folder: &Path, file: Identity) -> bool {
    let mut entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.any(|entry| {
        let is_same = |found: Identity| found.agrees(file);
        entry.ino() == file.inode && Identity::of(&entry.path()).is_some_and(is_same)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Folder {
            Folder(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().canonicalize().unwrap().join(name)
        }

        fn image(&self, name: &str) -> PathBuf {
            fs::write(self.path(name), [1; 512]).unwrap();
            self.path(name)
        }

        fn is_lost(&self, name: &str) -> bool {
            !find(&[self.path(name)]).is_empty()
        }
    }

    #[test]
    fn a_record_goes_with_its_image_when_that_is_renamed() {
        let folder = Folder::new();
        make(&folder.image("a")).unwrap();
        assert!(folder.is_lost("a"));
        fs::rename(folder.path("a"), folder.path("b")).unwrap();
        assert!(folder.is_lost("b"));
        // Another image has the name now.
        folder.image("a");
        assert!(!folder.is_lost("a"));
        assert_eq!(find(&[folder.path("a"), folder.path("b")]), [folder.path("a.flush-failed")]);
    }

    #[test]
    fn an_image_whose_record_s_place_is_taken_has_a_record_too() {
        let folder = Folder::new();
        make(&folder.image("a")).unwrap();
        fs::rename(folder.path("a"), folder.path("b")).unwrap();
        make(&folder.image("a")).unwrap();
        make(&folder.path("a")).unwrap();
        assert!(folder.is_lost("a") && folder.is_lost("b"));
        for record in find(&[folder.path("a")]) {
            fs::remove_file(record).unwrap();
        }
        assert!(!folder.is_lost("a") && folder.is_lost("b"));
    }

    #[test]
    fn a_copy_that_takes_the_place_of_the_image_has_its_record() {
        let folder = Folder::new();
        make(&folder.image("a")).unwrap();
        fs::copy(folder.path("a"), folder.path("copy")).unwrap();
        fs::rename(folder.path("copy"), folder.path("a")).unwrap();
        assert!(folder.is_lost("a"));
    }

    #[test]
    fn whatever_lies_at_a_record_s_place_is_a_record() {
        let folder = Folder::new();
        folder.image("a");
        fs::create_dir(folder.path("a.flush-failed")).unwrap();
        assert!(folder.is_lost("a"));
        for target in [TEXT, "vublk: a flush of this image failed, inode x", "a.flush-failed"] {
            folder.image("b");
            symlink(target, folder.path("b.flush-failed")).unwrap();
            assert!(folder.is_lost("b"), "{target}");
            fs::remove_file(folder.path("b.flush-failed")).unwrap();
        }
    }

    #[test]
    fn a_device_is_known_by_its_name() {
        let folder = Folder::new();
        symlink("/dev/null", folder.path("a")).unwrap();
        make(&folder.path("a")).unwrap();
        assert_eq!(fs::read_link(folder.path("a.flush-failed")).unwrap(), Path::new(TEXT));
        assert!(folder.is_lost("a"));
    }
}
