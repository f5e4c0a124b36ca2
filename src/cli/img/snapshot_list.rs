//! The table of an image's internal snapshots, as `snapshot -l` and `info` print it.

use super::outln;
use crate::block::SnapshotInfo;
use crate::cli::columns::pad;
use crate::options::size;

/// Prints the table with its heading.
pub fn print(snapshots: &[SnapshotInfo]) {
    outln!("Snapshot list:");
    print_row(["ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"]);
    for one in snapshots {
        let icount = one.icount.map_or(String::new(), |icount| icount.to_string());
        print_row([
            &one.id,
            &one.name,
            &size::human(one.vm_state_size),
            &date(one.date_sec),
            &clock(one.vm_clock_nsec),
            &icount,
        ]);
    }
}

fn print_row([id, tag, size, date, clock, icount]: [&str; 6]) {
    let (id, tag) = (pad(id, 9), pad(tag, 16));
    outln!("{id} {tag} {size:>8}{date:>20}{clock:>13}{icount:>11}");
}

/// Hours, minutes, seconds and thousandths.
fn clock(nanoseconds: u64) -> String {
    let (seconds, rest) = (nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    format!("{hours:02}:{minutes:02}:{:02}.{:03}", seconds % 60, rest / 1_000_000)
}

/// Local time.
fn date(seconds: u32) -> String {
    let seconds = libc::time_t::from(seconds);
    // SAFETY: all fields are numbers, or a pointer that may be null.
    let mut time: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both are there until the call returns. It reads the environment, which nothing here
    // changes.
    if unsafe { libc::localtime_r(&seconds, &mut time) }.is_null() {
        return String::new();
    }
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        i64::from(time.tm_year) + 1900,
        time.tm_mon + 1,
        time.tm_mday,
        time.tm_hour,
        time.tm_min,
        time.tm_sec
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_has_as_many_hours_as_it_takes() {
        assert_eq!(clock(0), "00:00:00.000");
        assert_eq!(clock(361_140_571), "00:00:00.361");
        assert_eq!(clock(3_723_004_999_999), "01:02:03.004");
        assert_eq!(clock(u64::MAX), "5124095:34:33.709");
    }
}
