//! The fuzz target of `bochs`: images that make no sense.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::bochs::run(data));
