//! Writing the page, in Prometheus's text format 0.0.4 or OpenMetrics 1.0.

use crate::block::DriveHealth;
use crate::export::core::ExportMetrics;
use crate::export::core::metrics::{
    BUCKETS, OPERATIONS, OperationMetrics, QueueMetrics, Serves, bound,
};
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How a page is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Prometheus,
    OpenMetrics,
}

impl Format {
    pub fn content_type(self) -> &'static str {
        match self {
            Format::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The description of the process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Process {
    /// Seconds since 1970.
    pub started: f64,
    pub cpu_ns: u64,
    pub resident_bytes: u64,
    pub log_lines_dropped: u64,
}

/// The whole page.
pub fn page(
    format: Format,
    process: Process,
    exports: &[Arc<ExportMetrics>],
    drives: &[(String, DriveHealth)],
) -> String {
    let mut page = Page { text: String::new(), format };
    page.process(process);
    page.exports(exports);
    page.requests(exports);
    page.latencies(exports);
    page.queues(exports);
    page.drives(drives);
    if format == Format::OpenMetrics {
        page.text.push_str("# EOF\n");
    }
    page.text
}

struct Page {
    text: String,
    format: Format,
}

type Labels<'a> = &'a [(&'a str, &'a str)];

impl Page {
    /// Begins a family; all of its samples follow.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let family = match self.format {
            Format::OpenMetrics => name.strip_suffix("_total").unwrap_or(name),
            Format::Prometheus => name,
        };
        // Writing to a text does not fail.
        let _ = writeln!(self.text, "# HELP {family} {help}\n# TYPE {family} {kind}");
    }

    fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl std::fmt::Display) {
        self.text.push_str(name);
        for (index, (label, value)) in labels.iter().enumerate() {
            self.text.push(if index == 0 { '{' } else { ',' });
            let _ = write!(self.text, "{label}=\"");
            for c in value.chars() {
                match c {
                    '\\' => self.text.push_str("\\\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str("\\n"),
                    c => self.text.push(c),
                }
            }
            self.text.push('"');
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }

    fn process(&mut self, process: Process) {
        let mut one = |name: &str, kind: &str, help: &str, value: f64| {
            self.family(name, kind, help);
            self.sample(name, &[], value);
        };
        let Process { started, cpu_ns, resident_bytes, log_lines_dropped } = process;
        let help = "Start time of the process since 1970, in seconds.";
        one("process_start_time_seconds", "gauge", help, started);
        let help = "Processor time used, in seconds.";
        one("process_cpu_seconds_total", "counter", help, seconds(cpu_ns));
        let help = "Resident memory, guests' included as far as it was touched, in bytes.";
        one("process_resident_memory_bytes", "gauge", help, resident_bytes as f64);
        let help =
            "Log lines dropped because standard error was not read, or could not be written.";
        one("vublk_log_dropped_lines_total", "counter", help, log_lines_dropped as f64);
        self.family("vublk_build_info", "gauge", "The program's version.");
        self.sample("vublk_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    }

    fn exports(&mut self, exports: &[Arc<ExportMetrics>]) {
        let help = "The node and the image that an export serves, and its socket.";
        self.family("vublk_export_info", "gauge", help);
        for export in exports {
            let writable = if export.writable { "on" } else { "off" };
            let Serves { node, image } = export.serves.lock().clone();
            let labels = [
                ("export", &*export.name),
                ("node", &*node),
                ("image", &*image),
                ("socket", &*export.socket),
                ("writable", writable),
            ];
            self.sample("vublk_export_info", &labels, 1);
        }
        let mut each = |name: &str, kind: &str, help: &str, of: fn(&ExportMetrics) -> u64| {
            self.family(name, kind, help);
            for export in exports {
                self.sample(name, &[("export", &export.name)], of(export));
            }
        };
        each("vublk_export_size_bytes", "gauge", "The disk's size, in bytes.", |e| read(&e.size));
        let help = "Whether a front end is connected.";
        each("vublk_export_connected", "gauge", help, |e| {
            u64::from(e.connected.load(Ordering::Relaxed))
        });
        let help = "Whether flushes fail until the loss that a failed one has left is accepted.";
        each("vublk_export_flush_failed", "gauge", help, |e| {
            u64::from(e.flush_failed.load(Ordering::Relaxed))
        });
        let help = "Front ends that have connected.";
        each("vublk_export_connections_total", "counter", help, |e| read(&e.connections));
        let help = "Memory that may be in use for requests, in bytes.";
        each("vublk_export_memory_bytes", "gauge", help, |e| e.memory.held());
    }

    fn each_operation(
        &mut self,
        exports: &[Arc<ExportMetrics>],
        mut act: impl FnMut(&mut Page, Labels<'_>, &OperationMetrics),
    ) {
        for export in exports {
            for (index, queue) in export.queues() {
                let index = index.to_string();
                for (operation, counts) in OPERATIONS.iter().zip(&queue.operations) {
                    let labels =
                        [("export", &*export.name), ("queue", &index), ("operation", operation)];
                    act(self, &labels, counts);
                }
            }
        }
    }

    fn requests(&mut self, exports: &[Arc<ExportMetrics>]) {
        type Count = fn(&OperationMetrics) -> u64;
        let families: [(&str, &str, Count); 4] = [
            ("requests", "Requests that have ended.", |o| counts(o).iter().sum()),
            ("bytes", "Bytes of the requests that worked.", |o| read(&o.bytes)),
            ("errors", "Requests that were failed to the guest.", |o| read(&o.errors)),
            (
                "storage_errors",
                "Times that the storage has failed a request, whatever became of it.",
                |o| read(&o.storage_errors),
            ),
        ];
        for (name, help, of) in families {
            let name = format!("vublk_queue_{name}_total");
            self.family(&name, "counter", help);
            self.each_operation(exports, |page, labels, operation| {
                page.sample(&name, labels, of(operation));
            });
        }
    }

    fn latencies(&mut self, exports: &[Arc<ExportMetrics>]) {
        const NAME: &str = "vublk_queue_latency_seconds";
        let help = "From when a request was found to when the guest was shown its end, in seconds.";
        self.family(NAME, "histogram", help);
        let bounds: Vec<_> =
            (0..BUCKETS).map(|bucket| bound(bucket).map_or("+Inf".into(), bound_text)).collect();
        self.each_operation(exports, |page, labels, operation| {
            let sum = read(&operation.latency_ns);
            let counts = counts(operation);
            let all: u64 = counts.iter().sum();
            // Most queues never see most operations.
            if all == 0 {
                return;
            }
            let mut up_to = 0;
            for (bound, count) in bounds.iter().zip(counts) {
                up_to += count;
                let [a, b, c] = [labels[0], labels[1], labels[2]];
                page.sample(&format!("{NAME}_bucket"), &[a, b, c, ("le", bound)], up_to);
            }
            page.sample(&format!("{NAME}_sum"), labels, seconds(sum));
            page.sample(&format!("{NAME}_count"), labels, all);
        });
    }

    fn queues(&mut self, exports: &[Arc<ExportMetrics>]) {
        type Count = fn(&QueueMetrics) -> &AtomicU64;
        let families: [(&str, &str, &str, Count); 7] = [
            ("in_flight", "gauge", "Requests in flight.", |q| &q.depth),
            (
                "held",
                "gauge",
                "Requests that the storage has failed and that are held to be tried again.",
                |q| &q.held,
            ),
            ("waiting", "gauge", "Of those in flight, requests that wait for memory.", |q| {
                &q.waiting
            }),
            ("polls_total", "counter", "Looks for requests.", |q| &q.polls),
            ("batches_total", "counter", "Looks that have found some.", |q| &q.batches),
            ("kicks_total", "counter", "Kicks from the guest.", |q| &q.kicks),
            ("notifications_total", "counter", "Notifications to the guest.", |q| &q.notifications),
        ];
        for (name, kind, help, of) in families {
            let name = format!("vublk_queue_{name}");
            self.family(&name, kind, help);
            for export in exports {
                for (index, queue) in export.queues() {
                    let labels = [("export", &*export.name), ("queue", &*index.to_string())];
                    self.sample(&name, &labels, read(of(queue)));
                }
            }
        }
    }

    fn drives(&mut self, drives: &[(String, DriveHealth)]) {
        // Only where there are any: most disks are files.
        if drives.is_empty() {
            return;
        }
        let mut each = |name: &str, kind: &str, help: &str, of: fn(&DriveHealth) -> f64| {
            let name = format!("vublk_drive_{name}");
            self.family(&name, kind, help);
            for (drive, health) in drives {
                self.sample(&name, &[("drive", drive)], of(health));
            }
        };
        each("temperature_celsius", "gauge", "Composite temperature.", |h| h.celsius.into());
        let help = "Part of the expected life that is used; may be over 1.";
        each("used_ratio", "gauge", help, |h| ratio(h.used_percent));
        let help = "Spare capacity that is left.";
        each("spare_ratio", "gauge", help, |h| ratio(h.spare_percent));
        let help = "What the spare capacity should not fall below.";
        each("spare_threshold_ratio", "gauge", help, |h| ratio(h.spare_threshold_percent));
        let help =
            "Bits: 1 spare low, 2 temperature, 4 unreliable, 8 read-only, 16 backup of the cache.";
        each("critical_warning", "gauge", help, |h| h.warnings.into());
        let help = "Bytes that hosts have read, in its whole life.";
        each("read_bytes_total", "counter", help, |h| h.bytes_read as f64);
        let help = "Bytes that hosts have written, in its whole life.";
        each("written_bytes_total", "counter", help, |h| h.bytes_written as f64);
        let help = "Unrecovered errors of the media.";
        each("media_errors_total", "counter", help, |h| h.media_errors as f64);
        let help = "Times that power was lost before it was shut down.";
        each("unsafe_shutdowns_total", "counter", help, |h| h.unsafe_shutdowns as f64);
        let help = "Errors that its log has counted.";
        each("logged_errors_total", "counter", help, |h| h.logged_errors as f64);
    }
}

fn ratio(percent: u8) -> f64 {
    f64::from(percent) / 100.0
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// All buckets, each read once, so that their sum is theirs.
fn counts(operation: &OperationMetrics) -> [u64; BUCKETS] {
    std::array::from_fn(|bucket| read(&operation.buckets[bucket]))
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// The same bound always gets the same text, which names series.
fn bound_text(ns: u64) -> String {
    seconds(ns).to_string()
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;
    use std::path::Path;

    fn export(name: &str) -> Arc<ExportMetrics> {
        let serves = Serves { node: "node".to_owned(), image: "disk.qcow2".to_owned() };
        let metrics = ExportMetrics::new(name, (serves, 1 << 20), true, 2, true);
        Arc::new(metrics.at(Some(Path::new("disk.sock"))))
    }

    #[test]
    fn a_page_can_be_read_again() {
        let exports = [export("plain"), export("od\"d\\\n")];
        drop(exports[1].recorder(1));
        let (_, queue) = exports[1].queues().next().unwrap();
        let read = &queue.operations[0];
        read.buckets[2].store(3, Ordering::Relaxed);
        read.buckets[BUCKETS - 1].store(1, Ordering::Relaxed);
        read.latency_ns.store(2_500_000_000, Ordering::Relaxed);
        queue.kicks.store(u64::MAX, Ordering::Relaxed);
        let health =
            DriveHealth { celsius: -3, used_percent: 250, media_errors: 7, ..Default::default() };
        let drives = [("0000:01:00.0".to_owned(), health)];
        for format in [Format::Prometheus, Format::OpenMetrics] {
            let text = page(
                format,
                Process { cpu_ns: 1_500_000_000, log_lines_dropped: 7, ..Process::default() },
                &exports,
                &drives,
            );
            assert_eq!(text.ends_with("# EOF\n"), format == Format::OpenMetrics);
            let samples = parse(&text).unwrap();
            let value = |name: &str, labels: &[(&str, &str)]| {
                let is = |s: &&super::super::Sample| {
                    s.name == name && labels.iter().all(|(l, v)| s.label(l) == Some(v))
                };
                let found: Vec<_> = samples.iter().filter(is).collect();
                assert_eq!(found.len(), 1, "{name} {labels:?}");
                found[0].value
            };
            assert_eq!(value("process_cpu_seconds_total", &[]), 1.5);
            assert_eq!(value("vublk_log_dropped_lines_total", &[]), 7.0);
            assert_eq!(value("vublk_export_size_bytes", &[("export", "plain")]), 1048576.0);
            let drive = [("drive", "0000:01:00.0")];
            assert_eq!(value("vublk_drive_temperature_celsius", &drive), -3.0);
            assert_eq!(value("vublk_drive_used_ratio", &drive), 2.5);
            assert_eq!(value("vublk_drive_media_errors_total", &drive), 7.0);
            let read = [("export", "od\"d\\\n"), ("queue", "1"), ("operation", "read")];
            assert_eq!(value("vublk_queue_requests_total", &read), 4.0);
            assert_eq!(value("vublk_queue_latency_seconds_sum", &read), 2.5);
            let bucket = |le| {
                let labels = [&read[..], &[("le", le)]].concat();
                value("vublk_queue_latency_seconds_bucket", &labels)
            };
            assert_eq!(
                ["0.000002048", "0.000004096", "17.179869184", "+Inf"].map(bucket),
                [0.0, 3.0, 3.0, 4.0]
            );
        }
    }

    #[test]
    fn of_an_export_without_queues_there_are_no_requests() {
        let text = page(Format::Prometheus, Process::default(), &[export("e")], &[]);
        assert!(text.contains("vublk_export_connected{export=\"e\"} 0\n"), "{text}");
        assert!(!text.contains("vublk_queue_requests_total{"), "{text}");
    }
}
