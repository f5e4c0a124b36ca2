//! The block layer: the contract between those who use disks (exports, tools, jobs) and those who
//! implement them (formats, filters, protocols).
//!
//! * [`node`]: what users hold. Checks, aligns, splits, orders.
//! * [`driver`], [`image`], [`snapshot`]: what formats and protocols implement, and what they can rely on.
//! * [`child`], [`role`], [`perm`]: the edges of the graph, and what each user may do.
//! * [`pass_through`]: what filters do not change.
//! * [`bitmap`]: which parts of a node were written.
//! * [`extents`]: what is stored where, through a whole backing chain.
//! * [`compress`]: storing data compressed.
//! * [`overlap`]: which writes wait for which. `members`: whose fast requests there may be.
//! * `current_traits`: what requests should look like, which follows what a node stands on.
//! * [`graph`]: the nodes by name, who uses them, and how that changes.
//! * [`registry`], [`open`], [`create`]: what drivers there are, and how nodes and images are made.
//! * [`features`]: what the images of a driver can do.
//! * [`name`]: what opens the same disk again; [`named`]: options that meet a file name.
//! * [`temporary`]: disks whose changes are thrown away.
//! * [`policy`], [`probe`]: what may be opened, and what a file's first bytes say it is.
//! * [`length`]: storage whose length changes by itself.
//! * [`flush_record`]: what lies beside an image whose flush has failed.
//! * [`drive`]: the health of drives.
//! * [`working_memory`]: how much memory of ours a request may take.
//! * [`memory`]: guest memory that devices reach themselves.
//! * [`event`]: what is about to happen, for debugging filters.
//! * [`notice`]: what befalls nodes, for whoever watches the graph; [`threshold`]: writes beyond an offset.
//! * [`error`]: one line for whoever opened the disk.
//!
//! Nothing here names a format, a protocol or a transport.

pub mod below;
pub mod bitmap;
pub mod child;
pub mod compress;
pub mod create;
mod current_traits;
mod depth;
pub mod drive;
pub mod driver;
pub mod error;
pub mod event;
pub mod extents;
pub mod features;
pub mod flush_record;
pub mod graph;
pub mod idle;
pub mod image;
pub mod length;
mod members;
pub mod memory;
pub mod name;
pub mod named;
pub mod new_file;
pub mod node;
pub mod notice;
pub mod open;
pub mod overlap;
pub mod pass_through;
pub mod perm;
pub mod policy;
pub mod probe;
pub mod registry;
pub mod role;
pub mod signal;
pub mod snapshot;
pub mod temporary;
pub mod threshold;
pub mod working_memory;

pub use bitmap::{Bitmap, BitmapInfo, BitmapStore, Bitmaps, NewBitmap};
pub use child::Child;
pub use compress::{Compress, Packed, Packer};
pub use create::{CreateEntry, CreateOption, Creation, Measurement, ValueType, create_options};
pub use drive::{Drive, DriveHealth};
pub use driver::{
    Abilities, Access, Decider, Driver, Extent, Fence, HandOver, Journaled, Leaf, LocalFuture,
    Locks, Mapping, Place, Precision, Scratch, Status, Survivor, Target, Traits, Way, WriteFlags,
    ZeroFlags,
};
pub use error::{Error, LockedFile};
pub use event::{Debugger, Event};
pub use features::{Features, Growth};
pub use graph::{Activity, Attachment, Drained, Graph, NodeInfo, User};
pub use idle::{Idle, IdleClock};
pub use image::{
    CheckReport, Fix, Image, ImageInfo, Listed, Preallocation, allocated_in, resizable,
};
pub use length::OwnLength;
pub use memory::{Admission, DeviceMemory, GuestRegion};
pub use named::NameParts;
pub use node::{DetectZeroes, Discards, Node, NodeOptions, SECTOR};
pub use notice::{Corrupted, Notice, Notices};
pub use open::{Opening, RecordedBacking};
pub use pass_through::PassThrough;
pub use perm::{Perm, Perms};
pub use policy::{FollowBacking, OpenPolicy, Whitelist};
pub use registry::{DriverEntry, Kind, Naming, OptionHelp, Probe, Registry};
pub use role::Role;
pub use signal::Signal;
pub use snapshot::{NewSnapshot, SnapshotInfo, SnapshotKey, Snapshots};
pub use temporary::TemporaryImage;
pub use threshold::ThresholdExceeded;
