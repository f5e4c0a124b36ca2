//! The fuzz target of `options`: hostile text against the option parsers.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::options::run(data));
