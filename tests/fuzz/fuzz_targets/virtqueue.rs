//! The fuzz target of `virtqueue`: hostile rings against a real queue.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::virtqueue::run(data));
