//! Random requests of many clients, against the model of what each sector may hold.

use crate::disks::{REGISTRY, new_image, seed};
use crate::model::{LEN, on_real_workers};
use vublk::block::registry::Kind;

#[test]
fn two_workers_on_an_image_of_any_format_agree_with_the_model() {
    let seed = seed();
    for entry in REGISTRY.iter().filter(|entry| entry.kind == Kind::Format && !entry.is_raw()) {
        if entry.create.is_some() {
            let (_file, options) = new_image(entry, LEN);
            on_real_workers(format!("{options},discard=unmap"), seed, 200);
        }
    }
}
