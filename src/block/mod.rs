//! The block layer: the contract between users of disks and drivers.
//!
//! Users are exports, tools and jobs; drivers are formats, filters and protocols.
//!
//! * [`node`]: the users' handle on a disk. Checks, aligns, splits and orders requests.
//! * [`driver`], [`image`], [`snapshot`]: the interfaces of formats and protocols, and the guarantees they get.
//! * [`child`], [`role`], [`perm`]: the edges of the graph, and the permissions of each user.
//! * [`pass_through`]: the defaults of filters.
//! * [`bitmap`]: records of written ranges.
//! * [`extents`]: block status through a whole backing chain.
//! * [`compress`]: compressed writes.
//! * [`overlap`]: the order of overlapping writes. `members`: users that may have fast requests in flight.
//! * `current_traits`: the current limits on requests, which depend on the nodes below.
//! * [`graph`]: the nodes by name, their users, and changes to both.
//! * [`registry`], [`open`], [`create`]: the list of drivers, and how they open nodes and create images.
//! * [`features`]: the features of a driver's images.
//! * [`name`]: file names that open the same disk again; [`named`]: options combined with a file name.
//! * [`temporary`]: disks that discard their changes on close.
//! * [`policy`], [`probe`]: the limits on what may be opened, and format detection by a file's first bytes.
//! * [`length`]: storage whose length changes by itself.
//! * [`flush_record`]: the file beside an image that records a failed flush.
//! * [`drive`]: the health of drives.
//! * [`working_memory`]: bounds on the memory that a request may use.
//! * [`memory`]: guest memory that devices access directly.
//! * [`event`]: events for debugging filters.
//! * [`notice`]: events for observers of the graph; [`threshold`]: writes beyond an offset.
//! * [`error`]: errors of one line.
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
    Locks, Mapping, Place, Precision, ReadMapping, Scratch, Status, Survivor, Target, Traits,
    WriteFlags, ZeroFlags,
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
