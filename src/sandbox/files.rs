//! The paths that the confined process may open, create or remove: Landlock rules.
//!
//! What is open stays usable whatever the rules say. They name what may be opened again: the images
//! themselves, and where nodes may be added their folders, to be written to only if an image there is.
//!
//! A driver that opens files of its own again while it serves names them by
//! [`Driver::filename`](crate::block::Driver::filename) of a node without children. What a monitor adds
//! beside images (VFIO's devices, say) is given as `--sandbox-path /dev/vfio`.

use super::plan::{Place, Plan};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, Scope, make_bitflags,
};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The newest version that this was tried with. An older kernel leaves out what it does not know.
const VERSION: ABI = ABI::V7;

/// Where the limits of block devices are found.
const DEVICES: &str = "/sys/devices";

type Rights = BitFlags<AccessFs>;

fn rights(writable: bool) -> Rights {
    let read = make_bitflags!(AccessFs::{ReadFile | IoctlDev});
    if writable { read | make_bitflags!(AccessFs::{WriteFile | Truncate}) } else { read }
}

/// Of a folder that images and sockets may come into. It is opened to be locked while a socket is made.
fn folder_rights(writable: bool) -> Rights {
    let made = make_bitflags!(AccessFs::{MakeReg | MakeSock | MakeSym | RemoveFile | ReadDir});
    if writable { rights(true) | made } else { rights(false) }
}

/// What the process may open, once it is confined.
static ALLOWED: OnceLock<Vec<(PathBuf, Rights)>> = OnceLock::new();

/// From now on [`keeps_out`] answers by these rules.
pub(super) fn keep(plan: &Plan) {
    let _ = ALLOWED.set(allowed(plan));
}

/// Whether it is the sandbox that keeps the process from opening a file, or, with `makes`, from making
/// a socket there.
pub fn keeps_out(path: &Path, writable: bool, makes: bool) -> bool {
    let Some(all) = ALLOWED.get() else { return false };
    let needed = match makes {
        true => AccessFs::MakeSock.into(),
        false if writable => AccessFs::ReadFile | AccessFs::WriteFile,
        false => AccessFs::ReadFile.into(),
    };
    // The rules are about files, the names of which may lead elsewhere; those of rules too.
    let real = |path: &Path| fs::canonicalize(path).or_else(|_| std::path::absolute(path)).ok();
    let Some(path) = real(path) else { return false };
    let places = all.iter().filter_map(|(place, rights)| Some((real(place)?, *rights)));
    let has = places.filter(|(place, _)| path.starts_with(place));
    let has = has.fold(Rights::empty(), |has, (_, rights)| has | rights);
    !has.contains::<Rights>(needed)
}

/// The rules for a process.
///
/// # Errors
/// Why there are none: in the kernel, most likely.
pub(super) fn ruleset(plan: &Plan) -> Result<OwnedFd, String> {
    let failed = |error: landlock::RulesetError| error.to_string();
    let mut network = AccessNet::from_all(VERSION);
    if plan.network {
        network.remove(AccessNet::ConnectTcp);
    }
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(VERSION))
        .and_then(|rules| rules.handle_access(network))
        .and_then(|rules| rules.scope(Scope::from_all(VERSION)))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    for (path, rights) in allowed(plan) {
        rules = add(rules, &path, rights).map_err(failed)?;
    }
    Option::<OwnedFd>::from(rules).ok_or_else(|| "the kernel offers no Landlock".into())
}

fn add(
    rules: RulesetCreated,
    path: &Path,
    rights: Rights,
) -> Result<RulesetCreated, landlock::RulesetError> {
    match PathFd::new(path) {
        Ok(file) => rules.add_rule(PathBeneath::new(file, rights)),
        // What is not there now, or not a file, cannot be opened later.
        Err(error) => {
            log::info!("sandbox: {error}");
            Ok(rules)
        }
    }
}

/// The paths, and what may be done there.
fn allowed(plan: &Plan) -> Vec<(PathBuf, Rights)> {
    let mut all = Vec::new();
    for Place { path, writable } in &plan.files {
        // The rules follow files, not names: those of a link are of what it leads to.
        let Ok(path) = fs::canonicalize(path) else { continue };
        // A failed flush is recorded beside the image.
        if *writable && let Some(folder) = path.parent() {
            all.push((folder.to_owned(), AccessFs::MakeSym.into()));
        }
        if plan.grows
            && let Some(folder) = folder_of_images(&path)
        {
            all.push((folder, folder_rights(*writable)));
        }
        all.push((path, rights(*writable)));
    }
    for Place { path, writable } in &plan.folders {
        let is_folder = fs::metadata(path).is_ok_and(|found| found.is_dir());
        let rights = if is_folder { folder_rights(*writable) } else { rights(*writable) };
        all.push((path.clone(), rights));
    }
    for path in &plan.own {
        if let Some(folder) = path.parent() {
            let mut rights = BitFlags::from(AccessFs::RemoveFile);
            if plan.grows {
                rights |= AccessFs::MakeSock | AccessFs::ReadDir;
            }
            // A relative name's folder may be the empty one.
            let folder = if folder == Path::new("") { Path::new(".") } else { folder };
            all.push((folder.to_owned(), rights));
        }
    }
    if plan.grows {
        all.push((DEVICES.into(), AccessFs::ReadFile.into()));
    }
    all
}

/// The folder whose files are taken for images. Not that of a device, which has all devices, and not
/// the root of everything.
fn folder_of_images(file: &Path) -> Option<PathBuf> {
    let kind = fs::metadata(file).ok()?.file_type();
    let folder = file.parent()?;
    let device = kind.is_block_device() || kind.is_char_device();
    (!device && folder.parent().is_some()).then(|| folder.to_owned())
}
