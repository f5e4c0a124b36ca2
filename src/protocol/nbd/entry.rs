//! The entry of `nbd` in the list of drivers, and how an image is made on an export.

use super::connect::Target;
use super::options::{NbdOptions, Written};
use super::{Nbd, name};
use crate::block::create::{
    CreateEntry, CreateOption, Creation, Made, ValueType, refuse_preallocation,
};
use crate::block::{
    Driver, DriverEntry, Error, Growth, Kind, NameParts, Naming, NodeOptions, Opening, OptionHelp,
    Preallocation, WriteFlags,
};
use crate::io::{AlignedBuf, Errno};
use crate::nbd::ExportFlags;
use crate::options::{self, Map, Size};

pub static ENTRY: DriverEntry = DriverEntry {
    // A server may have one client only.
    reopens: false,
    options: &[
        OptionHelp {
            name: "connections",
            value: "int",
            help: "most connections, where the server allows several (16)",
        },
        OptionHelp { name: "export", value: "str", help: "the export's name (the default one)" },
        OptionHelp { name: "filename", value: "str", help: "nbd://HOST/EXPORT or the like" },
        OptionHelp { name: "host", value: "str", help: "as server.host" },
        OptionHelp {
            name: "io-timeout",
            value: "int",
            help: "seconds after which a silent server is given up (60)",
        },
        OptionHelp {
            name: "open-timeout",
            value: "int",
            help: "seconds during which opening tries to connect (0: once)",
        },
        OptionHelp { name: "path", value: "str", help: "as server.path" },
        OptionHelp { name: "port", value: "str", help: "as server.port (10809)" },
        OptionHelp {
            name: "reconnect-delay",
            value: "int",
            help: "seconds during which requests wait for a lost connection (0)",
        },
        OptionHelp { name: "server.cid", value: "str", help: "for vsock: the machine" },
        OptionHelp { name: "server.host", value: "str", help: "for inet: the host" },
        OptionHelp { name: "server.path", value: "str", help: "for unix: the socket" },
        OptionHelp { name: "server.port", value: "str", help: "for inet and vsock: the port" },
        OptionHelp {
            name: "server.str",
            value: "str",
            help: "for fd: a connected socket's number",
        },
        OptionHelp {
            name: "server.type",
            value: "inet|unix|vsock|fd",
            help: "where the server is",
        },
        OptionHelp { name: "tls-creds", value: "str", help: "not supported yet" },
        OptionHelp {
            name: "x-dirty-bitmap",
            value: "str",
            help: "block status tells of this context: qemu:dirty-bitmap:NAME",
        },
    ],
    prefixes: name::PREFIXES,
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
    ..DriverEntry::new("nbd", Kind::Protocol, |opening, map| Box::pin(open(opening, map)))
};

/// An export has the space that it has.
pub const MODES: &[Preallocation] = &[Preallocation::Off];

fn read_name(name: &str) -> Result<NameParts, Error> {
    Ok(NameParts { options: name::read(name)?, below: None })
}

async fn open(opening: &mut Opening, map: Map) -> Result<Box<dyn Driver>, Error> {
    let written: Written = opening.parse(map)?;
    let (node, auto_read_only) = (opening.options(), opening.auto_read_only());
    let driver = connect(NbdOptions::read(written)?, &node).await?;
    if driver.flags().contains(ExportFlags::READ_ONLY) && !node.read_only && !auto_read_only {
        driver.close().await.ok();
        return Err(Error::new("NBD export is read-only").with_errno(Errno(libc::EACCES)));
    }
    Ok(Box::new(driver))
}

async fn connect(options: NbdOptions, node: &NodeOptions) -> Result<Nbd, Error> {
    let (target, connection) = Target::open(options).await?;
    Ok(Nbd::new(target, connection, node))
}

/// Makes an export ready to hold a new disk of at most its own size.
async fn create(_: &Creation, mut map: Map) -> Result<Made, Error> {
    refuse_preallocation(&map)?;
    let filename = map.take_required_str("filename")?;
    let size = map.take_as::<Size>("size")?.map_or(0, |size| size.0);
    let written: Written = options::from_map(name::read(&filename)?)?;
    let driver = connect(NbdOptions::read(written)?, &NodeOptions::default()).await?;
    let result = match driver.flags().contains(ExportFlags::READ_ONLY) {
        true => Err(Error::new("NBD export is read-only").with_errno(Errno(libc::EACCES))),
        false => clear(&driver, size).await,
    };
    let closed = driver.close().await.map_err(|e| Error::os(format!("Closing '{filename}'"), e));
    result.and(closed)?;
    // Only its beginning was written.
    Ok(Made { reads_zeroes: false })
}

async fn clear(driver: &Nbd, size: u64) -> Result<(), Error> {
    if size > driver.len() {
        return Err(Error::new("Cannot grow NBD nodes"));
    }
    let failed = |errno: Errno| Error::os("Failed to clear the new image's first sector", errno);
    // What was there before must not be taken for an image of some format.
    let block = driver.traits().request_align.max(512);
    let len = u64::from(block).min(driver.len()) as usize;
    if len == 0 {
        return Ok(());
    }
    let mut zeroes = AlignedBuf::new(len, block as usize).ok_or(Errno::ENOMEM).map_err(failed)?;
    driver.write(0, &zeroes.io_vec(), WriteFlags::empty()).await.map_err(failed)?;
    driver.flush().await.map_err(failed)
}
