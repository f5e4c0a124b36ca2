//! Opening the files that an image names: its backing file and its data file.
//!
//! The user's options name them, or the image records them; recorded ones are opened as far as the graph's policy
//! permits.

use super::Opening;
use crate::block::name::name_of;
use crate::block::policy::FollowBacking;
use crate::block::{Child, Error, Perm, Perms, Role, named, probe};
use crate::options::{Map, NodeRef, NodeRefOrNull, Value, bytes, filename};
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

/// The number of images in an error about a chain whose backing files could not be opened.
const MOST_REPORTED: usize = 8;

/// The files of the images that are being opened, from this one up to the top of its chain.
pub(super) struct Chain {
    file: PathBuf,
    above: Option<Arc<Chain>>,
}

impl Drop for Chain {
    /// One after another, not one inside another.
    fn drop(&mut self) {
        let mut above = self.above.take();
        while let Some(mut chain) = above.and_then(Arc::into_inner) {
            above = chain.above.take();
        }
    }
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

fn not_near(filename: &str) -> Error {
    Error::new(format!(
        "'{}' does not lie below the folder of the image that names it, and the open policy wants that",
        filename.escape_debug()
    ))
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
        let guesses = self.graph.policy().backing == FollowBacking::Probe;
        let mut is_chain_named = true;
        let options = match (given, recorded) {
            (Some(NodeRefOrNull::Null), _) | (None, None) => return Ok(None),
            (Some(NodeRefOrNull::Name(name)), _) => Ok(NodeRef::Name(name)),
            (Some(NodeRefOrNull::Inline(given)), recorded) => {
                is_chain_named = guesses;
                self.backing_options(given, recorded, file).await
            }
            (None, recorded) => self.backing_options(Map::new(), recorded, file).await,
        };
        let child = match options {
            Ok(options) => self.child(Role::Backing, options, during).await,
            Err(error) => Err(error),
        };
        is_chain_named &= self.depth.images <= MOST_REPORTED;
        child.map(Some).map_err(|error| match is_chain_named {
            true => error.at("Could not open backing file"),
            // The error names the option, or the images above have said enough.
            false => error,
        })
    }

    /// The options of a file that has the image's data as it is, and that the image records, with what is
    /// `given` for it. Whatever the name looks like, it is that of a file or a device; a relative one starts at
    /// the process's own folder: both as in QEMU.
    ///
    /// # Errors
    /// The policy does not allow it.
    pub fn recorded_file(&self, filename: &str, given: Map) -> Result<NodeRef, Error> {
        if given.is_empty() {
            self.check_named(filename)?;
        }
        let options = match self.graph.policy().backing {
            FollowBacking::Never => given,
            _ => self.graph.registry().recorded_file_options(filename, given)?,
        };
        Ok(NodeRef::Inline(options))
    }

    /// The options of a file that holds a part of the image's data and that the image records by a path, which is
    /// relative to the folder of the image. `file` is the child that the image itself is in; errors call it `what`.
    ///
    /// # Errors
    /// The policy does not allow it, or it is the image's own file.
    pub fn recorded_extent(
        &self,
        filename: &str,
        file: &Child,
        what: &str,
    ) -> Result<NodeRef, Error> {
        self.check_named(filename)?;
        self.check_near(filename)?;
        let own = file.node().driver().filename();
        let own = own.filter(|own| !own.starts_with("json:"));
        let path = match own.as_deref() {
            _ if filename.starts_with('/') => filename.to_owned(),
            Some(own) => format!("{}{filename}", &own[..own.rfind('/').map_or(0, |at| at + 1)]),
            None => {
                return Err(Error::new(format!(
                    "Cannot use relative paths with {what} '{}'",
                    name_of(&file.node(), self.graph.registry()).escape_debug()
                )));
            }
        };
        let real = |path: &str| std::fs::canonicalize(bytes::path_of(path)).ok();
        let (own, found) = (own.as_deref().and_then(real), real(&path));
        if own.is_some() && own == found {
            return Err(Error::new(format!(
                "The image names its own file '{}' as one with a part of its data",
                filename.escape_debug()
            )));
        }
        let is_near = || match (own.as_deref().and_then(Path::parent), &found) {
            (Some(folder), Some(found)) => found.starts_with(folder) && found.is_file(),
            // Opening the file reports that it is missing.
            _ => true,
        };
        if self.graph.policy().backing != FollowBacking::Probe && !is_near() {
            return Err(not_near(filename));
        }
        let options = self.graph.registry().recorded_file_options(&path, Map::new())?;
        Ok(NodeRef::Inline(options))
    }

    /// Checks that the policy allows a name that only the image has: unless the policy allows all names, the name
    /// has to lead below the folder of the image.
    ///
    /// # Errors
    /// It does not.
    pub fn check_near(&self, filename: &str) -> Result<(), Error> {
        let is_near = filename::is_below(filename);
        match self.graph.policy().backing {
            FollowBacking::Recorded if !is_near => Err(not_near(filename)),
            _ => Ok(()),
        }
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

    /// The options of a backing file: those that are given, merged with what is recorded.
    async fn backing_options(
        &mut self,
        given: Map,
        recorded: Option<RecordedBacking<'_>>,
        file: &Child,
    ) -> Result<NodeRef, Error> {
        let registry = self.graph.registry();
        let follow = self.graph.policy().backing;
        let guesses = follow == FollowBacking::Probe;
        let is_followed = given.is_empty() || follow != FollowBacking::Never;
        let mut options = match recorded {
            Some(recorded) if is_followed && registry.wants_name(&given)? => {
                self.follow(recorded, given, file)?
            }
            // The options are whole, or what is missing is an error.
            _ if !guesses => given,
            Some(RecordedBacking { filename, format }) => {
                registry.recorded_options(filename, format, given)?
            }
            None => registry.complete(given),
        };
        if guesses && !options.contains("driver") {
            let Some(Value::Map(storage)) = options.get(Role::File.name()) else {
                return Err(Error::new("Must specify either driver or file"));
            };
            let format = self.probe(storage.clone()).await?;
            options.insert("driver", format);
        }
        if guesses {
            registry.plain_numbers(&mut options)?;
        }
        Ok(NodeRef::Inline(options))
    }

    /// The options of a recorded backing file, `given` ones among them. Where formats are not guessed, they name
    /// the driver.
    fn follow(
        &mut self,
        recorded: RecordedBacking<'_>,
        given: Map,
        file: &Child,
    ) -> Result<Map, Error> {
        let RecordedBacking { filename, format } = recorded;
        self.check_named(filename)?;
        let own = file.node().driver().filename();
        let name = filename::resolve(own.as_deref().unwrap_or("json:"), filename)?;
        let options = self.graph.registry().recorded_options(&name, format, given)?;
        self.chain = self.chain_to(own.as_deref(), &name, named::file_in(&options))?;
        if !options.contains("driver") && self.graph.policy().backing != FollowBacking::Probe {
            let shown = filename.escape_debug();
            return Err(Error::new(format!(
                "the image records no format of '{shown}': record one with \
                 'rebase -u -b {shown} -F FORMAT', or name the backing file in the options"
            )));
        }
        Ok(options)
    }

    /// The format that a file's first bytes tell.
    async fn probe(&mut self, options: Map) -> Result<&'static str, Error> {
        let name = named::file_in(&options).unwrap_or_default().to_owned();
        let inherited = self.inherited(Role::Backing);
        let path = super::join(&self.path, "backing.file");
        let node = self
            .graph
            .open_node(options, path, Some(inherited), self.depth.below(Role::File), self.claim)
            .await?;
        probe::probe(self.graph.registry(), &node, &name).await.map(|entry| entry.name)
    }

    /// The chain with the image at its end, unless `file`, which the image calls `name`, is in it already.
    fn chain_to(
        &self,
        own: Option<&str>,
        name: &str,
        file: Option<&str>,
    ) -> Result<Option<Arc<Chain>>, Error> {
        let real = |path: &str| std::fs::canonicalize(bytes::path_of(path)).ok();
        let chain = match own.and_then(real) {
            Some(file) => Some(Arc::new(Chain { file, above: self.chain.clone() })),
            None => self.chain.clone(),
        };
        if let Some(chain) = &chain
            && let Some(file) = file.and_then(real)
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
