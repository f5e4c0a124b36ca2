//! The files that an image names itself: what it takes unwritten bytes from, and what its data is in. They
//! are given in the options, or recorded in the image and then opened as far as the graph's policy allows.

use super::{Inherit, Opening, path_of};
use crate::block::policy::FollowBacking;
use crate::block::{Child, Error, Perm, Perms, probe};
use crate::options::{Map, NodeRef, NodeRefOrNull, Value, filename};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What an image says of the file that it takes its unwritten bytes from.
#[derive(Clone, Copy, Debug)]
pub struct RecordedBacking<'a> {
    /// A file name as a user would give it; a relative one starts at the image's own folder.
    pub filename: &'a str,
    /// The name of a format.
    pub format: Option<&'a str>,
}

/// The files of the images that are being opened, from this one up to the top of its chain.
pub(super) struct Chain {
    file: PathBuf,
    above: Option<Arc<Chain>>,
}

impl Chain {
    fn has(mut self: &Chain, file: &Path) -> bool {
        loop {
            if self.file == file {
                return true;
            }
            match &self.above {
                Some(above) => self = above,
                None => return false,
            }
        }
    }
}

impl Opening {
    /// The backing child of an image: what the options say (`backing`), or else what the image
    /// records. `file` is the child that the image itself is in.
    ///
    /// # Errors
    /// Beside those of opening it: the policy does not allow it, its format is neither given nor
    /// recorded, or it is an image above it in the same chain.
    pub async fn backing(
        &mut self,
        given: Option<NodeRefOrNull>,
        recorded: Option<RecordedBacking<'_>>,
        file: &Child,
    ) -> Result<Option<Child>, Error> {
        let during = Perms { held: Perm::CONSISTENT_READ, shared: Perm::all() };
        let options = match (given, recorded) {
            (Some(NodeRefOrNull::Null), _) | (None, None) => return Ok(None),
            (Some(NodeRefOrNull::Name(name)), _) => NodeRef::Name(name),
            (Some(NodeRefOrNull::Inline(map)), recorded) => {
                let format = recorded.and_then(|recorded| recorded.format);
                NodeRef::Inline(self.with_format(map, format).await?)
            }
            (None, Some(recorded)) => {
                let options = self.follow(recorded, file).await;
                let options = options.map_err(|e| e.at("Could not open backing file"))?;
                let child = self.child("backing", options, Inherit::Backing, during).await;
                return child.map(Some).map_err(|e| e.at("Could not open backing file"));
            }
        };
        self.child("backing", options, Inherit::Backing, during).await.map(Some)
    }

    /// The options of a file that has the image's data as it is, and that the image records. Whatever the
    /// name looks like, it is that of a file or a device; a relative one starts at the process's own folder:
    /// both as in QEMU.
    ///
    /// # Errors
    /// The policy does not allow it.
    pub fn recorded_file(&self, filename: &str) -> Result<NodeRef, Error> {
        self.check_named(filename)?;
        let driver = self.graph.registry().driver_of_path(filename);
        Ok(NodeRef::Inline(Map::from_iter([("driver", driver), ("filename", filename)])))
    }

    /// Whether the policy allows to open what only the image names.
    fn check_named(&self, filename: &str) -> Result<(), Error> {
        match self.graph.policy().backing {
            // What an image says may hold anything.
            FollowBacking::Never => Err(Error::new(format!(
                "'{}' is named by the image only, and the open policy wants it in the options",
                filename.escape_debug()
            ))),
            FollowBacking::Recorded | FollowBacking::Probe => Ok(()),
        }
    }

    /// Where formats are guessed: the options of a backing file with the format that is recorded, or that
    /// its first bytes tell, if they name none.
    async fn with_format(&mut self, mut map: Map, format: Option<&str>) -> Result<Map, Error> {
        let guesses = self.graph.policy().backing == FollowBacking::Probe;
        if let (true, false, Some(Value::Map(file))) =
            (guesses, map.contains("driver"), map.get("file"))
        {
            let name = file.get("filename").and_then(Value::as_str).unwrap_or_default();
            let format = match format {
                Some(format) => format,
                None => self.probe(name, file.clone()).await?,
            };
            map.insert("driver", format);
        }
        Ok(map)
    }

    /// The options of a recorded backing file.
    async fn follow(
        &mut self,
        recorded: RecordedBacking<'_>,
        file: &Child,
    ) -> Result<NodeRef, Error> {
        let RecordedBacking { filename, format } = recorded;
        self.check_named(filename)?;
        let shown = filename.escape_debug();
        let follow = self.graph.policy().backing;
        let own = path_of(file);
        let name = match &own {
            Some(own) => filename::resolve(own, filename)?,
            None => filename::resolve("json:", filename)?,
        };
        self.chain = self.chain_to(own.as_deref(), &name)?;
        let registry = self.graph.registry();
        let mut options = registry.file_options(&name)?;
        if name.starts_with("json:") && format.is_none() {
            // It says everything itself.
            return Ok(NodeRef::Inline(options));
        }
        let format = match format {
            Some(format) if registry.get(format).is_some() => format,
            Some(format) => {
                return Err(Error::new(format!("Unknown driver '{}'", format.escape_debug())));
            }
            None if follow == FollowBacking::Probe => self.probe(&name, options.clone()).await?,
            None => {
                return Err(Error::new(format!(
                    "the image records no format of '{shown}': record one with \
                     'rebase -u -b {shown} -F FORMAT', or name the backing file in the options"
                )));
            }
        };
        // A json: name may describe the format's node, or only what is below it.
        match options.get("driver").and_then(Value::as_str) {
            Some(driver) if driver != format => {}
            named => {
                if named.is_none() {
                    options.insert("driver", format);
                }
                return Ok(NodeRef::Inline(options));
            }
        }
        let mut node = Map::new();
        node.insert("driver", format);
        node.insert("file", Value::Map(options));
        Ok(NodeRef::Inline(node))
    }

    /// The format that a file's first bytes tell.
    async fn probe(&mut self, name: &str, options: Map) -> Result<&'static str, Error> {
        let inherited = self.inherited(Inherit::Backing);
        let path = super::join(&self.path, "backing.file");
        let node = self.graph.open_node(options, path, Some(inherited), self.depth + 1).await?;
        probe::probe(self.graph.registry(), &node, name).await.map(|entry| entry.name)
    }

    /// The chain with the image at its end, unless the file called `name` is in it already.
    fn chain_to(&self, own: Option<&str>, name: &str) -> Result<Option<Arc<Chain>>, Error> {
        let chain = match own.and_then(|own| std::fs::canonicalize(own).ok()) {
            Some(file) => Some(Arc::new(Chain { file, above: self.chain.clone() })),
            None => self.chain.clone(),
        };
        if let Some(chain) = &chain
            && let Ok(file) = std::fs::canonicalize(name.strip_prefix("file:").unwrap_or(name))
            && chain.has(&file)
        {
            return Err(Error::new(format!(
                "Backing file '{}' creates an infinite loop.",
                name.escape_debug()
            )));
        }
        Ok(chain)
    }
}
