//! The driver against the fake controller.

mod bench;
mod controller;
mod fixture;
mod io;
mod recovery;
mod rogue;
