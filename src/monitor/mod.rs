//! QMP: the monitors through which clients query and change a running daemon.
//!
//! | file | it holds |
//! |---|---|
//! | `chardev` | `--chardev`, `--monitor`: the sockets |
//! | `control` | the loop that serves them |
//! | `session` | one client: negotiation, requests, replies, events |
//! | `framing` | where one JSON value ends and the next begins |
//! | `commands` | what each command does |
//! | `slow` | those that wait for storage or guests |
//! | `reply` | what a command comes to |
//! | `kept_out` | errors that the sandbox causes |
//! | `nodes`, `events` | what is told of nodes, asked for or not |
//! | `jobs` | those for jobs |
//! | `snapshots` | those for internal snapshots |
//! | `bitmaps` | those that change bitmaps, which do, too |
//!
//! The rule held here: one thread, which no guest's requests go through, serves all monitors; what a
//! client can make it keep is bounded, and a client that does not read holds up nobody else.

mod bitmaps;
mod chardev;
mod commands;
mod control;
mod events;
mod framing;
mod jobs;
mod kept_out;
mod nbd;
mod nodes;
mod overlays;
mod poll;
mod reply;
mod session;
mod slow;
mod snapshots;
mod transaction;

pub use chardev::Chardev;
pub use control::Control;
pub use framing::Framing;
