//! The options of formats that take a file and a backing file, and no others.

use crate::block::OptionHelp;
use crate::options::NodeRef;
use crate::options::node_ref::NodeRefOrNull;
use serde::Deserialize;

pub static HELP: &[OptionHelp] = &[
    OptionHelp { name: "file", value: "node", help: "The node that holds the image" },
    OptionHelp {
        name: "backing",
        value: "node",
        help: "The node to read where the image has no data; null for none",
    },
];

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FileAndBacking {
    pub file: NodeRef,
    pub backing: Option<NodeRefOrNull>,
}
