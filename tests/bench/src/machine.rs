//! The machine that the figures are measured on, and the settings that keep it quiet.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use vublk_testkit::process::pin_thread;

/// First line of `program --version`, or why there is none.
pub fn version(program: &Path) -> String {
    match Command::new(program).arg("--version").output() {
        Ok(out) => {
            String::from_utf8_lossy(&out.stdout).lines().next().unwrap_or("says nothing").to_owned()
        }
        Err(e) => format!("{}: {e}", program.display()),
    }
}

/// Kernel release, processor and its count.
pub fn describe() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, name)| name);
    let count = info.lines().filter(|l| l.starts_with("processor")).count();
    format!("kernel {}, {count} × {model}", kernel.trim())
}

/// The load of the last minute: what else the machine had to do.
pub fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("unknown").to_owned()
}

/// Today, from `date`.
pub fn date() -> String {
    let out = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).output();
    out.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default()
}

/// Threads that spin with the idle class on the measured CPUs, as long as this lives.
///
/// An idle virtual CPU is halted, and waking it costs tens of microseconds of the host's time: a
/// depth-1 load that sleeps would measure that. These give way to everything else.
pub struct AwakeCpus {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl AwakeCpus {
    pub fn new(cpus: &[usize]) -> AwakeCpus {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = cpus
            .iter()
            .map(|&cpu| {
                let stop = stop.clone();
                std::thread::spawn(move || {
                    if pin_thread(0, cpu).is_err() || !be_idle_class() {
                        // Without the idle class it would steal time from what is measured.
                        return;
                    }
                    while !stop.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                })
            })
            .collect();
        AwakeCpus { stop, threads }
    }
}

impl Drop for AwakeCpus {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Puts the calling thread into SCHED_IDLE.
fn be_idle_class() -> bool {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: `param` is a whole sched_param; 0 names the calling thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &param) == 0 }
}
