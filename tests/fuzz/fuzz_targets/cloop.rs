//! The fuzz target of `cloop`: images that make no sense.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::cloop::run(data));
