//! Error numbers on the wire, which are the protocol's own on every system.

use crate::io::Errno;

/// The number of an error, or another one that comes near it. Zero: no error.
pub fn to_wire(errno: Errno) -> u32 {
    match errno.0 {
        0 => 0,
        libc::EPERM | libc::EROFS => 1,
        libc::EIO => 5,
        libc::ENOMEM => 12,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => 28,
        libc::EOVERFLOW => 75,
        libc::EOPNOTSUPP => 95,
        libc::ESHUTDOWN => 108,
        _ => 22,
    }
}

/// The error of a number that is not zero: EINVAL if the protocol has none of that number.
pub fn from_wire(number: u32) -> Errno {
    Errno(match number {
        1 => libc::EPERM,
        5 => libc::EIO,
        12 => libc::ENOMEM,
        28 => libc::ENOSPC,
        75 => libc::EOVERFLOW,
        95 => libc::EOPNOTSUPP,
        108 => libc::ESHUTDOWN,
        _ => libc::EINVAL,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_protocol_go_there_and_back_and_others_are_invalid() {
        for number in [1, 5, 12, 22, 28, 75, 95, 108] {
            assert_eq!(to_wire(from_wire(number)), number);
        }
        for number in [2, 30, 0xffff_ffff] {
            assert_eq!(from_wire(number), Errno::EINVAL);
        }
        let others = [(libc::EROFS, 1), (libc::EDQUOT, 28), (libc::ENODEV, 22), (0, 0)];
        assert_eq!(others.map(|(errno, _)| to_wire(Errno(errno))), others.map(|(_, wire)| wire));
    }
}
