//! The fuzzer's door to `parallels_bundle`: descriptors that make no sense.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::parallels_bundle::run(data));
