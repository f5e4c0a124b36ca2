//! Man pages and shell completions, made from the definitions of the command line.

use clap_complete::Shell;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Generate {
    /// The folder to write to
    folder: PathBuf,
}

impl Generate {
    pub fn run(self, command: clap::Command) -> super::Outcome {
        // Its options are parsed apart from ours, but are to be found with them.
        let mut command = command.mut_subcommand("daemon", |_| super::daemon::command());
        let failed = |error: std::io::Error| format!("{}: {error}", self.folder.display());
        std::fs::create_dir_all(&self.folder).map_err(failed)?;
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            clap_complete::generate_to(shell, &mut command, "vublk", &self.folder)
                .map_err(failed)?;
        }
        clap_mangen::generate_to(command, &self.folder).map_err(failed)?;
        Ok(())
    }
}
