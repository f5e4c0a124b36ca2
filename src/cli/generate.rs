//! `vublk generate FOLDER`: man pages and shell completions from the definitions of the command line.

use super::{command_line, daemon, manual};
use clap_complete::Shell;
use std::ffi::OsString;
use std::path::Path;

/// Writes them to the folder that the arguments name.
pub fn run(arguments: &[OsString]) -> super::Outcome {
    let [folder] = arguments else {
        return Err("generate: give one argument, the folder to write to".into());
    };
    let folder = Path::new(folder);
    let failed = |error: std::io::Error| format!("{}: {error}", folder.display());
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut command = offered();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, "vublk", folder).map_err(failed)?;
    }
    manual::write(offered(), folder).map_err(failed)?;
    Ok(())
}

/// The command line with all that it offers: the daemon's options, which are parsed apart from the others, are
/// under its command.
pub fn offered() -> clap::Command {
    command_line().mut_subcommand("daemon", |_| daemon::offered())
}
