//! A controller's SMART / health and error logs, read by the kernel's driver or by ours.
//!
//! Ours reads them where vfio-pci has the controller and nobody uses it. One that another process drives is not
//! asked.

use super::machine::names;
use super::{Controller, Machine, passthrough};
use std::sync::Arc;
use vublk_vfio::real::Vfio;
use vublk_vfio::spec::{ErrorEntry, Health, log_page};
use vublk_vfio::{Options, PciAddress};

/// Entries of the error log that are asked for: the newest.
const ENTRIES: usize = 16;

/// A controller's logs.
pub struct Report {
    pub health: Health,
    /// Newest first.
    pub errors: Vec<ErrorEntry>,
}

/// Asks a controller that is not in use, or that the kernel's driver has. `None`: nobody that could be
/// asked has it.
///
/// # Errors
/// One line that says why the logs cannot be read.
pub fn ask(
    machine: &Machine,
    controller: &Controller,
    is_used: bool,
) -> Result<Option<Report>, String> {
    let folder = machine.function(controller.address).join("nvme");
    if let Some(name) = names(&folder).first() {
        return by_kernel(machine, name).map(Some);
    }
    if !controller.has_vfio() || is_used {
        return Ok(None);
    }
    by_vfio(&controller.address.to_string()).map(Some).map_err(|error| error.to_string())
}

fn by_kernel(machine: &Machine, name: &str) -> Result<Report, String> {
    let device = machine.path("/dev").join(name);
    let page = |page, len| {
        passthrough::log_page(&device, page, len)
            .map_err(|error| format!("{}: {}", device.display(), crate::io::Errno::from(error)))
    };
    let health = page(log_page::HEALTH, Health::LEN)?;
    let errors = page(log_page::ERRORS, ENTRIES * ErrorEntry::LEN)?;
    Ok(Report { health: Health::parse(&health), errors: ErrorEntry::parse_all(&errors) })
}

fn by_vfio(address: &str) -> Result<Report, vublk_vfio::Error> {
    let address: PciAddress = address.parse()?;
    let function = Arc::new(Vfio::open(address)?);
    let controller = vublk_vfio::Controller::open(function, &Options::default())?;
    let reported = Report { health: controller.health()?, errors: controller.errors()? };
    controller.close();
    Ok(reported)
}
