//! The floor: fio's own io_uring engine on the same file, its CPU time per request.
//!
//! fio's report leaves out what the kernel's worker threads (`iou-wrk`) do in its name, and io_uring
//! hands them every request on a file that cannot be asked not to block, as on tmpfs. So there are
//! two figures: fio's own, and the whole account of its processes less what fio takes to start.

use std::path::Path;
use std::process::Command;

use crate::load::Measured;

/// One job of fio.
pub struct Job<'a> {
    pub file: &'a Path,
    pub write: bool,
    pub random: bool,
    pub block: u32,
    pub depth: u16,
    pub direct: bool,
    pub seconds: f64,
    pub cpu: usize,
}

/// CPU time of fio without any I/O to speak of, in nanoseconds: the median of three.
pub fn start_up_ns(job: &Job<'_>) -> Result<u64, String> {
    let mut times = Vec::new();
    for _ in 0..3 {
        times.push(execute(job, &["--io_size=4k".into()])?.1);
    }
    times.sort_unstable();
    Ok(times[1])
}

/// What a job cost.
pub struct Cost {
    /// By the account of its processes, the kernel's workers included.
    pub whole: Measured,
    /// By fio's own report.
    pub reported: Measured,
}

/// Runs the job; `Err` says what fio said. `start_up_ns` is taken off its whole account.
pub fn run(job: &Job<'_>, start_up_ns: u64) -> Result<Cost, String> {
    let times = ["--time_based=1".into(), format!("--runtime={}ms", (job.seconds * 1000.0) as u64)];
    let (report, cpu_ns) = execute(job, &times)?;
    let reported = parse(&report, job.direction())?;
    let own = cpu_ns.saturating_sub(start_up_ns) as f64;
    let whole = Measured { cpu_ns: own / reported.requests.max(1) as f64, ..reported };
    Ok(Cost { whole, reported })
}

impl Job<'_> {
    fn direction(&self) -> &'static str {
        if self.write { "write" } else { "read" }
    }
}

/// fio's report, and the CPU time of its processes in nanoseconds.
fn execute(job: &Job<'_>, more: &[String]) -> Result<(Vec<u8>, u64), String> {
    let direction = job.direction();
    let order = if job.random { "rand" } else { "" };
    let args = [
        "--name=floor".to_owned(),
        "--ioengine=io_uring".into(),
        "--output-format=json".into(),
        "--eta=never".into(),
        // The map of blocks done already is bookkeeping that no server does.
        "--norandommap=1".into(),
        format!("--filename={}", job.file.display()),
        format!("--rw={order}{direction}"),
        format!("--bs={}", job.block),
        format!("--iodepth={}", job.depth),
        format!("--direct={}", u8::from(job.direct)),
        format!("--cpus_allowed={}", job.cpu),
    ];
    let before = reaped_cpu_ns();
    let out =
        Command::new("fio").args(&args).args(more).output().map_err(|e| format!("fio: {e}"))?;
    if !out.status.success() {
        let text = String::from_utf8_lossy(&out.stderr);
        return Err(format!("fio ended with {}: {}", out.status, text.trim()));
    }
    Ok((out.stdout, reaped_cpu_ns() - before))
}

/// CPU time of all children that ended and were waited for, theirs included.
fn reaped_cpu_ns() -> u64 {
    // SAFETY: an all-zero rusage is a valid one, and the call fills it.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage);
        usage
    };
    let ns = |t: libc::timeval| t.tv_sec as u64 * 1_000_000_000 + t.tv_usec as u64 * 1000;
    ns(usage.ru_utime) + ns(usage.ru_stime)
}

/// Takes requests, times and the job's CPU share out of fio's report.
fn parse(report: &[u8], direction: &str) -> Result<Measured, String> {
    // Warnings stand before the report.
    let start = report.iter().position(|&b| b == b'{').unwrap_or(0);
    let json: serde_json::Value =
        serde_json::from_slice(&report[start..]).map_err(|e| format!("fio's report: {e}"))?;
    let job = &json["jobs"][0];
    let number = |value: &serde_json::Value, what: &str| {
        value.as_f64().ok_or_else(|| format!("fio's report has no {what}"))
    };
    let side = &job[direction];
    let requests = number(&side["total_ios"], "total_ios")?;
    let seconds = number(&side["runtime"], "runtime")? / 1000.0;
    let busy = number(&job["usr_cpu"], "usr_cpu")? + number(&job["sys_cpu"], "sys_cpu")?;
    let percentile = |p: &str| side["clat_ns"]["percentile"][p].as_u64().unwrap_or(0);
    Ok(Measured {
        requests: requests as u64,
        seconds,
        cpu_ns: busy / 100.0 * seconds * 1e9 / requests.max(1.0),
        p50_ns: percentile("50.000000"),
        p99_ns: percentile("99.000000"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_becomes_requests_and_cpu_time_per_request() {
        let report = br#"fio: a warning
        {"jobs":[{"usr_cpu":20.0,"sys_cpu":80.0,"read":{"total_ios":1000000,"runtime":1000,
        "clat_ns":{"percentile":{"50.000000":5000,"99.000000":9000}}}}]}"#;
        let m = parse(report, "read").unwrap();
        assert_eq!((m.requests, m.p50_ns, m.p99_ns), (1_000_000, 5000, 9000));
        assert!((m.cpu_ns - 1000.0).abs() < 1e-6);
    }
}
