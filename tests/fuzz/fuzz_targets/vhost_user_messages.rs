//! The fuzz target of `vhost_user_messages`: hostile messages against a real session.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vublk_fuzz::vhost_user_messages::run(data));
