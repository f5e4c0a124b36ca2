//! Options, names, and the entry of `nvme` in the list of drivers.

use super::Nvme;
use super::shared::Claim;
use crate::block::create::{
    CreateEntry, CreateOption, Creation, Made, ValueType, refuse_preallocation,
};
use crate::block::{
    Driver, DriverEntry, Error, Growth, Kind, NameParts, Naming, NodeOptions, Opening, OptionHelp,
    Preallocation, WriteFlags,
};
use crate::io::{AlignedBuf, Errno};
use crate::options::{Map, Size};
use serde::Deserialize;
use std::time::Duration;
use vublk_vfio::PciAddress;

pub static ENTRY: DriverEntry = DriverEntry {
    // A controller has one driver.
    reopens: false,
    options: &[
        OptionHelp { name: "device", value: "str", help: "PCI address, as in 0000:01:00.0" },
        OptionHelp { name: "filename", value: "str", help: "nvme://DEVICE[/NAMESPACE]" },
        OptionHelp {
            name: "guest-dma",
            value: "on|off",
            help: "the device reads and writes guests' memory itself (on)",
        },
        OptionHelp {
            name: "io-timeout",
            value: "int",
            help: "seconds until a request is aborted; twice that, and the controller is reset (30)",
        },
        OptionHelp { name: "namespace", value: "int", help: "which of its disks, from 1 on (1)" },
    ],
    prefixes: &["nvme"],
    create: Some(&CreateEntry {
        options: &[
            CreateOption::preallocation(MODES),
            CreateOption::new("size", ValueType::Size, "Virtual disk size"),
        ],
        create: |creation, map| Box::pin(create(creation, map)),
        amend: &[],
        on_nodes: None,
        measure: None,
    }),
    naming: Naming::Own(read_name),
    growth: Growth::Own(MODES),
    ..DriverEntry::new("nvme", Kind::Protocol, |opening, map| Box::pin(open(opening, map)))
};

/// A namespace has all its space.
const MODES: &[Preallocation] = &[Preallocation::Off];

/// A name is kept as it is.
fn read_name(name: &str) -> Result<NameParts, Error> {
    NvmeOptions::from_filename(name)?;
    Ok(NameParts { options: Map::from_iter([("filename", name)]), below: None })
}

/// The driver's own options, as they are written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Written {
    device: Option<String>,
    namespace: Option<u32>,
    filename: Option<String>,
    #[serde(default = "yes")]
    guest_dma: bool,
    io_timeout: Option<u32>,
}

/// Seconds: time-outs of requests are shorter than this.
const LONGEST: u32 = 3600;

fn yes() -> bool {
    true
}

/// The driver's own options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NvmeOptions {
    pub device: PciAddress,
    /// From 1 on.
    pub namespace: u32,
    /// The device reaches guests' memory itself.
    pub guest_dma: bool,
    /// After which a request is aborted; `None`: what others on the controller have, or the default.
    pub io_timeout: Option<Duration>,
}

impl NvmeOptions {
    /// The name that stands for the device and the namespace.
    pub fn filename(&self) -> String {
        format!("nvme://{}/{}", self.device, self.namespace)
    }

    /// Reads `nvme://DEVICE[/NAMESPACE]`.
    pub fn from_filename(name: &str) -> Result<NvmeOptions, Error> {
        let wanted = || Error::new(format!("'{name}' is not a name like nvme://0000:01:00.0/1"));
        let place = name.strip_prefix("nvme://").ok_or_else(wanted)?;
        let (device, namespace) = place.split_once('/').unwrap_or((place, "1"));
        let all_digits = !namespace.is_empty() && namespace.bytes().all(|b| b.is_ascii_digit());
        let namespace = namespace.parse().ok().filter(|_| all_digits).ok_or_else(wanted)?;
        let device = device.parse().map_err(from_driver)?;
        Ok(NvmeOptions { device, namespace, guest_dma: true, io_timeout: None })
    }

    fn read(written: Written) -> Result<NvmeOptions, Error> {
        let Written { device, namespace, filename, guest_dma, io_timeout } = written;
        let options = match (device, filename) {
            (Some(_), Some(_)) => {
                return Err(Error::new("'device' and 'filename' cannot be given together"));
            }
            (None, Some(name)) if namespace.is_none() => NvmeOptions::from_filename(&name)?,
            (None, Some(_)) => {
                return Err(Error::new("'namespace' is part of the 'filename'"));
            }
            (Some(device), None) => NvmeOptions {
                device: device.parse().map_err(from_driver)?,
                namespace: namespace.unwrap_or(1),
                guest_dma: true,
                io_timeout: None,
            },
            (None, None) => return Err(Error::new("Parameter 'device' is missing")),
        };
        let io_timeout = match io_timeout {
            Some(0 | LONGEST..) => {
                let text = format!("'io-timeout' is from 1 to {} seconds", LONGEST - 1);
                return Err(Error::new(text));
            }
            other => other.map(|seconds| Duration::from_secs(seconds.into())),
        };
        Ok(NvmeOptions { guest_dma, io_timeout, ..options })
    }
}

/// The driver's errors as the block layer's.
pub fn from_driver(error: vublk_vfio::Error) -> Error {
    Error::new(error.to_string()).with_errno(Errno(error.errno()))
}

async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let options = NvmeOptions::read(opening.parse(map)?)?;
    let (node, auto_read_only) = (opening.options(), opening.auto_read_only());
    let driver = open_namespace(&options, &node).await?;
    let protected = driver.namespace.identity().is_protected;
    if protected && !node.read_only && !auto_read_only {
        let text =
            format!("{}: namespace {} is write protected", options.device, options.namespace);
        return Err(Error::new(text).with_errno(Errno::EROFS));
    }
    Ok(Box::new(driver))
}

async fn open_namespace(options: &NvmeOptions, node: &NodeOptions) -> Result<Nvme, Error> {
    let claim = Claim::take(options).await?;
    let (controller, id) = (claim.shared().controller()?, options.namespace);
    let namespace = crate::io::offload(move || controller.namespace(id)).await;
    match namespace {
        Ok(namespace) => Nvme::new(claim, namespace, options, node),
        Err(error) => {
            let _ = claim.give_up().await;
            Err(from_driver(error))
        }
    }
}

/// Makes a namespace ready to hold a new disk of at most its own size.
async fn create(_: &Creation, mut map: Map) -> Result<Made, Error> {
    refuse_preallocation(&map)?;
    let filename = map.take_required_str("filename")?;
    let size = map.take_as::<Size>("size")?.map_or(0, |size| size.0);
    let options = NvmeOptions::from_filename(&filename)?;
    let driver = open_namespace(&options, &NodeOptions::default()).await?;
    let result = clear(&driver, size).await;
    let closed = driver.close().await.map_err(|e| Error::os(format!("Closing '{filename}'"), e));
    result.and(closed)?;
    // Only its first block was written.
    Ok(Made { reads_zeroes: false })
}

async fn clear(driver: &Nvme, size: u64) -> Result<(), Error> {
    if size > driver.len() {
        return Err(Error::new("Cannot grow device files"));
    }
    let failed = |errno: Errno| Error::os("Failed to clear the new image's first sector", errno);
    // What was there before must not be taken for an image of some format.
    let block = driver.namespace.block_size() as usize;
    let mut zeroes = AlignedBuf::new(block, block).ok_or(Errno::ENOMEM).map_err(failed)?;
    driver.write(0, &zeroes.io_vec(), WriteFlags::empty()).await.map_err(failed)?;
    driver.flush().await.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::{from_map, keyval};

    fn read(text: &str) -> Result<NvmeOptions, String> {
        let map = keyval::parse(text, None).unwrap().options;
        let written = from_map(map).map_err(|error| error.to_string())?;
        NvmeOptions::read(written).map_err(|error| error.to_string())
    }

    #[test]
    fn a_device_and_a_namespace_are_named_by_options_or_by_one_name() {
        let options = read("device=0000:01:00.0,namespace=3,guest-dma=off,io-timeout=5").unwrap();
        assert_eq!(options.io_timeout, Some(Duration::from_secs(5)));
        assert_eq!(
            (options.filename().as_str(), options.guest_dma),
            ("nvme://0000:01:00.0/3", false)
        );
        for (text, name) in [
            ("device=01:00.0", "nvme://0000:01:00.0/1"),
            ("filename=nvme://0000:01:00.0/2", "nvme://0000:01:00.0/2"),
            ("filename=nvme://0000:01:00.0", "nvme://0000:01:00.0/1"),
        ] {
            let options = read(text).unwrap();
            assert_eq!(options.filename(), name);
            assert!(options.guest_dma);
            assert_eq!(NvmeOptions::from_filename(name).unwrap(), options);
        }
    }

    #[test]
    fn names_that_mean_nothing_are_refused_in_a_line() {
        for text in [
            "",
            "device=x",
            "device=01:00.0,namespace=-1",
            "device=01:00.0,io-timeout=0",
            "device=01:00.0,io-timeout=3600",
            "device=01:00.0,filename=nvme://01:00.0/1",
            "filename=nvme://01:00.0/1,namespace=1",
            "filename=nvme:01:00.0/1",
            "filename=nvme://01:00.0/",
            "filename=nvme://01:00.0/1/2",
            "filename=nvme://01:00.0/+1",
            "filename=nvme://01:00.0/4294967296",
        ] {
            let error = read(text).unwrap_err();
            assert!(!error.contains('\n'), "{text}: {error}");
        }
    }
}
