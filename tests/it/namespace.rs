//! Commands that run programs in namespaces of their own, as root and as anybody else, in a chroot too.

use std::process::{Command, Stdio};
use std::sync::LazyLock;

/// Root needs no user namespace, and gets none in a chroot.
static IS_PRIVILEGED: LazyLock<bool> = LazyLock::new(|| {
    let mut trial = Command::new("unshare");
    trial.args(["--mount", "true"]).stderr(Stdio::null());
    trial.status().unwrap().success()
});

/// `unshare`, to which the wanted namespaces and the program are added.
pub fn unshare() -> Vec<&'static str> {
    if *IS_PRIVILEGED { vec!["unshare"] } else { vec!["unshare", "--map-root-user"] }
}

/// What comes before a command to run it in the mount namespace of a process that [`unshare`] began.
pub fn enter_mounts_of(process: u32) -> Vec<String> {
    let target = process.to_string();
    let user: &[&str] = if *IS_PRIVILEGED { &[] } else { &["--user", "--preserve-credentials"] };
    [&["nsenter", "--target", &target, "--mount"], user]
        .concat()
        .into_iter()
        .map(str::to_owned)
        .collect()
}
