//! The fuzz target of `vhdx`: images with fields and the log changed, opened, used and checked.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::vhdx::run(data));
