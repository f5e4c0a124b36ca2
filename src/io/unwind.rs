//! Panics on threads that serve guests: they end the process.
//!
//! The rule it guards: memory that the kernel transfers to is never freed by unwinding, and no guest waits forever
//! for a thread that is gone while the process looks alive.

/// Ends the process when it is dropped by a panic. Declared after what must not be unwound.
pub(super) struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let name = std::thread::current().name().unwrap_or("a thread").to_owned();
            log::error!("{name}: panicked with guests' I/O on its hands: the process ends");
            log::logger().flush();
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::io::{Worker, WorkerOptions, offload};
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    /// Runs the test `name` again in a process of its own, which is to be ended by SIGABRT.
    fn aborts(name: &str, panics: impl FnOnce(Worker)) {
        if std::env::var_os("VUBLK_TEST_PANIC").is_some() {
            return panics(Worker::start("panics", WorkerOptions::default()).unwrap());
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        let name = format!("{}::{name}", module_path!().split_once("::").unwrap().1);
        command.args(["--exact", &name]).env("VUBLK_TEST_PANIC", "1").env("RUST_BACKTRACE", "0");
        let output = command.output().unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
    }

    #[test]
    fn a_panic_on_a_worker_ends_the_process() {
        aborts("a_panic_on_a_worker_ends_the_process", |worker| {
            worker.send(|_| panic!("on purpose"));
        });
    }

    #[test]
    fn a_panic_in_offloaded_work_ends_the_process() {
        aborts("a_panic_in_offloaded_work_ends_the_process", |worker| {
            // Without the rule the work would be waited for without end.
            worker.send(|local| local.io().spawn(async { offload(|| panic!("on purpose")).await }));
            std::thread::sleep(std::time::Duration::from_secs(5));
            std::process::exit(0);
        });
    }
}
