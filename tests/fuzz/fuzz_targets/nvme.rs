//! The fuzz target of `nvme`: a hostile controller against its driver.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::nvme::run(data));
