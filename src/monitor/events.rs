//! Events that nodes cause, as QEMU's schema has them.

use super::reply::object;
use crate::block::{Corrupted, Notice, ThresholdExceeded};
use crate::options::Value;

/// The event's name and data.
pub fn of_notice(notice: Notice) -> (&'static str, Value) {
    match notice {
        Notice::Corrupted(Corrupted { node, message, place, is_fatal }) => {
            let mut data = object([
                // No device of a guest is in this process.
                ("device", Value::from("")),
                ("node-name", Value::from(node)),
                ("msg", Value::from(message)),
                ("fatal", Value::from(is_fatal)),
            ]);
            if let (Some((offset, size)), Value::Map(map)) = (place, &mut data) {
                map.insert("offset", offset);
                map.insert("size", size);
            }
            ("BLOCK_IMAGE_CORRUPTED", data)
        }
        Notice::Exceeded(ThresholdExceeded { node, threshold, exceeded }) => {
            let data = object([
                ("node-name", Value::from(node)),
                ("amount-exceeded", Value::from(exceeded)),
                ("write-threshold", Value::from(threshold)),
            ]);
            ("BLOCK_WRITE_THRESHOLD", data)
        }
    }
}
