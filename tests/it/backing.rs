//! Backing files that images name: which are followed, from where, and which are refused.
//!
//! `note` is the smallest format with a backing file: the first line of its file says `NOTE`, the
//! backing file's name, and its format if that is recorded.

use crate::disks::REGISTRY;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;
use vublk::block::registry::{DriverEntry, Kind};
use vublk::block::*;
use vublk::io::{IoResult, IoVec, Worker, WorkerOptions};
use vublk::options::{NodeRef, NodeRefOrNull, keyval};

static NOTES: LazyLock<Registry> = LazyLock::new(|| {
    let all: Vec<&'static DriverEntry> = REGISTRY.iter().collect();
    Registry::new(&[&all, &[&NOTE]])
});

static NOTE: DriverEntry = DriverEntry {
    children: &[Role::File, Role::Backing],
    probe: Some(Probe::Bytes(|head, _| 100 * u32::from(head.starts_with(b"NOTE")))),
    ..DriverEntry::new("note", Kind::Format, |opening, mut options| {
        Box::pin(async move {
            let file: NodeRef = options.take_as("file")?.expect("a test gives a file");
            let backing: Option<NodeRefOrNull> = options.take_as("backing")?;
            let read = Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() };
            let file = opening.child(Role::File, file, read).await?;
            let mut line = vec![0; file.node().len() as usize];
            file.node()
                .read(0, &IoVec::from_mut(&mut line))
                .await
                .map_err(|e| Error::os("read", e))?;
            let line = String::from_utf8(line).expect("a test writes text");
            let mut words = line.trim_end_matches('\0').split_whitespace().skip(1);
            let recorded =
                words.next().map(|filename| RecordedBacking { filename, format: words.next() });
            let backing = opening.backing(backing, recorded, &file).await?;
            let children = [file].into_iter().chain(backing).collect();
            Ok(Box::new(Note(children)) as Box<dyn Driver>)
        })
    })
};

struct Note(Vec<Child>);

impl Driver for Note {
    fn entry(&self) -> &'static DriverEntry {
        &NOTE
    }

    fn traits(&self) -> Traits {
        Traits { abilities: Abilities::READ_ONLY, ..Traits::default() }
    }

    fn len(&self) -> u64 {
        self.0[0].node().len()
    }

    fn children(&self) -> &[Child] {
        &self.0
    }

    fn read<'a>(&'a self, at: u64, into: &'a IoVec<'a>) -> LocalFuture<'a, IoResult> {
        Box::pin(async move { self.0[0].node().read(at, into).await })
    }

    fn write<'a>(&'a self, _: u64, _: &'a IoVec<'a>, _: WriteFlags) -> LocalFuture<'a, IoResult> {
        unreachable!("the node is read-only")
    }

    fn flush(&self) -> LocalFuture<'_, IoResult> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn status(&self, _: u64, len: u64, _: Precision) -> LocalFuture<'_, IoResult<Extent>> {
        let status = Status::DATA | Status::ALLOCATED;
        Box::pin(std::future::ready(Ok(Extent { len, status, place: None })))
    }
}

struct Files(tempfile::TempDir);

impl Files {
    fn new(files: &[(&str, &str)]) -> Files {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            // Whole sectors, so that raw has the bytes that were written.
            std::fs::write(path, format!("{text:<512}")).unwrap();
        }
        Files(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Opens the image called `top`, and gives the drivers and files of its chain, or the error.
    fn open(&self, policy: OpenPolicy, top: &str, more: &str) -> Result<Vec<String>, String> {
        let worker = WorkerOptions { poll_max: Duration::ZERO, ..WorkerOptions::default() };
        let worker = Worker::start("test", worker).unwrap();
        let graph = Graph::with_policy(&NOTES, policy);
        let path = self.path(top);
        let path = path.display();
        let options = format!(
            "driver=note,node-name=top,read-only=on,file.driver=file,file.filename={path}{more}"
        );
        let options = keyval::parse(&options, None).unwrap().options.crumple().unwrap();
        let opened = graph.open_on(&worker, options).map(|top| self.chain(&top));
        worker.block_on(move || async move { graph.close().await });
        let root = format!("{}/", self.0.path().display());
        opened.map_err(|e| e.to_string().replace(&root, ""))
    }

    fn chain(&self, top: &Node) -> Vec<String> {
        let children = top.driver().children();
        let file = children[0].node().driver().filename().unwrap();
        let file = Path::new(&file).strip_prefix(self.0.path()).unwrap().display().to_string();
        let mut chain = vec![format!("{}:{file}", top.driver().name())];
        if let Some(backing) = children.get(1) {
            assert_eq!(backing.role(), Role::Backing);
            assert!(backing.node().options().read_only);
            chain.extend(self.chain(&backing.node()));
        }
        chain
    }
}

fn policy(backing: FollowBacking) -> OpenPolicy {
    OpenPolicy { backing, ..OpenPolicy::default() }
}

#[test]
fn recorded_names_are_followed_from_the_image_s_own_folder() {
    let files = Files::new(&[
        ("top", "NOTE below/middle note"),
        ("below/middle", "NOTE ../base raw"),
        ("base", "bytes"),
    ]);
    let chain = files.open(OpenPolicy::default(), "top", "").unwrap();
    assert_eq!(chain, ["note:top", "note:below/middle", "raw:below/../base"]);
}

#[test]
fn a_format_that_is_not_recorded_is_guessed_by_tools_only() {
    let files = Files::new(&[("top", "NOTE middle"), ("middle", "NOTE base"), ("base", "bytes")]);
    let chain = files.open(policy(FollowBacking::Probe), "top", "").unwrap();
    assert_eq!(chain, ["note:top", "note:middle", "raw:base"]);
    assert_eq!(
        files.open(policy(FollowBacking::Recorded), "top", "").unwrap_err(),
        "Could not open backing file: the image records no format of 'middle': record one with \
         'rebase -u -b middle -F FORMAT', or name the backing file in the options"
    );
}

#[test]
fn options_come_before_what_is_recorded() {
    let files = Files::new(&[("top", "NOTE missing raw"), ("base", "bytes")]);
    let base = files.path("base");
    let given = format!(
        ",backing.driver=raw,backing.file.driver=file,backing.file.filename={}",
        base.display()
    );
    for follow in [FollowBacking::Never, FollowBacking::Recorded, FollowBacking::Probe] {
        let chain = files.open(policy(follow), "top", &given).unwrap();
        assert_eq!(chain, ["note:top", "raw:base"]);
        assert_eq!(files.open(policy(follow), "top", ",backing=").unwrap(), ["note:top"]);
    }
    assert_eq!(
        files.open(policy(FollowBacking::Never), "top", "").unwrap_err(),
        "Could not open backing file: 'missing' is named by the image only, and the open policy \
         wants it in the options"
    );
}

#[test]
fn a_chain_that_bites_its_tail_is_refused() {
    let files = Files::new(&[
        ("top", "NOTE middle note"),
        ("middle", "NOTE ./top note"),
        ("self", "NOTE self note"),
    ]);
    for follow in [FollowBacking::Recorded, FollowBacking::Probe] {
        assert_eq!(
            files.open(policy(follow), "top", "").unwrap_err(),
            "Could not open backing file: Could not open backing file: Backing file './top' \
             creates an infinite loop."
        );
        assert_eq!(
            files.open(policy(follow), "self", "").unwrap_err(),
            "Could not open backing file: Backing file 'self' creates an infinite loop."
        );
    }
}

#[test]
fn what_is_missing_or_unknown_is_named() {
    for (recorded, wanted) in [
        ("gone raw", "Could not open 'gone': No such file or directory"),
        ("gone bogus", "Unknown driver 'bogus'"),
        ("bogus:gone raw", "Unknown protocol 'bogus'"),
    ] {
        let files = Files::new(&[("top", &format!("NOTE {recorded}"))]);
        let error = files.open(OpenPolicy::default(), "top", "").unwrap_err();
        assert_eq!(error, format!("Could not open backing file: {wanted}"));
    }
}

#[test]
fn a_recorded_json_name_says_everything_itself() {
    let files = Files::new(&[("base", "bytes")]);
    let base = files.path("base");
    let json = |text: &str| text.replace("BASE", base.to_str().unwrap());
    let raw = r#"json:{"driver":"raw","file":{"driver":"file","filename":"BASE"}}"#;
    let no_driver = r#"json:{"file":{"driver":"file","filename":"BASE"}}"#;
    let protocol = r#"json:{"driver":"file","filename":"BASE"}"#;
    for (name, format) in [(raw, ""), (raw, "raw"), (no_driver, "raw"), (protocol, "raw")] {
        std::fs::write(files.path("top"), format!("NOTE {} {format:<512}", json(name))).unwrap();
        let chain = files.open(OpenPolicy::default(), "top", "");
        assert_eq!(chain.unwrap(), ["note:top", "raw:base"], "{name} {format}");
    }
}

#[test]
fn drivers_off_the_whitelist_are_refused_in_qemus_words() {
    let files = Files::new(&[("top", "NOTE base raw"), ("base", "bytes")]);
    let list = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
    let open = |read_write: &[&str], read_only: &[&str]| {
        let lists = Whitelist { read_write: list(read_write), read_only: list(read_only) };
        let policy = OpenPolicy { whitelist: Some(lists), ..OpenPolicy::default() };
        (files.open(policy.clone(), "top", ""), files.open(policy, "top", ",read-only=off"))
    };
    let all = vec!["note:top".to_owned(), "raw:base".to_owned()];
    assert_eq!(open(&["note", "raw", "file"], &[]), (Ok(all.clone()), Ok(all.clone())));
    assert_eq!(
        open(&["note", "file"], &[]).0.unwrap_err(),
        "Could not open backing file: Driver 'raw' is not whitelisted"
    );
    assert_eq!(
        open(&["raw", "file"], &["note"]),
        (Ok(all), Err("Driver 'note' can only be used for read-only devices".to_owned()))
    );
}
