//! The fuzz target of `vmdk`: images that make no sense.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::vmdk::run(data));
