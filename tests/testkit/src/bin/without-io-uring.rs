//! `without-io-uring PROGRAM ARGUMENT…`: runs a program on a host whose io_uring is switched off.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let Some(program) = arguments.next() else {
        eprintln!("usage: without-io-uring PROGRAM ARGUMENT…");
        return ExitCode::from(2);
    };
    let error = match vublk_testkit::seccomp::forbid_io_uring() {
        Ok(()) => Command::new(&program).args(arguments).exec(),
        Err(error) => error,
    };
    eprintln!("without-io-uring: {}: {error}", program.display());
    ExitCode::FAILURE
}
