//! Lists of segments as sendmsg(2) and recvmsg(2) take them.

/// What sendmsg(2) and recvmsg(2) take besides the list: nothing.
pub(super) fn message(list: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeroes is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.as_ptr().cast_mut();
    // The kernel takes no more; what is left out is sent or received later.
    message.msg_iovlen = list.len().min(libc::UIO_MAXIOV as usize) as _;
    message
}
