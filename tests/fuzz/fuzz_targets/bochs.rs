//! The fuzzer's door to `bochs`: images that make no sense.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::bochs::run(data));
