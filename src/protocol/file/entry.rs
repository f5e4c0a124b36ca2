//! The entries of `file` and `host_device` in the list of drivers.

use super::create::{self, CreateOptions};
use super::{FileDriver, FileOptions, Flavour};
use crate::block::create::{
    CreateEntry, CreateOption, Creation, Made, MakeFn, ValueType, refuse_preallocation,
};
use crate::block::registry::OptionHelp;
use crate::block::{
    Driver, DriverEntry, Error, Growth, Kind, LocalFuture, Naming, Opening, Preallocation,
};
use crate::io;
use crate::options::{self, Map, Size};
use serde::Deserialize;
use std::os::unix::fs::FileTypeExt;

pub static FILE: DriverEntry = DriverEntry {
    options: OPTIONS,
    prefixes: &["file"],
    naming: Naming::Path,
    counts_discards: true,
    create: Some(&CreateEntry {
        options: &[
            CreateOption::new(
                "nocow",
                ValueType::Bool,
                "Turn off copy-on-write (valid only on btrfs)",
            ),
            CreateOption::preallocation(MODES),
            CreateOption::new(
                "extent_size_hint",
                ValueType::Size,
                "Extent size hint for the image file, 0 to disable",
            ),
            SIZE,
        ],
        create: |creation, map| create_with(create::create_file, creation, map),
        measure: None,
        amend: &[],
        on_nodes: Some(|_, map| create_by_qmp(map)),
    }),
    growth: Growth::Own(MODES),
    ..DriverEntry::new("file", Kind::Protocol, |opening, map| {
        Box::pin(open(Flavour::File, opening, map))
    })
};

pub static HOST_DEVICE: DriverEntry = DriverEntry {
    options: OPTIONS,
    prefixes: &["host_device"],
    create: Some(&CreateEntry {
        options: &[CreateOption::preallocation(NO_MODES), SIZE],
        create: |creation, map| {
            Box::pin(async move {
                refuse_preallocation(&map)?;
                create_with(create::create_device, creation, map).await
            })
        },
        measure: None,
        amend: &[],
        on_nodes: None,
    }),
    naming: Naming::Device(is_device),
    counts_discards: true,
    growth: Growth::Own(NO_MODES),
    ..DriverEntry::new("host_device", Kind::Protocol, |opening, map| {
        Box::pin(open(Flavour::HostDevice, opening, map))
    })
};

/// How the space of a file is allocated, and that of a device, which has all of it.
const MODES: &[Preallocation] = &[Preallocation::Off, Preallocation::Falloc, Preallocation::Full];
const NO_MODES: &[Preallocation] = &[Preallocation::Off];

const SIZE: CreateOption = CreateOption::new("size", ValueType::Size, "Virtual disk size");

const OPTIONS: &[OptionHelp] = &[
    OptionHelp { name: "aio", value: "threads|native|io_uring", help: "all mean io_uring here" },
    OptionHelp { name: "aio-max-batch", value: "int", help: "taken without effect" },
    OptionHelp {
        name: "drop-cache",
        value: "on|off",
        help: "drop the page cache when the image comes from another host",
    },
    OptionHelp { name: "filename", value: "str", help: "the file or device" },
    OptionHelp {
        name: "locking",
        value: "on|off|auto",
        help: "lock the image against other processes",
    },
];

/// Whether a name is that of a block or character device.
fn is_device(name: &str) -> bool {
    std::fs::metadata(options::bytes::path_of(name)).is_ok_and(|found| {
        found.file_type().is_block_device() || found.file_type().is_char_device()
    })
}

async fn open(flavour: Flavour, opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let options: FileOptions = opening.parse(map)?;
    let (node, auto_read_only) = (opening.options(), opening.auto_read_only());
    let driver =
        io::offload(move || FileDriver::open(flavour, &options, &node, auto_read_only)).await?;
    Ok(Box::new(FileDriver { blocking: opening.blocking(), ..driver }))
}

type Create = fn(&str, &CreateOptions) -> Result<Made, Error>;

fn create_with(
    create: Create,
    _creation: &Creation,
    mut map: Map,
) -> LocalFuture<'_, Result<Made, Error>> {
    Box::pin(async move {
        let filename = map.take_required_str("filename")?;
        if let Some(mode) = map.get("preallocation").and_then(|mode| mode.as_str())
            && Preallocation::parse(mode).is_none()
        {
            return Err(Error::new(format!("invalid parameter value: {mode}")));
        }
        let options: CreateOptions = options::from_map(map)?;
        io::offload(move || create(&filename, &options)).await
    })
}

fn create_by_qmp(map: Map) -> Result<MakeFn, options::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    struct Options {
        filename: String,
        size: Size,
        #[serde(default)]
        preallocation: Preallocation,
        #[serde(default)]
        nocow: bool,
        extent_size_hint: Option<Size>,
    }
    let Options { filename, size, preallocation, nocow, extent_size_hint } =
        options::from_map(map)?;
    let options = CreateOptions { size, preallocation, nocow, extent_size_hint };
    Ok(Box::new(move |_| Box::pin(io::offload(move || create::create_file(&filename, &options)))))
}
