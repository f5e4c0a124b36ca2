//! Tests of the copy engine.

use super::*;

/// The runs of a text in which `0` stands for 512 zero bytes and `x` for others.
fn runs(text: &str, at: u64, sparse: u64) -> String {
    let bytes: Vec<u8> = text.chars().flat_map(|c| vec![u8::from(c == 'x'); 512]).collect();
    let (mut rest, mut at) = (&bytes[..], at);
    let mut shown = Vec::new();
    while !rest.is_empty() {
        let (zero, len) = next_run(rest, at, sparse);
        shown.push(format!("{}{}", len / 512, if zero { "z" } else { "d" }));
        rest = &rest[len..];
        at += len as u64;
    }
    shown.join(" ")
}

#[test]
fn long_runs_of_zeroes_are_kept_apart_in_whole_units() {
    for (text, at, sparse, wanted) in [
        ("xxxxxxxx", 0, 4096, "8d"),
        ("00000000", 0, 4096, "8z"),
        ("0", 0, 4096, "1z"),
        ("xxxxxxxx00000000xxxxxxxx", 0, 4096, "8d 8z 8d"),
        ("x000000000000000xxxxxxxx", 0, 4096, "8d 8z 8d"),
        ("xxxxxxxx00000000xxxxxxxx", 0, 8192, "24d"),
        ("xxxxxxxx0000xxxxxxxxxxxx", 0, 512, "24d"),
        ("0000000000000000x", 0, 4096, "16z 1d"),
        ("xxxxxxxx000", 0, 512, "8d 3z"),
    ] {
        assert_eq!(runs(text, at, sparse), wanted, "{text} {sparse}");
    }
}
