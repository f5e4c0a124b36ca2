//! A userspace driver for NVMe controllers on PCI, which uses the storage's own queues without the kernel.
//!
//! The kernel's part is VFIO: it gives the registers, lets the device reach the memory that it is given and no other,
//! and turns interrupts into eventfds. Everything above that is here, and knows nothing of its users.
//!
//! ```text
//! QueuePair  one per thread: submit, ring, reap; no lock, no system call, no allocation
//!     │
//! Controller one per device: starts it, identifies, watches over it, resets it, shuts it down
//!     │
//! PciFunction: registers, DMA mapping, interrupts, reset
//!     ├── real::Vfio    a device bound to vfio-pci
//!     └── fake::Fake    a controller in memory, for tests, fuzzers and benchmarks
//! ```
//!
//! * [`function`]: the seam, and its two implementations [`real`] and [`fake`].
//! * [`mmio`], [`dma`]: registers, and memory that the device reads and writes; with `real` the only
//!   places with unsafe code. [`space`], [`iova`]: what it reaches, and at which addresses.
//! * [`spec`]: what the registers, commands and data structures look like.
//! * `queue`, [`prp`], [`sgl`]: submission and completion queues; how a command says where its data is.
//! * [`controller`], [`queue_pair`], [`namespace`]: the driver.
//! * [`error`]: errors of the control plane; on the data path it is a [`spec::Status`].
//!
//! # Opening a disk
//!
//! ```no_run
//! use std::sync::Arc;
//! use vublk_vfio::{Controller, Options, PciAddress, real::Vfio};
//!
//! let address: PciAddress = "0000:01:00.0".parse()?;
//! let controller = Controller::open(Arc::new(Vfio::open(address)?), &Options::default())?;
//! let namespace = controller.namespace(1)?;
//! println!("{} bytes in blocks of {}", namespace.len(), namespace.block_size());
//! let pair = controller.queue_pair()?;
//! # Ok::<(), vublk_vfio::Error>(())
//! ```
//!
//! # What may still be written
//!
//! A command that was given to the controller owns its identifier, its list pages and the memory that it names until
//! it has completed, or its submission queue has been deleted, or the controller has shown CSTS.RDY = 0, or bus
//! mastering is off and the function was reset, or the memory was unmapped from the IOMMU. Nothing of it is used
//! again before, and its end is not reported: an abort, a time-out or a reset that was only asked for end nothing.
//!
//! Sections named in the texts are those of the NVM Express Base Specification 2.0, the NVM Command Set
//! Specification 1.0 ("NVM") and the NVMe over PCIe Transport Specification 1.0 ("PCIe").

pub mod controller;
pub mod dma;
pub mod error;
pub mod fake;
pub mod function;
pub mod iova;
pub mod mmio;
pub mod namespace;
pub mod prp;
mod queue;
pub mod queue_pair;
pub mod real;
pub mod sgl;
pub mod space;
pub mod spec;

pub use controller::{Controller, Options, Watch};
pub use dma::{HostRange, Segments};
pub use error::Error;
pub use function::{PciAddress, PciFunction};
pub use namespace::Namespace;
pub use queue_pair::{Done, PairWaker, QueuePair, Request};
pub use space::{Registration, Space};
