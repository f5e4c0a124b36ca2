//! A backing chain, opened layer by layer, so that a layer below the top can be written to.

use super::{Images, Opened, Wanted};
use crate::block::extents;
use crate::block::name::Names;
use crate::block::{Error, Node, Registry, Role, named};
use crate::options::{Map, Value, bytes, filename};
use std::sync::Arc;

/// An image below the top, as it can be opened again.
struct Layer {
    name: String,
    format: &'static str,
}

/// The top of a chain and one of the images below it, which can be written to.
pub struct Layers {
    pub top: Opened,
    /// Between both, from the top down.
    pub between: Vec<Opened>,
    pub base: Opened,
}

/// The image in the chain below `top` that the user calls `name`: a file's name as the image above it
/// would call it. How far down it is, 0 for the first below.
pub fn find(registry: &Registry, top: &Arc<Node>, name: &str) -> Option<usize> {
    let real = |name: &str| std::fs::canonicalize(bytes::path_of(name)).ok();
    let file_of = |name: &str| {
        let options = registry.file_options(name).ok()?;
        named::file_in(&options).and_then(real)
    };
    let mut above = top.clone();
    let mut depth = 0;
    while let Some(below) = extents::backing(&above) {
        if let (Some(own), Some(file)) = (above.driver().filename(), below.driver().filename()) {
            let wanted = filename::resolve(&own, name).ok();
            let wanted = wanted.as_deref().and_then(file_of);
            let recorded = above.driver().image().and_then(|image| image.info().backing_filename);
            if file == name
                || recorded.as_deref() == Some(name)
                || wanted.is_some() && wanted == real(&file)
            {
                return Some(depth);
            }
        }
        above = below;
        depth += 1;
    }
    None
}

/// Opens a chain again, `base` images below its top to be written to. `top` is closed first.
pub async fn open_for_commit(
    images: &Images,
    top: Opened,
    wanted: &Wanted<'_>,
    base: usize,
) -> Result<Layers, Error> {
    let (mut layers, mut names) = (Vec::new(), Names::new(images.graph().registry()));
    let mut node = top.node().clone();
    let mut longest = node.len();
    for _ in 0..=base {
        node =
            extents::backing(&node).ok_or_else(|| Error::new("The backing chain has changed"))?;
        let name = names.of(&node);
        layers.push(Layer { name, format: node.driver().name() });
    }
    let grows = node.len() < longest;
    longest = longest.max(node.len());
    drop((node, names));
    images.close(top).await?;

    let Some(Layer { name, format }) = layers.pop() else {
        return Err(Error::new("Image does not have a backing file"));
    };
    let below =
        Wanted { name: &name, format: Some(format), cache: wanted.cache, ..Wanted::default() };
    let base = images.open(&Wanted { writable: true, resize: grows, unmap: true, ..below }).await?;
    if grows {
        base.truncate(longest, crate::block::Preallocation::Off).await?;
    }
    let mut between: Vec<Opened> = Vec::new();
    for Layer { name, format } in layers.iter().rev() {
        let more = standing_on(between.last().unwrap_or(&base));
        let below = Wanted { name, format: Some(format), cache: wanted.cache, ..Wanted::default() };
        between.push(images.open(&Wanted { more, ..below }).await?);
    }
    let more = standing_on(between.last().unwrap_or(&base));
    let top = images.open(&Wanted { more, ..wanted.clone() }).await?;
    between.reverse();
    Ok(Layers { top, between, base })
}

/// The option that names an open image as the backing file.
fn standing_on(image: &Opened) -> Map {
    Map::from_iter([(Role::Backing.name(), Value::Text(image.node().name().to_owned()))])
}
