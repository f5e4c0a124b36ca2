//! The fuzz target of `vpc`: images with fields changed, opened, used and checked.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::vpc::run(data));
