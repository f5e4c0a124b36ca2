//! The options that restrict what may be opened, the same for every command that serves disks.

use crate::block::{FollowBacking, OpenPolicy, Whitelist};

#[derive(clap::Args, Clone, Debug, Default)]
pub struct PolicyArgs {
    /// Drivers that may be used, formats and protocols alike, separated by commas [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    rw_whitelist: Option<Vec<String>>,
    /// Drivers that may be used for nodes that are read-only, besides those of --rw-whitelist
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    ro_whitelist: Option<Vec<String>>,
    /// What to do about backing files, and data files, that images name themselves
    #[arg(long, value_enum, value_name = "RULE", default_value_t)]
    backing_files: BackingFiles,
}

#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum BackingFiles {
    /// Open them, backing files if their format is recorded too
    #[default]
    Recorded,
    /// Refuse them: all files are named in options
    Never,
}

impl PolicyArgs {
    pub fn policy(self) -> OpenPolicy {
        let backing = match self.backing_files {
            BackingFiles::Recorded => FollowBacking::Recorded,
            BackingFiles::Never => FollowBacking::Never,
        };
        let any = self.rw_whitelist.is_some() || self.ro_whitelist.is_some();
        let whitelist = any.then(|| Whitelist {
            read_write: self.rw_whitelist.unwrap_or_default(),
            read_only: self.ro_whitelist.unwrap_or_default(),
        });
        OpenPolicy { backing, whitelist, ..OpenPolicy::default() }
    }
}
