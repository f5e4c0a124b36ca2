//! Options: an ordered tree made from any source, read by drivers through one typed interface.
//!
//! | file | it holds |
//! |---|---|
//! | `tree` | [`Value`] and [`Map`], dotted keys in and out (`crumple`, `flatten`), the limits |
//! | `keyval` | `driver=file,cache.direct=on`: the syntax of `--blockdev`, `--export`, `--object` |
//! | `qemuopts` | `key,nokey,key=value`: the older syntax of `--chardev`, `-o` and `--image-opts` |
//! | `json` | JSON text to tree and back |
//! | `filename` | file names: `json:{…}`, `file:…`, `nbd://…`, plain paths |
//! | `size` | `1.5G` to bytes and back to `1.5 GiB`, and the [`Size`] field type |
//! | `node_ref` | the field types for "a node's name, or a node defined in place" |
//! | `de` | a serde `Deserializer` over the tree: one `#[derive(Deserialize)]` struct per driver |
//! | `identifier` | what a name may be made of |
//! | `objects` | the types of objects that there are |
//! | `bytes` | names that are not UTF-8 |
//! | `any` | a value read through serde as it stands |
//! | `error` | the one error type, worded as QEMU words it |
//!
//! The rule held here: user input is checked at this edge and trusted afterwards. Every parser is
//! linear in its input, bounded in depth and count, and never panics. What came as text (keyval,
//! file names) converts; what came as JSON keeps its type.

mod any;
pub mod bytes;
pub mod de;
pub mod error;
pub mod filename;
mod identifier;
pub mod json;
pub mod keyval;
pub mod node_ref;
mod objects;
pub mod qemuopts;
pub mod similar;
pub mod size;
pub mod tree;

pub use de::{from_map, from_value, split_map};
pub use error::{Error, SIZE_HINT};
pub use identifier::is_identifier;
pub use node_ref::{NodeRef, NodeRefOrNull};
pub use objects::OBJECT_TYPES;
pub use size::Size;
pub use tree::{Map, Value};

#[cfg(test)]
mod random_tests;
