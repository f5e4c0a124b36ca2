//! New images: qemu-img's options, their rules in QEMU's words, and the writing.
//!
//! The order: an empty L1 table, made durable, and the header last, so that what was not finished is no image.

use super::header::{Header, LEN};
use crate::block::create::{
    CreateEntry, CreateOption, Creation, Made, MakeFn, ValueType, check_backing_format,
};
use crate::block::new_file::{make_in_file, make_on_node};
use crate::block::{Error, Graph, Node, Registry, SECTOR, WriteFlags, ZeroFlags};
use crate::io::{IoResult, IoVec};
use crate::options::{self, Map, NodeRef, Size, Value, bytes};
use serde::Deserialize;

pub(super) static CREATE: CreateEntry = CreateEntry {
    options: OPTIONS,
    create: |creation, map| Box::pin(create(creation, map)),
    measure: None,
    amend: &[],
    on_nodes: Some(prepare),
};

const OPTIONS: &[CreateOption] = &[
    CreateOption::new("size", ValueType::Size, "Virtual disk size"),
    CreateOption::new("backing_file", ValueType::Str, "File name of a base image"),
    CreateOption::new("backing_fmt", ValueType::Str, "Format of the backing image"),
    CreateOption::new(
        "encryption",
        ValueType::Bool,
        "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
    ),
    CreateOption::new("encrypt.format", ValueType::Str, "Encrypt the image, format choices: 'aes'"),
    CreateOption::new(
        "encrypt.key-secret",
        ValueType::Str,
        "ID of the secret that provides the AES encryption key",
    ),
];

/// An image that is asked for, as `blockdev-create` has it (BlockdevCreateOptionsQcow).
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct OnNode {
    file: NodeRef,
    size: Size,
    backing_file: Option<String>,
    encrypt: Option<Value>,
}

/// The header of a new image, and the name of its backing file as it is stored.
///
/// # Errors
/// In QEMU's words.
fn header(size: u64, backing: Option<&str>, encrypts: bool) -> Result<(Header, Vec<u8>), Error> {
    if encrypts {
        return Err(Error::new("Encryption of qcow images is not supported"));
    }
    let name = backing.map(|name| bytes::bytes_of(name).into_owned()).unwrap_or_default();
    Ok((Header::of_new(size, name.len())?, name))
}

async fn create(creation: &Creation, options: Map) -> Result<Made, Error> {
    let size = match options.get("size") {
        Some(Value::Int(n)) => u64::try_from(*n).unwrap_or(0),
        _ => 0,
    };
    let is_about_it = |name: &str| name.starts_with("encrypt.");
    let encrypts = options.get("encryption") == Some(&Value::Bool(true))
        || options.iter().any(|(name, _)| is_about_it(name));
    let backing = options.get("backing_file").and_then(Value::as_str);
    let (header, name) = header(size, backing, encrypts)?;
    let write = async |file: &Node, is_empty: bool| write_to(file, &header, &name, is_empty).await;
    make_in_file(creation, options, file_len(&header), write).await?;
    Ok(Made { reads_zeroes: true })
}

/// How long the file of a new image is, in bytes.
fn file_len(header: &Header) -> u64 {
    header.l1_offset + header.l1_bytes().next_multiple_of(SECTOR)
}

/// Writes an image without data to a file that is long enough. `is_empty`: the file reads as zeroes; one that was there
/// before, or a disk, may have anything.
async fn write_to(file: &Node, header: &Header, name: &[u8], is_empty: bool) -> Result<(), Error> {
    let write = async || -> IoResult {
        if !is_empty {
            file.zero(0, LEN as u64, ZeroFlags::empty()).await?;
        }
        let table = file_len(header) - header.l1_offset;
        file.zero(header.l1_offset, table, ZeroFlags::empty()).await?;
        file.flush().await?;
        let bytes = [&header.encode()[..], name].concat();
        file.write(0, &IoVec::from_ref(&bytes), WriteFlags::empty()).await?;
        file.flush().await
    };
    write().await.map_err(|errno| Error::os("Could not write the new image's metadata", errno))
}

fn prepare(registry: &'static Registry, map: Map) -> Result<MakeFn, options::Error> {
    let OnNode { file, size, backing_file, encrypt } = options::from_map(map)?;
    check_backing_format(registry, None)?;
    Ok(Box::new(move |graph| {
        let made = header(size.0, backing_file.as_deref(), encrypt.is_some());
        Box::pin(async move { make_on(graph, file, made?).await })
    }))
}

async fn make_on(
    graph: &Graph,
    file: NodeRef,
    (header, name): (Header, Vec<u8>),
) -> Result<Made, Error> {
    let write = async |file: &Node| write_to(file, &header, &name, false).await;
    make_on_node(graph, file, file_len(&header), write).await?;
    Ok(Made { reads_zeroes: true })
}
