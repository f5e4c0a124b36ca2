//! The user data of operations: the kind in the low byte, 24 bits of its own, and a number.

pub(super) const OP: u8 = 1;
pub(super) const KICK: u8 = 2;
pub(super) const WAKE: u8 = 3;
pub(super) const NONE: u8 = 4;

pub(super) fn pack(kind: u8, extra: u32, number: u32) -> u64 {
    kind as u64 | (extra as u64 & 0xff_ffff) << 8 | (number as u64) << 32
}
pub(super) fn unpack(user_data: u64) -> (u8, u32, u32) {
    (user_data as u8, (user_data >> 8) as u32 & 0xff_ffff, (user_data >> 32) as u32)
}
