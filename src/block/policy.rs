//! The policy for opening: permitted drivers, and permitted references from images.
//!
//! An image may come from an untrusted author. References from it to other files are followed only as far as the
//! policy of its graph allows.

use super::Error;

/// The policy of a graph. The default follows recorded backing files whose format is recorded too,
/// and knows all drivers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenPolicy {
    pub backing: FollowBacking,
    /// The drivers that may be used, if not all.
    pub whitelist: Option<Whitelist>,
    /// Whether other processes may write to a raw image that is only read here. Tools look at the
    /// disks of running guests; a guest's own disk is not to change under it.
    pub readers_share: bool,
    /// Images are opened to be checked: what is wrong with them is found and repaired by the check,
    /// and does not keep them from being written by it.
    pub for_check: bool,
    /// Images are opened for their metadata: external data files, of which nothing is read then, need not be there.
    pub for_info: bool,
}

/// The reaction to a backing file that an image names and the options do not. A data file, which has no format, is
/// opened unless all are refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FollowBacking {
    /// Refused: whatever is opened is named in the options.
    Never,
    /// It is opened if its format is recorded beside its name. A format is not guessed: a guest can
    /// write the magic number of any format to the start of a raw disk, and would be given whatever
    /// files it names there.
    #[default]
    Recorded,
    /// It is opened, and if no format is recorded, its first bytes decide: what QEMU's tools do.
    Probe,
}

/// Drivers by name, formats and protocols alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Whitelist {
    pub read_write: Vec<String>,
    /// Drivers for nodes that are read-only, besides those of `read_write`.
    pub read_only: Vec<String>,
}

impl OpenPolicy {
    /// Whether a node of this driver may be opened.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn check_driver(&self, name: &str, read_only: bool) -> Result<(), Error> {
        let Some(Whitelist { read_write, read_only: only }) = &self.whitelist else {
            return Ok(());
        };
        let in_list = |list: &[String]| list.iter().any(|entry| entry == name);
        match (in_list(read_write), in_list(only)) {
            (true, _) => Ok(()),
            (false, true) if read_only => Ok(()),
            (false, true) => {
                Err(Error::new(format!("Driver '{name}' can only be used for read-only devices")))
            }
            (false, false) => Err(Error::new(format!("Driver '{name}' is not whitelisted"))),
        }
    }
}
