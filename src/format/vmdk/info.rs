//! What an image says of itself.

use super::{Extent, Part, Vmdk};
use crate::block::ImageInfo;
use crate::format::vmdk::layout::Packing;
use crate::options::{Map, Value};

impl Vmdk {
    pub(super) fn image_info(&self) -> ImageInfo {
        let says = self.shared.says.lock();
        let parent = says.parent.clone().filter(|_| says.has_parent());
        let mut data = Map::new();
        data.insert("cid", Value::from(u64::from(says.cid)));
        data.insert("parent-cid", Value::from(u64::from(says.parent_cid)));
        data.insert("create-type", Value::Str(says.create_type.clone()));
        let is_alone = self.shared.children.iter().filter(|child| !child.is_backing()).count() == 1;
        let extents = self.parts.iter().map(|part| self.extent_info(part, is_alone)).collect();
        data.insert("extents", Value::List(extents));
        let specific = [("type", Value::Str("vmdk".to_owned())), ("data", Value::Map(data))];
        ImageInfo {
            cluster_size: self.cluster_size(),
            backing_format: parent.as_ref().map(|_| super::ENTRY.name.to_owned()),
            backing_filename: parent,
            specific: Some(Value::Map(Map::from_iter(specific))),
            ..ImageInfo::default()
        }
    }

    /// The grain size, if all extents have the same.
    fn cluster_size(&self) -> Option<u64> {
        let first = self.sparse().next()?.layout.grain_size();
        let is_same = self.sparse().count() == self.parts.len()
            && self.sparse().all(|sparse| sparse.layout.grain_size() == first);
        is_same.then_some(first)
    }

    fn extent_info(&self, part: &Part, is_alone: bool) -> Value {
        let mut map = Map::new();
        let child = match &part.extent {
            Extent::Sparse(sparse) => Some(sparse.child),
            Extent::Flat { child, .. } => Some(*child),
            Extent::Zero | Extent::Shut => None,
        };
        if let Extent::Sparse(sparse) = &part.extent
            && sparse.layout.packing != Packing::No
        {
            map.insert("compressed", Value::Bool(true));
        }
        map.insert("virtual-size", Value::from(part.end - part.start));
        let name = child.and_then(|child| self.shared.children[child].node().driver().filename());
        map.insert("filename", Value::Str(name.unwrap_or_default()));
        if let Extent::Sparse(sparse) = &part.extent {
            map.insert("cluster-size", Value::from(sparse.layout.grain_size()));
        }
        // The extent that an image has in its own file is described by no line.
        let kind = if is_alone && child == Some(0) { "" } else { part.kind.name() };
        map.insert("format", Value::Str(kind.to_owned()));
        Value::Map(map)
    }
}
