//! The options of the sandbox, and how a command enters it.

use super::{Failure, Outcome};
use crate::sandbox::{self, Place, Plan, User};
use crate::service::Service;
use std::path::{Path, PathBuf};
use std::str::FromStr;

#[derive(clap::Args, Clone, Debug, Default)]
pub struct SandboxArgs {
    /// Whether the process, once everything is open, gives up all that it does not need; `on` fails
    /// where the kernel does not offer it [default of serve: as far as it does, of daemon: off]
    #[arg(long, value_enum, value_name = "on|off")]
    sandbox: Option<Switch>,
    /// The user to become once everything is open: NAME or UID with all its groups, or with :GID that
    /// one alone
    #[arg(long, value_name = "USER")]
    user: Option<User>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(clap::Args, Clone, Debug, Default)]
pub struct SandboxPathArgs {
    /// A file, device or folder that a monitor may open in the sandbox, besides the folders of the
    /// images that are open; `ro:PATH`: only to be read
    #[arg(long = "sandbox-path", value_name = "[ro:]PATH")]
    pub paths: Vec<SandboxPath>,
}

#[derive(Clone, Debug)]
pub struct SandboxPath(pub Place);

impl FromStr for SandboxPath {
    type Err = String;

    fn from_str(text: &str) -> Result<SandboxPath, String> {
        let (path, writable) = match text.strip_prefix("ro:") {
            Some(path) => (path, false),
            None => (text, true),
        };
        match std::fs::metadata(path) {
            Ok(_) => Ok(SandboxPath(Place { path: path.into(), writable })),
            Err(error) => Err(format!("'{path}': {error}")),
        }
    }
}

/// What a command that serves disks knows of the sandbox that it wants.
pub struct Wanted<'a> {
    pub args: &'a SandboxArgs,
    /// Whether it is wanted, as far as it can be had, if the options do not say.
    pub by_default: bool,
    /// Sockets that the command has made and that stay its own: they are given to `--user`.
    pub sockets: Vec<PathBuf>,
}

impl Wanted<'_> {
    /// Becomes the user, and goes into the sandbox. To be called when everything is open.
    ///
    /// # Errors
    /// The process is not what it was told to be, and is to end.
    pub fn enter(self, plan: Plan) -> Outcome {
        let user = self.args.user.clone();
        if let Some(user) = &user {
            self.sockets.iter().try_for_each(|socket| user.take(socket))?;
        }
        let asked = match (self.args.sandbox, self.by_default) {
            (Some(Switch::On), _) => true,
            (None, true) => false,
            (Some(Switch::Off), _) | (None, false) => {
                return match user {
                    Some(user) => user.drop_privileges().map_err(|e| at("--user", e)),
                    None => Ok(()),
                };
            }
        };
        let missing = sandbox::confine(&Plan { user, ..plan }).map_err(|e| at("sandbox", e))?;
        if missing.is_empty() {
            return Ok(());
        }
        let missing = missing.join(", ");
        if asked {
            return Err(at("--sandbox on", missing));
        }
        log::warn!("sandbox: {missing}");
        Ok(())
    }
}

fn at(what: &str, error: String) -> Failure {
    format!("{what}: {error}").into()
}

/// What a service needs when it has started.
pub fn plan(service: &Service) -> Plan {
    let place = |(path, writable)| Place { path, writable };
    Plan {
        files: service.files().into_iter().map(place).collect(),
        network: service.uses_network(),
        own: service.sockets().iter().map(|path| absolute(path)).collect(),
        wakeup: Some(service.events_descriptor()),
        ..Plan::default()
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
