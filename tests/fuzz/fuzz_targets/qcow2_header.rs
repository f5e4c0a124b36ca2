//! The fuzz target of `qcow2_header`: hostile first clusters and table entries.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::qcow2_header::run(data));
