//! New images on nodes of a graph, as QMP's `blockdev-create` asks for them (BlockdevCreateOptionsVmdk).

use super::create::{NewExtent, Wanted, write_descriptor, write_sparse};
use crate::block::create::{Made, MakeFn};
use crate::block::new_file::make_on_node;
use crate::block::{Error, Graph, Node, Registry};
use crate::options::{self, Map, NodeRef, Size, Value};
use serde::Deserialize;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    file: NodeRef,
    size: Size,
    #[serde(default)]
    extents: Vec<NodeRef>,
    subformat: Option<String>,
    backing_file: Option<String>,
    adapter_type: Option<String>,
    hwversion: Option<String>,
    toolsversion: Option<String>,
    zeroed_grain: Option<bool>,
}

impl Options {
    /// The same as `create -o` has it.
    fn as_created(&self) -> Map {
        let mut map = Map::from_iter([("size", Value::from(self.size.0))]);
        let texts = [
            ("subformat", &self.subformat),
            ("adapter_type", &self.adapter_type),
            ("hwversion", &self.hwversion),
            ("toolsversion", &self.toolsversion),
        ];
        for (name, text) in texts {
            if let Some(text) = text {
                map.insert(name, Value::from(text.as_str()));
            }
        }
        map.insert("zeroed_grain", Value::from(self.zeroed_grain.unwrap_or(false)));
        map
    }
}

pub(super) fn prepare(_: &'static Registry, map: Map) -> Result<MakeFn, options::Error> {
    let options: Options = options::from_map(map)?;
    Ok(Box::new(move |graph| Box::pin(make(graph, options))))
}

async fn make(graph: &Graph, options: Options) -> Result<Made, Error> {
    if options.backing_file.is_some() {
        // The content ID of the parent goes into the image.
        return Err(Error::new(
            "A VMDK image with a backing file is made by 'create' alone, which looks at that file",
        ));
    }
    let wanted = Wanted::of_options(&options.as_created())?;
    wanted.check()?;
    if !wanted.is_apart() {
        if !options.extents.is_empty() {
            return Err(Error::new("List contains unused extents"));
        }
        let name = name_of(graph, &options.file).await?;
        let extents = [NewExtent { name, len: wanted.size }];
        let descriptor = wanted.descriptor(&extents)?;
        let new = wanted.sparse(wanted.size)?;
        let write = async |node: &Node| write_sparse(node, &new, Some(&descriptor), false).await;
        make_on_node(graph, options.file, new.file_len(), write).await?;
        return Ok(Made { reads_zeroes: true });
    }
    let lens: Vec<u64> = wanted.extents("x").iter().map(|extent| extent.len).collect();
    if options.extents.len() < lens.len() {
        let missing = options.extents.len();
        return Err(Error::new(format!("Extent [{missing}] not specified")));
    }
    if options.extents.len() > lens.len() {
        return Err(Error::new("List contains unused extents"));
    }
    let mut extents = Vec::with_capacity(lens.len());
    for (node, len) in options.extents.into_iter().zip(lens) {
        extents.push(NewExtent { name: name_of(graph, &node).await?, len });
        if wanted.is_flat() {
            make_on_node(graph, node, len, async |_: &Node| Ok(())).await?;
            continue;
        }
        let new = wanted.sparse(len)?;
        let write = async |node: &Node| write_sparse(node, &new, None, false).await;
        make_on_node(graph, node, new.file_len(), write).await?;
    }
    let descriptor = wanted.descriptor(&extents)?;
    let write = async |node: &Node| write_descriptor(node, &descriptor).await;
    make_on_node(graph, options.file, descriptor.len() as u64, write).await?;
    Ok(Made { reads_zeroes: !wanted.is_flat() })
}

/// The name of a node's file in its folder, as a descriptor has it.
async fn name_of(graph: &Graph, node: &NodeRef) -> Result<String, Error> {
    let hold = graph.borrow_for_image(node.clone(), "options.file").await?;
    let name = hold.node().driver().filename();
    hold.detach().await;
    let name = name.ok_or_else(|| Error::new("The file has no name that can be stored"))?;
    Ok(name[name.rfind('/').map_or(0, |at| at + 1)..].to_owned())
}
