//! The names of `serve`'s disks: what metrics and logs call them.

use crate::options::is_identifier;
use std::path::Path;

/// Longest name of an export, in characters.
const LONGEST: usize = 64;
/// Longest part of it that names the disk's node, whose name has at most 31 characters with what is added to it.
const LONGEST_NODE: usize = 20;

/// The name of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskName {
    pub export: String,
    /// The same made fit for a node.
    pub node: String,
}

/// The names that are taken.
#[derive(Default)]
pub struct DiskNames(Vec<DiskName>);

impl DiskNames {
    /// A name that the user gives.
    ///
    /// # Errors
    /// It is empty, too long, has control characters, or another disk has it.
    pub fn given(&mut self, name: &str) -> Result<DiskName, String> {
        let length = name.chars().count();
        if !(1..=LONGEST).contains(&length) || name.contains(char::is_control) {
            let name = name.escape_debug();
            return Err(format!(
                "--name {name}: not a name of 1 to {LONGEST} printable characters"
            ));
        }
        if self.0.iter().any(|taken| taken.export == name) {
            return Err(format!("--name {name}: two disks cannot have one name"));
        }
        Ok(self.take(name.to_owned()))
    }

    /// The name of an image's file without its ending; with a number where that is taken.
    pub fn of_image(&mut self, image: &Path) -> DiskName {
        let stem = image.file_stem().map_or("disk".into(), |stem| stem.to_string_lossy());
        let stem: String = stem.chars().filter(|c| !c.is_control()).take(LONGEST).collect();
        let name = unused(&stem, |name| self.0.iter().any(|taken| taken.export == name));
        self.take(name)
    }

    fn take(&mut self, export: String) -> DiskName {
        let fit = |c: char| if c.is_ascii_alphanumeric() || "-._".contains(c) { c } else { '_' };
        let mut node: String = export.chars().map(fit).take(LONGEST_NODE).collect();
        if !is_identifier(&node) {
            node.insert_str(0, "disk-");
            node.truncate(LONGEST_NODE);
        }
        let node = unused(&node, |name| self.0.iter().any(|taken| taken.node == name));
        let name = DiskName { export, node };
        self.0.push(name.clone());
        name
    }
}

/// The name, or the first of `name-2`, `name-3` and so on that is not taken.
fn unused(name: &str, is_taken: impl Fn(&str) -> bool) -> String {
    let numbered = (2..).map(|n| format!("{name}-{n}"));
    let mut all = std::iter::once(name.to_owned()).chain(numbered);
    all.find(|name| !is_taken(name)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_called_as_its_image_is() {
        let mut names = DiskNames::default();
        let mut named = |image: &str| {
            let DiskName { export, node } = names.of_image(Path::new(image));
            (export, node)
        };
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(named("/srv/web.img"), pair("web", "web"));
        assert_eq!(named("other/web.qcow2"), pair("web-2", "web-2"));
        assert_eq!(named("/dev/vg0/7 of hearts"), pair("7 of hearts", "disk-7_of_hearts"));
        assert_eq!(named("nvme://0000:01:00.0/1"), pair("1", "disk-1"));
        let long = "x".repeat(100);
        assert_eq!(named(&long), pair(&long[..64], &long[..20]));
        assert!(is_identifier(&format!("{}-snapshot", named("é").1)));
    }

    #[test]
    fn names_that_users_give_are_checked() {
        let mut names = DiskNames::default();
        assert_eq!(names.given("web 1").unwrap().node, "web_1");
        assert!(names.given("web 1").unwrap_err().contains("two disks"));
        assert!(names.given("").is_err() && names.given("a\nb").is_err());
        // Two names that are one when made fit.
        assert_eq!(names.given("web_1").unwrap().node, "web_1-2");
    }
}
