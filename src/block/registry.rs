//! The registry of drivers: one entry each.
//!
//! Opening, creating, probing, help texts and tests all follow from the entries.
//!
//! The lists are made where drivers live and joined above the block layer, which names none of them.

use super::create::CreateEntry;
use super::named::NameParts;
use super::{Driver, Error, Features, Growth, LocalFuture, Opening, Role};
use crate::options::{Map, filename};

/// What a driver stands for in the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Gives the bytes of a file a meaning (`raw`, `qcow2`).
    Format,
    /// Reaches the bytes themselves: the bottom of a graph (`file`, `null-co`).
    Protocol,
    /// Changes how requests go, not what they say (`throttle`).
    Filter,
}

/// Opens a node of this driver. The options that all nodes have are already taken out of the map;
/// what is left is for the driver to read whole ([`Opening::parse`]), unknown keys being refused.
pub type OpenFn =
    for<'a> fn(&'a mut Opening, Map) -> LocalFuture<'a, Result<Box<dyn Driver>, Error>>;

/// How sure a format is that the first bytes of a file (up to [`PROBE_LEN`]; the file's name is the
/// second argument) are its own: 0 is not at all, 100 a magic number found.
pub type ProbeFn = fn(&[u8], &str) -> u32;

/// Reads a file's name.
pub type ReadNameFn = fn(&str) -> Result<NameParts, Error>;

/// Bytes that a probe looks at.
pub const PROBE_LEN: usize = 512;

/// One driver.
pub struct DriverEntry {
    /// As in `driver=NAME`.
    pub name: &'static str,
    pub kind: Kind,
    pub open: OpenFn,
    /// The children that it can have, as options of the same names.
    pub children: &'static [Role],
    /// The driver's own options, for help texts.
    pub options: &'static [OptionHelp],
    /// File names that begin with one of these and a colon are this driver's.
    pub prefixes: &'static [&'static str],
    /// How a new image is made, if that is possible.
    pub create: Option<&'static CreateEntry>,
    /// How an image of a format is distinguished from others, if it is guessed at all.
    pub probe: Option<Probe>,
    pub naming: Naming,
    /// Listings tell what has become of its discards.
    pub counts_discards: bool,
    /// Its storage can be opened once more by a node that takes the place of another one.
    pub reopens: bool,
    pub features: Features,
    pub growth: Growth,
}

/// What a driver makes of a file's name.
#[derive(Clone, Copy, Debug)]
pub enum Naming {
    /// Nothing: the name is that of the file that its child is.
    Below,
    /// It is a path, for the option `filename`: that of whatever file is no device.
    Path,
    /// It is a path, too: that of a device, if this says so, whatever the name looks like.
    Device(fn(&str) -> bool),
    /// It has a syntax of its own.
    Own(ReadNameFn),
}

/// How an image of a format is distinguished from others.
#[derive(Clone, Copy, Debug)]
pub enum Probe {
    /// By its first bytes.
    Bytes(ProbeFn),
    /// Not at all: nothing in the bytes says what they are, so whatever is of no other format is taken for it.
    Anything,
}

impl Probe {
    fn score(self, head: &[u8], filename: &str) -> u32 {
        match self {
            Probe::Bytes(score) => score(head, filename),
            Probe::Anything => 1,
        }
    }
}

impl DriverEntry {
    /// A driver of which nothing more is said.
    pub const fn new(name: &'static str, kind: Kind, open: OpenFn) -> DriverEntry {
        DriverEntry {
            name,
            kind,
            open,
            children: &[],
            options: &[],
            prefixes: &[],
            create: None,
            probe: None,
            naming: Naming::Below,
            counts_discards: false,
            reopens: true,
            features: Features::empty(),
            growth: match kind {
                Kind::Filter => Growth::Below,
                Kind::Format | Kind::Protocol => Growth::Never,
            },
        }
    }

    /// Whether any bytes are an image of it, and a file that was taken for one may be something else.
    pub fn is_raw(&self) -> bool {
        matches!(self.probe, Some(Probe::Anything))
    }

    /// Whether it is called by paths of the file system.
    pub fn takes_paths(&self) -> bool {
        matches!(self.naming, Naming::Path | Naming::Device(_))
    }

    /// What it makes of a name: a prefix is no part of a path.
    pub(super) fn path_in<'n>(&self, name: &'n str) -> &'n str {
        match filename::split_protocol(name) {
            Some((prefix, path)) if self.takes_paths() && self.prefixes.contains(&prefix) => path,
            _ => name,
        }
    }

    /// Whether its images can have backing files, which they read where they have no data.
    pub fn has_backing(&self) -> bool {
        self.children.contains(&Role::Backing)
    }

    /// Whether new images can record their backing file. Other images get it by options whenever they are opened.
    pub fn records_backing(&self) -> bool {
        self.create
            .is_some_and(|create| create.options.iter().any(|option| option.name == "backing_file"))
    }
}

/// One of a driver's options, as `--blockdev driver=NAME,help` shows it.
#[derive(Clone, Copy, Debug)]
pub struct OptionHelp {
    pub name: &'static str,
    /// What the value looks like: `str`, `int`, `on|off`, `node`.
    pub value: &'static str,
    pub help: &'static str,
}

/// All drivers of a program.
pub struct Registry {
    /// By name.
    drivers: Vec<&'static DriverEntry>,
}

impl Registry {
    /// Joins lists of drivers.
    ///
    /// # Panics
    /// When two drivers have one name: a mistake in the lists.
    pub fn new(lists: &[&[&'static DriverEntry]]) -> Registry {
        let mut drivers: Vec<_> = lists.concat();
        drivers.sort_by_key(|entry| entry.name);
        let twice = drivers.windows(2).find(|pair| pair[0].name == pair[1].name);
        assert!(twice.is_none(), "two drivers have the name {:?}", twice.map(|pair| pair[0].name));
        Registry { drivers }
    }

    pub fn get(&self, name: &str) -> Option<&'static DriverEntry> {
        let at = self.drivers.binary_search_by_key(&name, |entry| entry.name).ok()?;
        Some(self.drivers[at])
    }

    /// All drivers in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &'static DriverEntry> + '_ {
        self.drivers.iter().copied()
    }

    /// The driver whose file names begin with `prefix` and a colon.
    pub fn by_prefix(&self, prefix: &str) -> Option<&'static DriverEntry> {
        self.iter().find(|entry| entry.prefixes.contains(&prefix))
    }

    /// The driver of plain files.
    pub fn of_files(&self) -> Result<&'static DriverEntry, Error> {
        let found = self.iter().find(|entry| matches!(entry.naming, Naming::Path));
        found.ok_or_else(|| Error::new("No driver opens files"))
    }

    /// The driver of the device at a path, if there is one.
    pub(super) fn of_device(&self, path: &str) -> Option<&'static DriverEntry> {
        self.iter().find(|entry| matches!(entry.naming, Naming::Device(is_one) if is_one(path)))
    }

    /// The driver of the file or device at a path, whatever the path looks like.
    pub fn of_path(&self, path: &str) -> Result<&'static DriverEntry, Error> {
        self.of_device(path).map_or_else(|| self.of_files(), Ok)
    }

    /// The format that is surest of a file's first bytes.
    pub fn probe(&self, head: &[u8], filename: &str) -> Option<&'static DriverEntry> {
        let head = &head[..head.len().min(PROBE_LEN)];
        self.iter()
            .filter_map(|entry| Some((entry, entry.probe?.score(head, filename))))
            .filter(|&(_, score)| score > 0)
            .max_by_key(|&(_, score)| score)
            .map(|(entry, _)| entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static A: DriverEntry = entry("a", &["x"], Some(Probe::Anything));
    static B: DriverEntry =
        entry("b", &[], Some(Probe::Bytes(|head, _| 100 * head.starts_with(b"BB") as u32)));
    static C: DriverEntry = entry("c", &[], None);

    const fn entry(
        name: &'static str,
        prefixes: &'static [&'static str],
        probe: Option<Probe>,
    ) -> DriverEntry {
        let open: OpenFn = |_, _| Box::pin(std::future::ready(Err(Error::new("not here"))));
        DriverEntry { prefixes, probe, ..DriverEntry::new(name, Kind::Format, open) }
    }

    #[test]
    fn drivers_are_listed_by_name_and_found_by_name_and_prefix() {
        let registry = Registry::new(&[&[&C, &A], &[&B]]);
        assert_eq!(registry.iter().map(|entry| entry.name).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(registry.get("b").unwrap().name, "b");
        assert!(registry.get("bb").is_none());
        assert_eq!(registry.by_prefix("x").unwrap().name, "a");
        assert!(registry.by_prefix("a").is_none());
    }

    #[test]
    fn the_surest_probe_wins() {
        let registry = Registry::new(&[&[&C, &A, &B]]);
        let named = |registry: &Registry, head| registry.probe(head, "").map(|entry| entry.name);
        assert_eq!(named(&registry, b"BB"), Some("b"));
        assert_eq!(named(&registry, b""), Some("a"));
    }

    #[test]
    #[should_panic(expected = "two drivers have the name")]
    fn two_drivers_of_one_name_are_a_mistake() {
        Registry::new(&[&[&A], &[&A]]);
    }
}
