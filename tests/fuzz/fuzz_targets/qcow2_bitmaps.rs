//! The fuzz target of `qcow2_bitmaps`: stored bitmaps with bytes changed, loaded, changed, stored.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::qcow2_bitmaps::run(data));
