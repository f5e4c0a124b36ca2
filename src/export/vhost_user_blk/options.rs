//! The options that only this type of export has.

use super::Server;
use super::device::DeviceOptions;
use crate::block::Error;
use crate::export::Reading;
use crate::export::core::{Address, Export, Parts, Transport};
use crate::options::{self, Map};
use serde::Deserialize;
use std::path::Path;

/// Queues at most that an export may have: messages that bring a queue's descriptors name it by 8 bits, so
/// that the descriptors of queue 256 would become those of queue 0.
pub const MAX_QUEUES: u16 = 256;

/// The serial number of disks that are given none.
const SERIAL: &str = "vhost_user_blk";

/// What one export of this type is made with.
pub struct Options {
    pub address: Address,
    /// Bytes in the guest's smallest addressable block.
    pub logical_block_size: u64,
    pub device: DeviceOptions,
}

/// The options of `--export type=vhost-user-blk,…` that other types do not share.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Given {
    addr: options::Value,
    num_queues: Option<u16>,
    logical_block_size: Option<options::Size>,
}

/// Reads the options of one export.
pub(super) fn parse(map: Map, reading: &Reading<'_>) -> Result<Box<dyn Transport>, Error> {
    let common = reading.common.iter().copied();
    let given = options::from_map(map).map_err(|e| e.meant(common))?;
    let Given { addr, num_queues, logical_block_size } = given;
    let address = Address::read(addr)?;
    let logical_block_size = match logical_block_size {
        // Zero is how scripts say that they have no wish.
        None | Some(options::Size(0)) => 512,
        Some(size) => size.0,
    };
    let device = DeviceOptions { num_queues: num_queues.unwrap_or(1), serial: SERIAL.into() };
    Ok(Box::new(Options { address, logical_block_size, device }))
}

impl Transport for Options {
    fn check(&self, name: &str) -> Result<(), Error> {
        check_block_size(name, self.logical_block_size)?;
        match self.device.num_queues {
            0 => Err(Error::new("num-queues must be greater than 0")),
            1..=MAX_QUEUES => Ok(()),
            _ => Err(Error::new(format!("num-queues must be at most {MAX_QUEUES}"))),
        }
    }

    fn queues(&self) -> u16 {
        self.device.num_queues
    }

    fn socket(&self) -> Option<&Path> {
        match &self.address {
            Address::Path { path, .. } => Some(path),
            _ => None,
        }
    }

    fn create(self: Box<Self>, parts: Parts) -> Result<Box<dyn Export>, Error> {
        Ok(Box::new(Server::new(parts, *self)?))
    }
}

/// A block size that the guest can use: a power of two from 512 bytes to 2 MiB.
pub fn check_block_size(id: &str, size: u64) -> Result<u32, Error> {
    let property = format!("Property {id}.logical-block-size doesn't take value");
    if !(512..=2 << 20).contains(&size) {
        return Err(Error::new(format!("{property} {size} (minimum: 512, maximum: 2097152)")));
    }
    if !size.is_power_of_two() {
        return Err(Error::new(format!("{property} '{size}', it's not a power of 2")));
    }
    Ok(size as u32)
}
