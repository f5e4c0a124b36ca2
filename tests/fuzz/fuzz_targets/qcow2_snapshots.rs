//! The fuzz target of `qcow2_snapshots`: images with snapshots and bytes changed, worked on.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::qcow2_snapshots::run(data));
