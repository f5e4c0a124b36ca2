//! `convert --bitmaps`: copying the persistent bitmaps of the source.

use super::bitmap::store;
use super::{Context, Failed};
use crate::block::bitmap::Bitmap;
use crate::block::{NewBitmap, Node};
use std::sync::Arc;

/// Whether an image can have persistent bitmaps.
fn can_have(node: &Node) -> bool {
    node.driver().bitmap_store().is_some_and(|store| store.is_available())
}

/// In the order in which QEMU goes through them.
fn persistent(node: &Node) -> impl Iterator<Item = Arc<Bitmap>> {
    node.bitmaps().all().into_iter().rev().filter(|bitmap| bitmap.flags().persistent)
}

/// Whether the source's bitmaps can be copied, all of them or, with `skip`, those that make sense.
pub fn check_source(node: &Node, skip: bool) -> Result<(), Failed> {
    if !can_have(node) {
        return Err("Source lacks bitmap support".into());
    }
    match persistent(node).find(|bitmap| bitmap.flags().inconsistent && !skip) {
        Some(bitmap) => Err(Failed {
            hint: Some(
                "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it".into(),
            ),
            ..Failed::from(format!("Cannot copy inconsistent bitmap '{}'", bitmap.name()))
        }),
        None => Ok(()),
    }
}

/// Whether the target can keep bitmaps.
pub fn check_target(node: &Node) -> Result<(), Failed> {
    match can_have(node) {
        true => Ok(()),
        false => {
            let format = node.driver().name();
            Err(format!("Format driver '{format}' does not support bitmaps").into())
        }
    }
}

/// Copies the bitmaps, once the contents are there.
pub async fn copy(context: &Context, from: &Arc<Node>, to: &Arc<Node>) -> Result<(), Failed> {
    for bitmap in persistent(from) {
        let (name, flags) = (bitmap.name(), bitmap.flags());
        if flags.inconsistent {
            context.warn(&format!("Skipping inconsistent bitmap '{name}'"));
            continue;
        }
        let new = NewBitmap {
            name: name.into(),
            granularity: Some(bitmap.granularity()),
            persistent: true,
            disabled: !flags.recording,
        };
        let made = to.add_bitmap(new).await;
        made.map_err(|error| error.at(format!("Failed to create bitmap {name}")))?;
        if let Err(error) = to.merge_bitmaps(name, &[(from.clone(), name.into())]).await {
            to.remove_bitmap(name).await?;
            return Err(error.at(format!("Failed to populate bitmap {name}")).into());
        }
    }
    Ok(store(to).await?)
}
