//! The description of an image, beside qemu-img's.

use super::*;
use vublk::format::qcow2::header::Header;
use vublk::format::qcow2::info::info;
use vublk::options::json;

#[test]
fn an_image_says_of_itself_what_qemu_img_says_of_it() {
    let dir = crate::file::on_tmpfs();
    for (options, patch) in [
        ("compat=0.10", None),
        ("lazy_refcounts=on,refcount_bits=64", None),
        ("compression_type=zstd,extended_l2=on", None),
        ("data_file=d.raw", None),
        ("data_file=d.raw,data_file_raw=on", None),
        ("backing_file=b.raw,backing_fmt=raw", None),
        ("backing_file=b.raw,backing_fmt=raw,compat=0.10", None),
        // Dirty and corrupt.
        ("cluster_size=64k", Some(3)),
    ] {
        let options = format!("cluster_size=64k,{options}");
        qemu_img(dir.path(), &["create", "-u", "-f", "qcow2", "-o", &options, "image", "1M"]);
        let path = dir.path().join("image");
        let mut image = std::fs::read(&path).unwrap();
        image[79] |= patch.unwrap_or(0);
        std::fs::write(&path, &image).unwrap();
        let theirs = qemu_img(dir.path(), &["info", "--output=json", "image"]);
        let theirs: serde_json::Value = serde_json::from_str(&theirs).unwrap();

        let ours = info(&Header::parse(&image[..65536]).unwrap(), &[]);
        let specific: serde_json::Value =
            serde_json::from_str(&json::to_text(&ours.specific.unwrap())).unwrap();
        assert_eq!(specific, theirs["format-specific"], "{options}");
        assert_eq!(ours.cluster_size, theirs["cluster-size"].as_u64());
        assert_eq!(Some(ours.is_dirty), theirs["dirty-flag"].as_bool());
        assert!(!ours.is_encrypted);
        assert_eq!(ours.backing_filename.as_deref(), theirs["backing-filename"].as_str());
        assert_eq!(ours.backing_format.as_deref(), theirs["backing-filename-format"].as_str());
    }
}
