//! `vhost-user-block`: the command line of QEMU's "Backend program conventions".
//!
//! The vhost-user text defines it for programs that management software finds and starts.

use super::img::outln;
use super::serve::Serve;
use super::sockets::SocketArg;
use clap::Parser;
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// What `--print-capabilities` prints: `VHostUserBackendCapabilitiesBlock` of QEMU's vhost-user.json.
const CAPABILITIES: &str = r#"{"type": "block", "features": ["read-only", "blk-file"]}"#;

/// Serve one raw disk image to one virtual machine
#[derive(Parser)]
#[command(name = "vhost-user-block", version)]
struct Arguments {
    /// The socket to make
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    socket_path: Option<PathBuf>,
    /// The descriptor of a socket: a connection, or one that listens
    #[arg(long, value_name = "FDNUM")]
    fd: Option<RawFd>,
    /// Tell what the program can do, as JSON
    #[arg(long)]
    print_capabilities: bool,
    /// The image or block device
    #[arg(long, value_name = "PATH")]
    blk_file: Option<PathBuf>,
    /// Serve it read-only
    #[arg(long)]
    read_only: bool,
}

/// Runs the program of this name.
pub fn run(arguments: Vec<OsString>) -> super::Outcome {
    // Whatever else is given is ignored then.
    if arguments.iter().any(|argument| argument == "--print-capabilities") {
        outln!("{CAPABILITIES}");
        return Ok(());
    }
    let program = OsString::from("vhost-user-block");
    let arguments = match Arguments::try_parse_from(std::iter::once(program).chain(arguments)) {
        Ok(arguments) => arguments,
        Err(error) if error.use_stderr() => {
            let text = error.to_string();
            let line = text.lines().next().unwrap_or_default();
            return Err(line.trim_start_matches("error: ").into());
        }
        Err(help) => {
            let _ = help.print();
            return Ok(());
        }
    };
    let socket = match (arguments.socket_path, arguments.fd) {
        (Some(path), _) => SocketArg::Path(path),
        (None, Some(fd)) => SocketArg::Fd(fd),
        (None, None) => return Err("--socket-path or --fd is wanted".into()),
    };
    let Some(file) = arguments.blk_file else { return Err("--blk-file is wanted".into()) };
    Serve::raw(file, arguments.read_only, socket).run()
}
