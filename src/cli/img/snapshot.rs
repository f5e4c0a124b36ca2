//! `snapshot`: the internal snapshots of an image.

use super::arguments::{self, FORCE_SHARE, IMAGE_OPTS, OBJECT, QUIET};
use super::{Context, Ended, Failed, Tool, snapshot_list};
use crate::block::{Error, NewSnapshot, SnapshotKey, Snapshots};
use crate::cli::getopt::{Line, switch, valued};
use crate::io::Errno;
use crate::tools::{Opened, Wanted};
use std::time::SystemTime;

pub static TOOL: Tool = Tool {
    name: "snapshot",
    about: "List, make, apply and delete an image's internal snapshots",
    options: &[
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
        QUIET,
        switch("l", "", "list").newer(&["list"]),
        valued("a", "", "SNAPSHOT", "turn the disk back to it").newer(&["apply"]),
        valued("c", "", "SNAPSHOT", "make it").newer(&["create"]),
        valued("d", "", "SNAPSHOT", "delete it").newer(&["delete"]),
    ],
    operands: "FILE",
    usage: "[--object objectdef] [--image-opts] [-U] [-q] [-l | -a snapshot | -c snapshot | -d \
             snapshot] filename",
    takes_last: false,
    run: |context, line| Box::pin(run(context, line)),
};

async fn run(context: &Context, line: Line) -> Ended {
    let mut actions = line.iter().filter(|(option, _)| matches!(*option, "l" | "a" | "c" | "d"));
    let action = actions.next();
    if actions.next().is_some() {
        return Err(Failed::usage("Cannot mix '-l', '-a', '-c', '-d'"));
    }
    let name = arguments::one_operand(&line)?;
    if arguments::objects(&line)? {
        return Ok(0);
    }
    let wanted = arguments::wanted(&line, name, "f", "image-opts")?;
    let writable = !matches!(action, Some(("l", _)));
    let images = context.images();
    let image = images.open(&Wanted { writable, ..wanted }).await?;
    let ended = match action {
        Some(("a", snapshot)) => apply(&image, snapshot).await,
        Some(("c", snapshot)) => create(&image, snapshot).await,
        Some(("d", snapshot)) => delete(&image, snapshot).await,
        Some(_) => list(&image, name),
        None => Ok(0),
    };
    let closed = images.close(image).await;
    images.end().await;
    // An image that cannot be closed after a failure has been told of in the log.
    let code = ended?;
    closed?;
    Ok(code)
}

/// What the format can do with internal snapshots.
fn snapshots(image: &Opened) -> Option<&dyn Snapshots> {
    image.node().driver().image()?.snapshots()
}

fn list(image: &Opened, name: &str) -> Ended {
    if let Some(snapshots) = snapshots(image) {
        match snapshots.list() {
            Ok(all) if !all.is_empty() => snapshot_list::print(&all),
            Err(error) if error.errno() != Some(Errno::ENOTSUP) => {
                return Err(error.at(format!("Could not open '{name}'")).into());
            }
            _ => {}
        }
    }
    Ok(0)
}

async fn create(image: &Opened, name: &str) -> Ended {
    let date = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let made = match snapshots(image) {
        // As many instructions as qemu-img writes down.
        Some(snapshots) => snapshots.create(NewSnapshot { name, date, icount: Some(0) }).await,
        None => Err(Error::os("", Errno::ENOTSUP)),
    };
    match made {
        Ok(_) => Ok(0),
        Err(error) => {
            let errno = error.errno().unwrap_or(Errno::EIO);
            Err(format!("Could not create snapshot '{name}': -{} ({errno})", errno.0).into())
        }
    }
}

async fn apply(image: &Opened, name: &str) -> Ended {
    let failed = |text: String| Failed::from(format!("Could not apply snapshot '{name}': {text}"));
    let Some(snapshots) = snapshots(image) else {
        return Err(failed("Block driver does not support snapshots".into()));
    };
    match snapshots.apply(SnapshotKey::IdOrName(name)).await {
        Ok(()) => Ok(0),
        Err(error) => Err(failed(match error.errno() {
            Some(errno) => format!("Failed to load snapshot: {errno}"),
            None => error.to_string(),
        })),
    }
}

async fn delete(image: &Opened, name: &str) -> Ended {
    let failed = |text: &str| Failed::from(format!("Could not delete snapshot '{name}': {text}"));
    let deleted = match snapshots(image) {
        Some(snapshots) => snapshots.delete(SnapshotKey::Name(name)).await,
        None => return Err(failed("snapshot not found")),
    };
    match deleted {
        Ok(_) => Ok(0),
        Err(error) if error.errno() == Some(Errno(libc::ENOENT)) => {
            Err(failed("snapshot not found"))
        }
        Err(error) => Err(failed(&error.to_string())),
    }
}
