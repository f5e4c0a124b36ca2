//! The fuzzer's door to `parallels`: images that make no sense.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::parallels::run(data));
