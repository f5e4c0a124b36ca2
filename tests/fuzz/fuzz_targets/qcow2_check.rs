//! The fuzz target of `qcow2_check`: images with bytes changed, checked and repaired.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::qcow2_check::run(data));
