//! Descriptors of Parallels disks, of elements and texts that an input chooses.
//!
//! There is no panic and no endless work, and errors have one line.

use super::input::Input;
use super::opened::{damage, work};
use std::sync::LazyLock;
use vublk::block::Registry;
use vublk::format::{parallels, raw};
use vublk::protocol::{file, sim};

static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry::new(&[&[&parallels::ENTRY, &raw::ENTRY, &sim::ENTRY, &file::FILE]]));

/// Names of elements, and what is in them.
const NAMES: [&str; 17] = [
    "Parallels_disk_image",
    "Disk_Parameters",
    "Disk_size",
    "Padding",
    "Encryption",
    "Engine",
    "StorageData",
    "Storage",
    "Start",
    "End",
    "Image",
    "GUID",
    "Type",
    "File",
    "Snapshots",
    "Shot",
    "ParentGUID",
];
const TEXTS: [&str; 16] = [
    "0",
    "2048",
    "4096",
    "18446744073709551615",
    "-1",
    "Plain",
    "Compressed",
    "a&amp;b",
    "../a",
    "/dev/null",
    "nbd:a",
    "{00000000-0000-0000-0000-000000000000}",
    "{5fbaabe3-6958-40ff-92a7-860e329aab41}",
    "{5FBAABE3-6958-40FF-92A7-860E329AAB42}",
    "<![CDATA[<]]>",
    "&#0;",
];

/// An element with others in it, or with text.
fn element(input: &mut Input, depth: u8, text: &mut String) {
    let name = NAMES[input.u8() as usize % NAMES.len()];
    text.push_str(&format!("<{name}>"));
    if depth == 0 || input.one_in(3) {
        text.push_str(TEXTS[input.u8() as usize % TEXTS.len()]);
    } else {
        (0..input.u8() % 4).for_each(|_| element(input, depth - 1, text));
    }
    text.push_str(&format!("</{name}>"));
}

/// A text that makes sense, but for its numbers, its types and its parents.
fn orderly(input: &mut Input) -> String {
    let guid = |n: u8| match n {
        0 => "5fbaabe3-6958-40ff-92a7-860e329aab41".to_owned(),
        1 => "00000000-0000-0000-0000-000000000000".to_owned(),
        n => format!("000000{n:02x}-0000-0000-0000-000000000000"),
    };
    let mut text = "<Parallels_disk_image Version=\"1.0\"><StorageData>".to_owned();
    let mut end = 0;
    for part in 0..1 + input.u8() % 3 {
        let start = end;
        end += input.below(5000);
        text.push_str(&format!("<Storage><Start>{start}</Start><End>{end}</End>"));
        for image in 0..1 + input.u8() % 4 {
            let kind = if input.one_in(2) { "Plain" } else { "Compressed" };
            text.push_str(&format!(
                "<Image><GUID>{{{}}}</GUID><Type>{kind}</Type><File>{part}.{image}</File></Image>",
                guid(if input.one_in(4) { input.u8() % 6 } else { image * 2 })
            ));
        }
        text.push_str("</Storage>");
    }
    text.push_str(&format!(
        "</StorageData><Disk_Parameters><Disk_size>{end}</Disk_size></Disk_Parameters><Snapshots>"
    ));
    for _ in 0..input.u8() % 5 {
        let [own, parent] = [input.u8() % 6, input.u8() % 6].map(guid);
        text.push_str(&format!(
            "<Shot><GUID>{{{own}}}</GUID><ParentGUID>{{{parent}}}</ParentGUID></Shot>"
        ));
    }
    text.push_str("</Snapshots></Parallels_disk_image>");
    text
}

pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut text = match input.one_in(2) {
        true => orderly(&mut input).into_bytes(),
        false => {
            let mut text = "<Parallels_disk_image Version='1.0'>".to_owned();
            (0..1 + input.u8() % 8).for_each(|_| element(&mut input, 4, &mut text));
            text.push_str("</Parallels_disk_image>");
            text.into_bytes()
        }
    };
    if input.one_in(3) {
        damage(&mut text, &mut input);
    }
    work(&REGISTRY, "parallels", &text, &mut input);
}
