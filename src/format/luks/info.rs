//! What an image says of itself (ImageInfoSpecificLUKS, QCryptoBlockInfoLUKS): cipher, slots, where things are.

use super::header::Header;
use crate::block::SECTOR;
use crate::options::{Map, Value};

/// As `format-specific` has it.
pub fn specific(header: &Header, payload: u64) -> Value {
    let mut outer = Map::new();
    outer.insert("type", "luks");
    outer.insert("data", details(header, payload));
    Value::Map(outer)
}

/// Keys in the order in which QEMU shows them. `payload` is where the disk begins, in bytes.
pub fn details(header: &Header, payload: u64) -> Map {
    let mut data = Map::new();
    if let Ok(cipher) = header.disk_cipher() {
        data.insert("ivgen-alg", cipher.ivgen.name());
        data.insert("hash-alg", header.hash.name());
        data.insert("cipher-alg", cipher.alg.name());
        data.insert("uuid", header.uuid.as_str());
        if let Some(hash) = cipher.iv_hash {
            data.insert("ivgen-hash-alg", hash.name());
        }
        data.insert("cipher-mode", cipher.mode.name());
    }
    let slots = header.slots.iter().map(|slot| {
        let mut shown = Map::new();
        shown.insert("active", slot.is_active);
        if slot.is_active {
            shown.insert("iters", u64::from(slot.iterations));
        }
        shown.insert("key-offset", u64::from(slot.offset) * SECTOR);
        if slot.is_active {
            shown.insert("stripes", u64::from(slot.stripes));
        }
        Value::Map(shown)
    });
    data.insert("slots", Value::List(slots.collect()));
    data.insert("payload-offset", payload);
    data.insert("master-key-iters", u64::from(header.digest_iterations));
    data
}
