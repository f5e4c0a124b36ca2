//! Giving controllers to vfio-pci, and back to the kernel.
//!
//! The rule: nothing is changed before everything has been looked at, and what fails half-way is
//! undone. `driver_override` says which driver alone may have a function; it is set before the old
//! driver lets go, so that no other one gets in between, and outlives the driver's module.

use super::machine::link_name;
use super::{Address, Controller, Machine, Obstacle, Use, VFIO_PCI, obstacles, uses};
use std::fs;

/// Gives controllers to vfio-pci, all of them or none. Those that it has already are left alone.
///
/// Refused for a controller that is in use, or that could not be used by a process afterwards.
pub fn bind(machine: &Machine, addresses: &[Address]) -> Result<Vec<Controller>, String> {
    for &address in addresses {
        let controller = Controller::at(machine, address)?;
        if !controller.has_vfio() {
            refuse_if_used(machine, &controller)?;
        }
        // Who may open it afterwards is not this command's business.
        let mut reasons = obstacles(machine, &controller, addresses).into_iter();
        let reason = reasons.find(|reason| !matches!(reason, Obstacle::Permission { .. }));
        if let Some(reason) = reason {
            return Err(format!("{address}: {reason}"));
        }
    }
    let mut done = Vec::new();
    for &address in addresses {
        match bind_one(machine, address) {
            Ok(true) => done.push(address),
            Ok(false) => {}
            Err(error) => {
                for address in done {
                    give_back(machine, address)?;
                }
                return Err(format!("{address}: {error}"));
            }
        }
    }
    addresses.iter().map(|&address| Controller::at(machine, address)).collect()
}

/// Gives a controller back to the kernel's driver. Refused while a process has it.
pub fn unbind(machine: &Machine, address: Address) -> Result<Controller, String> {
    let controller = Controller::at(machine, address)?;
    let overridden = controller.driver_override.as_deref() == Some(VFIO_PCI);
    if !controller.has_vfio() && !overridden {
        let driver = controller.driver.as_deref().unwrap_or("none");
        return Err(format!("{address}: vfio-pci does not have it (driver {driver})"));
    }
    refuse_if_used(machine, &controller)?;
    if controller.has_vfio() {
        refuse_if_taken(machine, &controller)?;
    }
    give_back(machine, address).map_err(|error| format!("{address}: {error}"))?;
    Controller::at(machine, address)
}

fn refuse_if_used(machine: &Machine, controller: &Controller) -> Result<(), String> {
    let uses: Vec<_> = uses(machine, controller).iter().map(Use::to_string).collect();
    if uses.is_empty() {
        return Ok(());
    }
    Err(format!("{}: in use: {}", controller.address, uses.join("; ")))
}

/// Asks the kernel whether a process has the controller's group, also one that is not to be seen from
/// here. vfio-pci would let the controller go only when that process does.
fn refuse_if_taken(machine: &Machine, controller: &Controller) -> Result<(), String> {
    let Some(node) = controller.node() else { return Ok(()) };
    let opened =
        fs::OpenOptions::new().read(true).write(true).open(machine.path("/dev").join(&node));
    match opened {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(format!(
            "{}: in use: a process that is not to be seen from here has /dev/{node} open",
            controller.address
        )),
        _ => Ok(()),
    }
}

/// Whether vfio-pci had to be given the controller; if that fails, all is as it was.
fn bind_one(machine: &Machine, address: Address) -> Result<bool, String> {
    let before = Controller::at(machine, address)?;
    let folder = machine.function(address);
    if before.has_vfio() && before.driver_override.as_deref() == Some(VFIO_PCI) {
        return Ok(false);
    }
    machine.write(&folder.join("driver_override"), VFIO_PCI)?;
    if before.has_vfio() {
        return Ok(false);
    }
    let moved = let_go(machine, address).and_then(|()| probe(machine, address));
    let after = Controller::at(machine, address)?;
    if after.has_vfio() {
        return Ok(true);
    }
    let reason = moved.err().unwrap_or_else(|| "vfio-pci did not take it: see dmesg".to_owned());
    match give_back(machine, address) {
        Ok(()) => Err(reason),
        Err(error) => Err(format!("{reason}; and it could not be given back: {error}")),
    }
}

/// Lets the kernel choose the driver again.
fn give_back(machine: &Machine, address: Address) -> Result<(), String> {
    let folder = machine.function(address);
    // An empty line clears it.
    machine.write(&folder.join("driver_override"), "\n")?;
    let of_vfio = link_name(&folder.join("driver"));
    if of_vfio.as_deref() == Some(VFIO_PCI) {
        let_go(machine, address)?;
    }
    if !folder.join("driver").exists() {
        probe(machine, address)?;
    }
    Ok(())
}

/// Takes a function from the driver that has it, if one has.
fn let_go(machine: &Machine, address: Address) -> Result<(), String> {
    let driver = machine.function(address).join("driver");
    match driver.exists() {
        true => machine.write(&driver.join("unbind"), &address.to_string()),
        false => Ok(()),
    }
}

/// Lets the kernel look for a driver.
fn probe(machine: &Machine, address: Address) -> Result<(), String> {
    machine.write(&machine.path("/sys/bus/pci/drivers_probe"), &address.to_string())
}
