//! Opening an image: the footers, the header of an image that grows, the children.

use super::fixed::Fixed;
use super::footer::{self, Kind, SizeRule};
use super::header::Header;
use super::{Parent, Vpc, mapping, parent, space};
use crate::block::*;
use crate::cow::FileEnd;
use crate::options::node_ref::NodeRefOrNull;
use crate::options::{Map, NodeRef};
use serde::Deserialize;
use std::sync::atomic::AtomicBool;

pub(super) static HELP: &[OptionHelp] = &[
    OptionHelp { name: "file", value: "node", help: "The node that holds the image" },
    OptionHelp {
        name: "backing",
        value: "node",
        help: "The parent of a differencing image, to read where it has no data; null for none",
    },
    OptionHelp {
        name: "force_size_calc",
        value: "chs|current_size",
        help: "Take the size of the disk from its geometry, or from the footer's field, whatever program made it",
    },
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    file: NodeRef,
    backing: Option<NodeRefOrNull>,
    force_size_calc: Option<String>,
}

pub(super) async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let Options { file, backing, force_size_calc } = opening.parse(map)?;
    let rule = match force_size_calc.as_deref() {
        None => None,
        Some("chs") => Some(SizeRule::Geometry),
        Some("current_size") => Some(SizeRule::CurrentSize),
        Some(other) => {
            let other = other.escape_debug();
            return Err(Error::new(format!("Invalid size calculation mode: '{other}'")));
        }
    };
    let mut asked = Map::new();
    force_size_calc.and_then(|rule| asked.insert("force_size_calc", rule));
    let mut held = Perm::CONSISTENT_READ;
    if opening.is_active() && !opening.options().read_only && !opening.auto_read_only() {
        // An image that was not closed is brought to rest.
        held |= Perm::WRITE | Perm::RESIZE;
    }
    let during = Perms::format(Perms { held, shared: Perm::all() });
    let file = opening.child(Role::File, file, during).await?;
    let node = file.node();
    let is_writable = opening.is_writable_over(&node);
    let mut found = footer::read(&node).await?;
    let size = found.footer.disk_size(rule)?;
    if found.footer.kind != Kind::Differencing
        && !matches!(backing, None | Some(NodeRefOrNull::Null))
    {
        return Err(Error::new("The VHD image has no parent, and takes no backing file"));
    }
    if found.footer.kind == Kind::Fixed {
        return Ok(Box::new(Fixed::new(file, size, asked, is_writable)?));
    }
    let header = Header::read(&node, found.footer.header_at, size).await?;
    let table_end = header.table_at + header.table_len();
    let file_len = node.driver().len();
    if table_end > file_len {
        return Err(Error::new(format!(
            "Error reading pagetable: it ends at {table_end:#x}, past the end of the file ({file_len:#x})"
        )));
    }
    let taken = header.taken(found.footer.header_at);
    let clear_from = taken.iter().map(|taken| taken.end.min(file_len)).max().unwrap_or(file_len);
    let (parent, backing) = match found.footer.kind {
        Kind::Differencing => open_parent(opening, backing, &header, &file).await?,
        _ => (None, None),
    };
    let may_settle = opening.is_active() && !opening.policy().for_check;
    let start = match is_writable && may_settle {
        true => space::start(&header, space::end_of_blocks(&node, &header, clear_from).await?),
        false => space::start(&header, file_len),
    };
    if is_writable && may_settle && held.contains(Perm::WRITE) {
        space::settle(opening.name(), &node, &header, &mut found, start).await?;
    }
    let file_len = node.driver().len();
    let mapping = mapping::tables(&header, size);
    let mapping = mapping.map_err(|errno| Error::os("Could not allocate the block map", errno))?;
    Ok(Box::new(Vpc {
        name: opening.name().to_owned(),
        size,
        taken,
        clear_from,
        children: [file].into_iter().chain(backing).collect(),
        parent,
        asked,
        mapping,
        space: FileEnd::new(space::extent(&header, size, start, file_len), space::stride(&header)),
        space_start: start.into(),
        file_len: file_len.into(),
        header,
        head_is_whole: found.head_is_whole.into(),
        tail_is_whole: found.tail_is_whole.into(),
        footer: found.footer,
        is_writable,
        is_prepared: AtomicBool::new(false),
        is_frozen: AtomicBool::new(false),
        has_reported: AtomicBool::new(false),
    }))
}

/// Opens the parent that the options give, or the image names, and looks whether it is the one that is meant.
async fn open_parent(
    opening: &mut Opening,
    given: Option<NodeRefOrNull>,
    header: &Header,
    file: &Child,
) -> Result<(Option<Parent>, Option<Child>), Error> {
    let is_given = given.is_some();
    let name = match parent::name(&file.node(), header).await {
        Err(error) if !is_given => return Err(error),
        name => name.ok(),
    };
    let recorded =
        name.as_ref().map(|filename| RecordedBacking { filename, format: Some(super::ENTRY.name) });
    let backing = opening.backing(given, recorded, file).await?;
    let found = match &backing {
        Some(backing) => parent::id_of(&backing.node()).await?,
        None => None,
    };
    if let Some(found) = found
        && found != header.parent_id
        && !is_given
        && !opening.policy().for_info
    {
        return Err(Error::new(format!(
            "The parent '{}' is another one than when the image was made: it is {found}, and the image wants {}; \
             the option 'backing' takes it all the same",
            name.as_deref().unwrap_or_default().escape_debug(),
            header.parent_id
        )));
    }
    Ok((Some(Parent { name }), backing))
}
