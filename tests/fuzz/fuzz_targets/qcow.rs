//! The fuzz target of `qcow`: images that make no sense.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::qcow::run(data));
