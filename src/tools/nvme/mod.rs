//! This machine's NVMe controllers: their current users, and binding to vfio-pci and back.
//!
//! * [`address`]: where a function sits on the PCI bus.
//! * [`machine`]: the kernel's files, below a root that may be another one for tests.
//! * [`controller`]: what a controller is: its driver, IOMMU group and namespaces.
//! * [`usage`]: its users. A controller in use is never taken from its driver.
//! * [`obstacles`]: what else keeps it from being used, and what to do about that; [`limits`]: how much of
//!   it one process gets.
//! * [`health`]: its health, by the kernel's driver ([`passthrough`]) or by ours.
//! * [`mod@bind`]: to vfio-pci and back.

pub mod address;
pub mod bind;
pub mod controller;
pub mod health;
pub mod limits;
pub mod machine;
pub mod obstacles;
pub mod passthrough;
#[cfg(test)]
mod tests;
pub mod usage;

pub use address::Address;
pub use bind::{bind, unbind};
pub use controller::{Controller, Function, Group, Namespace, VFIO_PCI};
pub use machine::Machine;
pub use obstacles::{Obstacle, obstacles};
pub use usage::{Use, uses};
