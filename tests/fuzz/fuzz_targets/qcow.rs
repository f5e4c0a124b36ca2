//! The fuzzer's door to `qcow`: images that make no sense.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::qcow::run(data));
