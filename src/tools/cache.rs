//! The cache modes of `-t` and `-T`.

/// How an image's writes reach its storage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cache {
    /// Around the host's page cache.
    pub direct: bool,
    /// Flushes do nothing.
    pub no_flush: bool,
    /// Every write is durable before it completes.
    pub write_through: bool,
}

impl Cache {
    /// `writeback`: what the tools use where nothing is said.
    pub const WRITEBACK: Cache = Cache { direct: false, no_flush: false, write_through: false };
    /// `unsafe`: what convert's target has where nothing is said.
    pub const UNSAFE: Cache = Cache { no_flush: true, ..Cache::WRITEBACK };

    /// The modes' names.
    pub const NAMES: [&str; 5] = ["none", "writeback", "writethrough", "directsync", "unsafe"];

    /// Reads a mode's name.
    pub fn parse(text: &str) -> Option<Cache> {
        let back = Cache::WRITEBACK;
        Some(match text {
            "none" | "off" => Cache { direct: true, ..back },
            "directsync" => Cache { direct: true, write_through: true, ..back },
            "writeback" => back,
            "writethrough" => Cache { write_through: true, ..back },
            "unsafe" => Cache::UNSAFE,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_modes_have_qemus_names() {
        for (name, direct, no_flush, write_through) in [
            ("none", true, false, false),
            ("off", true, false, false),
            ("directsync", true, false, true),
            ("writeback", false, false, false),
            ("writethrough", false, false, true),
            ("unsafe", false, true, false),
        ] {
            let wanted = Cache { direct, no_flush, write_through };
            assert_eq!(Cache::parse(name), Some(wanted), "{name}");
        }
        assert_eq!(Cache::parse("Unsafe"), None);
    }
}
