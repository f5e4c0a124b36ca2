//! The pages that users read, and the fenced blocks in them.

use std::fs;
use std::path::Path;

/// A fenced block. Its kind is what its first fence says: `sh` is run in the page's shell, `sh background` in a
/// terminal of its own, where it stays in the foreground; other kinds are not commands.
pub struct Block {
    pub kind: String,
    pub text: String,
    /// The line of its first fence.
    pub line: usize,
}

/// README or a page of docs/.
pub struct Page {
    /// From the root of the tree.
    pub name: String,
    pub text: String,
    pub blocks: Vec<Block>,
}

/// The root of the source tree.
pub fn tree() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README and all pages of docs/.
pub fn pages() -> Vec<Page> {
    let listed = fs::read_dir(tree().join("docs")).unwrap();
    let files = listed.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> =
        files.filter(|name| name.ends_with(".md")).map(|name| format!("docs/{name}")).collect();
    names.sort();
    names.insert(0, "README.md".into());
    names.iter().map(|name| Page::read(name)).collect()
}

impl Page {
    pub fn read(name: &str) -> Page {
        let text = fs::read_to_string(tree().join(name)).unwrap();
        let mut blocks = Vec::new();
        let mut open: Option<Block> = None;
        for (n, line) in text.lines().enumerate() {
            match (&mut open, line.strip_prefix("```")) {
                (None, Some(kind)) => {
                    open = Some(Block { kind: kind.into(), text: String::new(), line: n + 1 });
                }
                (Some(_), Some(_)) => blocks.extend(open.take()),
                (Some(block), None) => block.text += &format!("{line}\n"),
                (None, None) => {}
            }
        }
        assert!(open.is_none(), "{name}: a block has no end");
        Page { name: name.into(), text, blocks }
    }

    /// The commands that run in the page's shell, in their order.
    pub fn commands(&self) -> String {
        let run = self.blocks.iter().filter(|block| block.kind == "sh");
        run.map(|block| &*block.text).collect()
    }
}
