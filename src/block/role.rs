//! The roles of children, and their consequences.

use super::Perms;
use super::registry::Kind;

/// The part that a child plays for the node above it. A role's name is that of the option that gives the child.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// A format's metadata, and its data if these are not kept apart; what a filter passes requests to.
    File,
    /// What a filter passes requests to, under the name that QEMU has for some filters.
    Image,
    /// The data of a format whose `File` has only metadata.
    DataFile,
    /// A part of the disk in a file of its own; a format may have any number of them. No option gives it.
    Extent,
    /// Another image, which the parent reads where it has no data.
    Backing,
    /// The node of a user that is not a node itself: no option names it.
    Root,
}

impl Role {
    /// All roles that options give.
    pub const GIVEN: [Role; 4] = [Role::File, Role::DataFile, Role::Image, Role::Backing];

    /// As in options and in QMP.
    pub const fn name(self) -> &'static str {
        match self {
            Role::File => "file",
            Role::Image => "image",
            Role::DataFile => "data-file",
            Role::Extent => "extents",
            Role::Backing => "backing",
            Role::Root => "root",
        }
    }

    /// Whether options can give the child; others follow from the image.
    pub fn is_given(self) -> bool {
        Role::GIVEN.contains(&self)
    }

    /// Whether the child is another image, which the parent reads where it has no data and never writes.
    pub const fn is_backing(self) -> bool {
        matches!(self, Role::Backing)
    }

    /// What a parent of this kind asks of the child, when its own users hold and allow `own`.
    pub fn perms(self, parent: Kind, own: Perms) -> Perms {
        match (self, parent) {
            (Role::Backing, _) => Perms::backing(own),
            (_, Kind::Filter) => Perms::filter(own),
            _ => Perms::format(own),
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
