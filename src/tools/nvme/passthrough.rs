//! Admin commands to a controller that the kernel's driver has (linux/nvme_ioctl.h).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use vublk_vfio::spec::AdminOpcode;

/// `struct nvme_admin_cmd`.
#[repr(C)]
#[derive(Default)]
struct AdminCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    dwords_2_and_3: [u32; 2],
    metadata: u64,
    address: u64,
    metadata_len: u32,
    data_len: u32,
    /// 10 to 15.
    dwords: [u32; 6],
    timeout_ms: u32,
    result: u32,
}

/// `_IOWR('N', 0x41, struct nvme_admin_cmd)`.
const ADMIN_COMMAND: libc::c_ulong = 0xc048_4e41;
const TIMEOUT_MS: u32 = 5000;

/// The first `len` bytes, a multiple of four, of a controller's log page. `device` is its character device.
pub fn log_page(device: &Path, page: u8, len: usize) -> io::Result<Vec<u8>> {
    let file = File::open(device)?;
    let mut data = vec![0u8; len];
    let mut command = AdminCommand {
        opcode: AdminOpcode::GetLogPage as u8,
        namespace: u32::MAX,
        address: data.as_mut_ptr() as u64,
        data_len: len as u32,
        timeout_ms: TIMEOUT_MS,
        ..AdminCommand::default()
    };
    command.dwords[0] = u32::from(page) | ((len / 4 - 1) as u32) << 16;
    // SAFETY: the command is of the call's type, and names `data`, all of which the kernel may write to
    // until the call returns.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), ADMIN_COMMAND as _, &mut command) };
    match result {
        0 => Ok(data),
        ..0 => Err(io::Error::last_os_error()),
        status => Err(io::Error::other(format!("status {status:#x}"))),
    }
}
