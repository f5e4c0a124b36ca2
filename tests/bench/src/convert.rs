//! convert beside qemu-img, in alternation: time, processor time, and sizes of the copies.
//!
//! It converts raw to qcow2 and back, and to compressed qcow2.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use vublk_testkit::{Error, Result};

use crate::groups::Plan;
use crate::qcow2::{Scratch, Used, qemu_img, text, used};
use crate::results::median;
use crate::targets::Verdict;

/// Of the disk that is copied as it is, and of the one that is compressed.
const DENSE: usize = 512 << 20;
const WORDS: usize = 96 << 20;

/// A copy that is measured: with which options, and what is wanted of it.
struct Case {
    what: &'static str,
    /// Of both programs.
    options: &'static [&'static str],
    /// More of qemu-img's.
    theirs: &'static [&'static str],
    compresses: bool,
    from_qcow2: bool,
    /// How much faster than qemu-img.
    wanted: f64,
}

const PARALLEL: &[&str] = &["-W", "-m", "16"];

const CASES: [Case; 5] = [
    Case {
        what: "raw to qcow2",
        options: &["-f", "raw", "-O", "qcow2", "-W", "-m", "16"],
        theirs: &[],
        compresses: false,
        from_qcow2: false,
        wanted: 1.0,
    },
    Case {
        what: "qcow2 to raw",
        options: &["-f", "qcow2", "-O", "raw", "-W", "-m", "16"],
        theirs: &[],
        compresses: false,
        from_qcow2: true,
        wanted: 1.0,
    },
    Case {
        what: "compressed, zlib",
        options: &["-c", "-f", "raw", "-O", "qcow2"],
        theirs: PARALLEL,
        compresses: true,
        from_qcow2: false,
        wanted: 1.5,
    },
    Case {
        what: "compressed, zlib, qemu-img's default",
        options: &["-c", "-f", "raw", "-O", "qcow2"],
        theirs: &[],
        compresses: true,
        from_qcow2: false,
        wanted: 2.5,
    },
    Case {
        what: "compressed, zstd",
        options: &["-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd"],
        theirs: PARALLEL,
        compresses: true,
        from_qcow2: false,
        wanted: 1.0,
    },
];

/// The table and the targets of copies in `dir`.
pub fn convert(plan: &Plan, dir: &Path) -> Result<(String, Vec<Verdict>)> {
    let part = if plan.quick { 8 } else { 1 };
    let dense = Scratch::new(dir, "dense.raw")?;
    let words = Scratch::new(dir, "words.raw")?;
    let packed = Scratch::new(dir, "dense.qcow2")?;
    let mut state = 1;
    fill(&dense.0, DENSE / part, |block| {
        block.chunks_mut(8).for_each(|word| word.copy_from_slice(&next(&mut state).to_ne_bytes()));
    })?;
    fill(&words.0, WORDS / part, few_words)?;
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&dense.0), text(&packed.0)])?;
    let mut table = String::from(
        "| convert | vublk s | CPU s | qemu-img s | CPU s | speed ÷ | CPU ÷ | size ÷ |\n\
         |---|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    let mut verdicts = Vec::new();
    for case in &CASES {
        let source = match (case.compresses, case.from_qcow2) {
            (true, _) => &words.0,
            (_, true) => &packed.0,
            _ => &dense.0,
        };
        let copies = [Scratch::new(dir, "vublk.copy")?, Scratch::new(dir, "qemu.copy")?];
        let mut ours = Command::new(&plan.programs.vublk);
        ours.arg("convert").args(case.options).arg(source).arg(&copies[0].0);
        let mut theirs = Command::new("qemu-img");
        theirs.arg("convert").args(case.options).args(case.theirs).arg(source).arg(&copies[1].0);
        let (mut us, mut qemu) = (Vec::new(), Vec::new());
        for round in 0..plan.rounds {
            // Each comes first as often as the other.
            let mut turns =
                [(&mut ours, &copies[0], &mut us), (&mut theirs, &copies[1], &mut qemu)];
            if round % 2 == 1 {
                turns.reverse();
            }
            for (command, copy, all) in turns {
                let _ = std::fs::remove_file(&copy.0);
                all.push(used(command)?);
            }
        }
        let size = |copy: &Scratch| {
            let found = std::fs::metadata(&copy.0);
            found.map(|found| found.len() as f64).map_err(|e| Error::Io("a copy".into(), e))
        };
        let larger = size(&copies[0])? / size(&copies[1])?;
        let middle = |all: &[Used], figure: fn(&Used) -> f64| {
            median(all.iter().map(figure).collect()).unwrap_or(f64::NAN)
        };
        let [time, their_time] = [&us, &qemu].map(|all| middle(all, |u| u.seconds));
        let [cpu, their_cpu] = [&us, &qemu].map(|all| middle(all, |u| u.cpu_seconds));
        table += &format!(
            "| {} | {time:.2} | {cpu:.2} | {their_time:.2} | {their_cpu:.2} | {:.2} | {:.2} | {larger:.3} |\n",
            case.what,
            their_time / time,
            cpu / their_cpu,
        );
        let what = |figure: &str| format!("convert {}: {figure} ÷ qemu-img", case.what);
        let verdict = |what, value, limit, at_least| Verdict { what, value, limit, at_least };
        verdicts.push(verdict(what("speed"), their_time / time, case.wanted, true));
        if case.compresses {
            verdicts.push(verdict(what("size"), larger, 1.03, false));
        }
    }
    Ok((table, verdicts))
}

/// Makes a file of blocks that `make` fills.
fn fill(path: &Path, len: usize, mut make: impl FnMut(&mut [u8])) -> Result<()> {
    let io = |e| Error::Io(format!("{}", path.display()), e);
    let mut file = std::fs::File::create(path).map_err(io)?;
    let mut block = vec![0; 1 << 20];
    for _ in 0..len / block.len() {
        make(&mut block);
        file.write_all(&block).map_err(io)?;
    }
    Ok(())
}

/// Text of a few thousand words.
fn few_words(block: &mut [u8]) {
    let mut state = 7;
    let words: Vec<Vec<u8>> = (0..4000)
        .map(|_| {
            let len = 2 + next(&mut state) as usize % 7;
            (0..len).map(|_| b'a' + (next(&mut state) % 26) as u8).chain([b' ']).collect()
        })
        .collect();
    state = u64::from(block[0]) + 11;
    let mut at = 0;
    while at < block.len() {
        let word = &words[next(&mut state) as usize % words.len()];
        let n = word.len().min(block.len() - at);
        block[at..at + n].copy_from_slice(&word[..n]);
        at += n;
    }
}

/// The next number of a sequence that looks random (xorshift).
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state >> 3
}
