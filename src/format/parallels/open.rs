//! Opening an image: the header, the children, and which clusters of the file are in use.

use super::catalogue::{self, Named};
use super::extension::Extension;
use super::header::{self, Header, State};
use super::mapping::Stretch;
use super::space::{self, Preallocating};
use super::{Parallels, bundle, extension, mapping};
use crate::block::*;
use crate::cow::{FileEnd, Lock, cut, read_padded};
use crate::io::sync::Mutex;
use crate::io::{Errno, IoResult, IoVec};
use crate::options::node_ref::NodeRefOrNull;
use crate::options::{Map, NodeRef, Size};
use serde::Deserialize;

/// As many bytes as tell formats apart.
const HEAD: usize = crate::block::registry::PROBE_LEN;

pub(super) static HELP: &[OptionHelp] = &[
    OptionHelp { name: "file", value: "node", help: "The node that holds the image" },
    OptionHelp {
        name: "backing",
        value: "node",
        help: "The node to read where the image has no data; null for none",
    },
    OptionHelp {
        name: "prealloc-mode",
        value: "falloc|truncate",
        help: "Whether new space of the file is allocated (default) or a hole",
    },
    OptionHelp {
        name: "prealloc-size",
        value: "size",
        help: "How much longer the file gets at once (default: 128M)",
    },
];

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    file: NodeRef,
    backing: Option<NodeRefOrNull>,
    #[serde(default)]
    prealloc_mode: space::Mode,
    prealloc_size: Option<Size>,
}

pub(super) async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let options: Options = opening.parse(map)?;
    let mut held = Perm::CONSISTENT_READ;
    if opening.is_active() && !opening.options().read_only && !opening.auto_read_only() {
        // Space that an image has lost that was not closed is given back.
        held |= Perm::WRITE | Perm::RESIZE;
    }
    let during = Perms::format(Perms { held, shared: Perm::all() });
    let file = opening.child(Role::File, options.file, during).await?;
    let node = file.node();
    if bundle::probe(&read_head(&node).await?) {
        if options.backing.is_some_and(|backing| backing != NodeRefOrNull::Null) {
            return Err(Error::new(
                "The disk of a Parallels disk descriptor can have no backing file",
            ));
        }
        let growing = space::options(options.prealloc_mode, options.prealloc_size);
        return bundle::open(opening, file, growing).await;
    }
    let mut is_writable = opening.is_writable_over(&node);
    let mut header = read_header(&node).await?;
    let extension = read_extension(opening.name(), &node, &header).await;
    if let Some(feature) = extension.needed {
        if !opening.options().read_only && !opening.auto_read_only() {
            return Err(must_not_change(feature));
        }
        is_writable = false;
    }
    let stretch = Stretch::new(&header);
    // Nothing is recorded in the image.
    let backing = opening.backing(options.backing, None, &file).await?;
    if backing.is_some() && stretch.has_gaps() {
        return Err(Error::new(format!(
            "An image with clusters of {} bytes, which is no power of two, can have no backing file",
            header.cluster_size()
        )));
    }
    let may_look = opening.is_active() && !opening.policy().for_check;
    let named = match is_writable && may_look {
        true => used(opening.name(), &node, &mut header, held.contains(Perm::WRITE)).await?,
        false => Named::default(),
    };
    let mapping = mapping::tables(&header);
    let mapping = mapping.map_err(|errno| Error::os("Could not allocate the catalogue", errno))?;
    let mut children = vec![file];
    children.extend(backing);
    Ok(Box::new(Parallels {
        name: opening.name().to_owned(),
        stretch,
        children,
        mapping,
        space: space::space(&header, named, node.driver().len()),
        preallocating: Preallocating::new(options.prealloc_mode, options.prealloc_size),
        is_writable,
        is_prepared: Default::default(),
        is_frozen: Default::default(),
        state: Lock::new(header.state.clone()),
        header,
        has_reported: Default::default(),
        bitmaps: Mutex::new(extension.bitmaps),
    }))
}

pub(super) fn must_not_change(feature: u64) -> Error {
    Error::new(format!(
        "The image has a feature ({feature:#x}) that must be understood by what changes it: open it with read-only=on"
    ))
    .with_errno(Errno(libc::EACCES))
}

/// The extension of an image; nothing, with a warning, if it makes no sense: it is dropped then.
pub(super) async fn read_extension(name: &str, file: &Node, header: &Header) -> Extension {
    match extension::read(file, header).await {
        Ok(extension) => {
            let mut extension = extension.unwrap_or_default();
            if header.state.is_in_use() {
                // They do not know what was written last.
                extension.bitmaps.clear();
            }
            extension
        }
        Err(error) => {
            log::warn!("{name}: parallels: {error}: the image's dirty bitmaps are not read");
            Extension::default()
        }
    }
}

/// The clusters of an image that is about to be written. One that was not closed is brought to order, if it may be changed
/// already: what nothing names at its end is cut off, durably, and then it is not in use.
pub(super) async fn used(
    name: &str,
    file: &Node,
    header: &mut Header,
    may_change: bool,
) -> Result<Named, Error> {
    let found = catalogue::scan(file, header).await?;
    if header.state.is_in_use() && may_change {
        log::info!("{name}: parallels: the image was not closed correctly: its catalogue is sound");
        let closed = header.state.written(false);
        let settle = async || {
            cut(file, header.place_of(found.end)).await;
            file.flush().await?;
            write_state(file, header, &closed).await
        };
        settle().await.map_err(|errno| Error::os("Could not bring the image to order", errno))?;
        header.state = closed;
    }
    Ok(found)
}

/// The first bytes of a file, where an image has its header and a descriptor its first element.
async fn read_head(file: &Node) -> Result<[u8; HEAD], Error> {
    let mut head = [0; HEAD];
    let read = read_padded(file, 0, &IoVec::from_mut(&mut head)).await;
    read.map_err(|errno| Error::os("Could not read Parallels header", errno))?;
    Ok(head)
}

/// Reads the header, and checks that the file has the catalogue.
pub(super) async fn read_header(file: &Node) -> Result<Header, Error> {
    let head = read_head(file).await?;
    let header = Header::parse(head.first_chunk().unwrap_or(&[0; header::LEN]))?;
    if header.catalogue_end() > file.len() {
        return Err(Error::new(format!(
            "The Parallels catalogue ends at {:#x}, past the end of the file ({:#x})",
            header.catalogue_end(),
            file.len()
        )));
    }
    Ok(header)
}

/// Has the header say, durably, in which state the image is.
pub(super) async fn write_state(file: &Node, header: &Header, state: &State) -> IoResult {
    let bytes = header.encode_state(state);
    file.write(header::STATE_AT, &IoVec::from_ref(&bytes), WriteFlags::empty()).await?;
    file.flush().await
}

impl Parallels {
    /// Forgets what is known of the clusters of the file.
    pub(super) fn forget_clusters(&self, named: Named, file_len: u64) {
        replace(&self.space, &self.header, named, file_len);
    }
}

fn replace(space: &FileEnd, header: &Header, named: Named, file_len: u64) {
    space.replace(space::extent(header, named.end, file_len));
    named.gaps.into_iter().for_each(|gap| space.put_back(gap));
}
