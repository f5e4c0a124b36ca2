//! The fuzz target of `nbd`: a hostile client against a real server.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::nbd::run(data));
