//! The fuzzer's door to `options`: hostile text against the option parsers.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::options::run(data));
