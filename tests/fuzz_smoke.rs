//! The fuzz targets on stable Rust, in seconds: each on seeded inputs.
//!
//! `make fuzz` runs the same functions under libFuzzer as long as you like.
//!
//! A process of its own: what a connection leaves open is counted.

#[path = "fuzz/src/lib.rs"]
mod targets;

use fastrand::Rng;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;
use vublk::protocol::sim::{SimDisk, SimOptions};

/// One target at a time.
static TURN: Mutex<()> = Mutex::new(());

/// Gives `target` so many inputs, made by `make`. `VUBLK_SEED` repeats the input that failed.
fn with_seeds(rounds: u64, make: impl Fn(&mut Rng) -> Vec<u8>, target: impl Fn(&[u8], u64)) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let given = std::env::var("VUBLK_SEED").ok().map(|s| s.parse().expect("VUBLK_SEED: a number"));
    let first = given.unwrap_or(1u64);
    println!("VUBLK_SEED={first}");
    let rounds = if given.is_some() { 1 } else { rounds };
    for seed in (0..rounds).map(|i| first.wrapping_add(i)) {
        let input = make(&mut Rng::with_seed(seed));
        hold(format!("VUBLK_SEED={seed}"), || target(&input, seed));
    }
}

/// Gives `target` the inputs that lie in the tree for it.
fn with_kept(name: &str, target: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds").join(name);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{folder:?}: {e}"));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "no input in {folder:?}");
    for path in paths {
        let input = std::fs::read(&path).expect("an input");
        hold(path.display().to_string(), || target(&input));
    }
}

/// Runs `work`, and names the input `what` if it fails or does not end.
fn hold(what: String, work: impl FnOnce()) {
    let _end = Deadline::new(what.clone());
    if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
        eprintln!("failed with {what}");
        resume_unwind(panic);
    }
}

/// How long one input may take before it counts as a hang: thousands of times what it needs.
const LIMIT: Duration = Duration::from_secs(60);

/// Ends the process if it is not dropped in time: what hangs in the kernel cannot be unwound.
struct Deadline {
    _sender: mpsc::Sender<()>,
}

impl Deadline {
    fn new(what: String) -> Deadline {
        let (sender, receiver) = mpsc::channel::<()>();
        std::thread::spawn(move || {
            if receiver.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!("still at it after {LIMIT:?} with {what}");
                std::process::abort();
            }
        });
        Deadline { _sender: sender }
    }
}

/// Bytes that are likelier small, as decisions want them.
fn bytes(rng: &mut Rng) -> Vec<u8> {
    let len = rng.usize(..600);
    (0..len).map(|_| if rng.u8(..4) == 0 { rng.u8(..) } else { rng.u8(..32) }).collect()
}

/// `bytes` whose guest keeps to the rules.
fn honest(rng: &mut Rng) -> Vec<u8> {
    let mut bytes = bytes(rng);
    bytes.insert(0, rng.u8(..) & !3);
    bytes
}

#[test]
fn inputs_that_the_fuzzer_has_found_keep_the_laws() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    with_kept("virtqueue", targets::virtqueue::run);
    with_kept("vhost_user_messages", targets::vhost_user_messages::run);
    with_kept("options", targets::options::run);
    with_kept("nbd", targets::nbd::run);
    with_kept("nvme", targets::nvme::run);
    with_kept("qcow2_header", targets::qcow2_header::run);
    with_kept("qcow2_check", targets::qcow2_check::run);
    with_kept("qcow2_snapshots", targets::qcow2_snapshots::run);
    with_kept("qcow2_bitmaps", targets::qcow2_bitmaps::run);
    with_kept("qcow", targets::qcow::run);
    with_kept("parallels", targets::parallels::run);
    with_kept("parallels_bundle", targets::parallels_bundle::run);
    with_kept("bochs", targets::bochs::run);
    with_kept("cloop", targets::cloop::run);
    with_kept("dmg", targets::dmg::run);
    with_kept("vhdx", targets::vhdx::run);
    with_kept("vmdk", targets::vmdk::run);
    with_kept("vpc", targets::vpc::run);
}

#[test]
fn a_hostile_guest_gets_its_queue_stopped_and_nothing_else() {
    with_seeds(1500, bytes, |input, _| targets::virtqueue::run(input));
}

#[test]
fn an_honest_guest_gets_every_request_back_with_a_status() {
    with_seeds(1000, honest, |input, _| targets::virtqueue::run(input));
}

#[test]
fn a_chain_of_65536_readable_segments_is_read_as_the_flush_that_it_is() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // Honest, a plain disk, 130 regions side by side, a ring of 16, and the request.
    let shown = targets::virtqueue::show(b"\0\0\0\0\x1f\0\0\0\0\0\0\0\0long flush");
    assert_eq!(shown.long_flushes, 1, "the input no longer leads to such a flush");
}

#[test]
fn rings_that_change_while_they_are_read_harm_their_queue_alone() {
    with_seeds(200, bytes, targets::virtqueue::run_scribbled);
}

#[test]
fn a_hostile_front_end_ends_its_connection_and_leaves_nothing_behind() {
    with_seeds(1500, bytes, |input, _| targets::vhost_user_messages::run(input));
}

#[test]
fn a_hostile_nbd_client_ends_its_connection_and_nothing_of_it_stays() {
    with_seeds(1000, bytes, |input, _| targets::nbd::run(input));
}

#[test]
fn a_message_with_a_socket_too_many_leaves_no_descriptor_behind() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // SET_BACKEND_REQ_FD with a number, and two descriptors instead of one.
    let decisions = [0, 1, 21, 0, 0, 0, 0, 0, 0, 0, 0, 0, 15, 2, 0, 0];
    targets::vhost_user_messages::run(&decisions);
}

#[test]
fn hostile_text_is_refused_on_one_line() {
    let pieces = "driver file a on . .. , ,, = : | 0 1 18446744073709551616 1.5 1e9 0x10 K E { } [ ] \
                  \" ' \\u0000 \\ud800 json: nbd: help null true é \0 \u{7f}";
    let pieces: Vec<_> = pieces.split(' ').chain([" ", "\n", "\t"]).collect();
    let text = |rng: &mut Rng| {
        let mut input = vec![rng.u8(..)];
        for _ in 0..rng.usize(..16) {
            input.extend(pieces[rng.usize(..pieces.len())].bytes());
        }
        input
    };
    with_seeds(20_000, text, |input, _| targets::options::run(input));
    with_seeds(5_000, bytes, |input, _| targets::options::run(input));
}

#[test]
fn a_hostile_qcow2_header_is_refused_or_kept() {
    with_seeds(20_000, bytes, |input, _| targets::qcow2_header::run(input));
}

#[test]
fn the_snapshots_of_a_damaged_qcow2_image_are_worked_on() {
    with_seeds(600, bytes, |input, _| targets::qcow2_snapshots::run(input));
}

#[test]
fn a_damaged_qcow2_image_is_checked_and_what_is_repaired_is_sound() {
    with_seeds(600, bytes, |input, _| targets::qcow2_check::run(input));
}

#[test]
fn damaged_bitmaps_of_a_qcow2_image_are_refused_or_kept() {
    with_seeds(600, bytes, |input, _| targets::qcow2_bitmaps::run(input));
}

#[test]
fn images_of_small_formats_that_make_no_sense_are_refused_or_read() {
    with_seeds(300, bytes, |input, _| {
        targets::qcow::run(input);
        targets::parallels::run(input);
        targets::parallels_bundle::run(input);
        targets::bochs::run(input);
        targets::cloop::run(input);
        targets::dmg::run(input);
        targets::vmdk::run(input);
    });
}

#[test]
fn a_damaged_vhdx_image_is_refused_or_used() {
    with_seeds(600, bytes, |input, _| targets::vhdx::run(input));
}

#[test]
fn a_damaged_vpc_image_is_refused_or_used() {
    with_seeds(600, bytes, |input, _| targets::vpc::run(input));
}

#[test]
fn whatever_a_controller_completes_each_request_ends_once() {
    with_seeds(100, bytes, |input, _| targets::nvme::run(input));
}

#[test]
fn a_renewed_disk_holds_what_it_held_at_first() {
    static FIRST: [u8; 1300] = [1; 1300];
    static SECOND: [u8; 700] = [2; 700];
    let disk = SimDisk::new(SimOptions::new(4096));
    let mut rng = Rng::with_seed(1);
    for _ in 0..1000 {
        let bytes: &[u8] = if rng.bool() { &FIRST } else { &SECOND };
        disk.renew(bytes, 1000);
        assert_eq!(disk.bytes(), bytes);
        disk.set_len(rng.u64(..2048));
        let at = rng.u64(..2000);
        disk.put(at, &vec![rng.u8(..); rng.usize(..2000)]);
        disk.set_len(rng.u64(..4096));
    }
    disk.renew(&FIRST, 1000);
    disk.set_len(2048);
    assert!(disk.bytes()[1300..].iter().all(|&byte| byte == 0), "an old byte lies behind the end");
}
