//! `snapshot`: the internal snapshots of an image.
//!
//! No driver here has any yet, so lists are empty and everything else is refused, in the words that
//! qemu-img has for such images.

use super::arguments::{self, FORCE_SHARE, IMAGE_OPTS, OBJECT, QUIET};
use super::{Context, Ended, Failed, Tool};
use crate::cli::getopt::{Line, switch, valued};
use crate::tools::Wanted;

pub static TOOL: Tool = Tool {
    name: "snapshot",
    about: "List, make, apply and delete an image's internal snapshots",
    options: &[
        OBJECT,
        IMAGE_OPTS,
        FORCE_SHARE,
        QUIET,
        switch("l", "", "list (the default)"),
        valued("a", "", "SNAPSHOT", "turn the disk back to it"),
        valued("c", "", "SNAPSHOT", "make it"),
        valued("d", "", "SNAPSHOT", "delete it"),
    ],
    operands: "FILE",
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
        None | Some(("l", _)) => Ok(0),
        Some((action, snapshot)) => Err(refusal(action, snapshot).into()),
    };
    images.close(image).await?;
    images.end().await;
    ended
}

fn refusal(action: &str, snapshot: &str) -> String {
    match action {
        "c" => {
            format!("Could not create snapshot '{snapshot}': -95 (Operation not supported)")
        }
        "a" => format!(
            "Could not apply snapshot '{snapshot}': Block driver does not support snapshots"
        ),
        _ => format!("Could not delete snapshot '{snapshot}': snapshot not found"),
    }
}
