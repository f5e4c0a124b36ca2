//! The description of an image.

use super::bitmaps::{BitmapFlags, StoredBitmap};
use super::extensions::Extension;
use super::header::{Autoclear, CRYPT_NONE, Compatible, Header, Incompatible};
use crate::block::ImageInfo;
use crate::options::{Map, Value, bytes};

/// As ImageInfo of QMP has it, without snapshots.
pub fn info(header: &Header, bitmaps: &[StoredBitmap]) -> ImageInfo {
    let text = bytes::text_of;
    let extension = |of: fn(&Extension) -> Option<&Vec<u8>>| {
        header.extensions.iter().find_map(of).map(|name| text(name))
    };
    ImageInfo {
        cluster_size: Some(1 << header.cluster_bits),
        vm_state_offset: {
            // Behind the last L2 table that the disk needs.
            let geometry = header.geometry();
            geometry.l1_entries_for(header.size).saturating_mul(geometry.l2_coverage())
        },
        is_dirty: header.incompatible.contains(Incompatible::DIRTY),
        is_encrypted: header.crypt_method != CRYPT_NONE,
        backing_filename: header.backing_file.as_deref().map(text),
        backing_format: header.backing_format().map(text),
        snapshots: Vec::new(),
        specific: Some(specific(
            header,
            extension(|extension| match extension {
                Extension::DataFile(name) => Some(name),
                _ => None,
            }),
            bitmaps,
        )),
    }
}

fn specific(header: &Header, data_file: Option<String>, bitmaps: &[StoredBitmap]) -> Value {
    let mut data = Map::new();
    let is_new = header.version >= 3;
    data.insert("compat", Value::Str(if is_new { "1.1" } else { "0.10" }.to_owned()));
    data.insert("compression-type", Value::Str(header.compression.name().to_owned()));
    if is_new {
        let lazy = header.compatible.contains(Compatible::LAZY_REFCOUNTS);
        data.insert("lazy-refcounts", Value::Bool(lazy));
    }
    if !bitmaps.is_empty() {
        data.insert("bitmaps", Value::List(bitmaps.iter().map(bitmap).collect()));
    }
    data.insert("refcount-bits", Value::Int(1 << header.refcount_order));
    if is_new {
        if let Some(name) = data_file {
            data.insert("data-file", Value::Str(name));
        }
        if header.incompatible.contains(Incompatible::DATA_FILE) {
            let raw = header.autoclear.contains(Autoclear::RAW_DATA_FILE);
            data.insert("data-file-raw", Value::Bool(raw));
        }
        let has = |bit| Value::Bool(header.incompatible.contains(bit));
        data.insert("corrupt", has(Incompatible::CORRUPT));
        data.insert("extended-l2", has(Incompatible::EXTENDED_L2));
    }
    let mut specific = Map::new();
    specific.insert("type", Value::Str("qcow2".to_owned()));
    specific.insert("data", Value::Map(data));
    Value::Map(specific)
}

fn bitmap(stored: &StoredBitmap) -> Value {
    let flags = [(BitmapFlags::IN_USE, "in-use"), (BitmapFlags::AUTO, "auto")];
    let flags = flags.iter().filter(|(flag, _)| stored.flags.contains(*flag));
    let flags = flags.map(|(_, name)| Value::Str((*name).to_owned())).collect();
    Value::Map(Map::from_iter([
        ("flags", Value::List(flags)),
        ("name", Value::Str(stored.name())),
        ("granularity", Value::Int(1 << stored.granularity_bits)),
    ]))
}
