//! `ringblk-fuzz`: mutates small seeds and runs the parsers of image formats on them, in this process.
//!
//! `cargo run --release -p ringblk-fuzz -- qcow2-header --executions 1000000 --seed 1`. An input is known by its seed and
//! number: `--only N` runs that one again. Each execution has a memory limit, measured by a counting allocator. With
//! `--oracle N` every N-th image is shown to `qemu-img check` as well: nothing QEMU calls corrupt may look clean here.

mod image;
mod memory;
mod mutate;
mod oracle;
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, ValueEnum};

use mutate::Random;
use targets::{CheckTarget, HeaderTarget, LuksTarget, TablesTarget, Target};

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Name {
    Qcow2Header,
    Qcow2Tables,
    Qcow2Check,
    LuksHeader,
}

/// Fuzzes a parser in this process.
#[derive(Debug, Parser)]
struct Arguments {
    /// What to run.
    target: Name,
    /// How many inputs.
    #[arg(long, default_value_t = 100_000)]
    executions: u64,
    /// Where the stream of inputs begins.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run this input alone.
    #[arg(long)]
    only: Option<u64>,
    /// A folder of further seeds.
    #[arg(long)]
    corpus: Option<PathBuf>,
    /// Show every N-th image to qemu-img; 0: none.
    #[arg(long, default_value_t = 0)]
    oracle: u64,
}

fn corpus(folder: Option<&PathBuf>) -> std::io::Result<Vec<Vec<u8>>> {
    let Some(folder) = folder else { return Ok(Vec::new()) };
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)?.filter_map(|e| Some(e.ok()?.path())).collect();
    paths.sort();
    paths.iter().filter(|p| p.is_file()).map(std::fs::read).collect()
}

/// The memory an input took, bytes, and how the oracle differs.
type Execution = (usize, Option<String>);

/// Runs input `n`; the error text says what is wrong with it.
fn execute(target: &mut dyn Target, seed: u64, n: u64, oracle: u64) -> Result<Execution, String> {
    let mut random = Random::new(seed, n);
    let before = memory::start();
    let done = catch_unwind(AssertUnwindSafe(|| target.run(&mut random)));
    let peak = memory::peak(before);
    let (image, verdict) = done.map_err(|_| "panicked".to_owned())?;
    verdict?;
    if peak > target.memory() {
        return Err(format!("took {peak} bytes, {} are allowed", target.memory()));
    }
    match image {
        Some(image) if oracle != 0 && n.is_multiple_of(oracle) => Ok((peak, oracle::compare(&image).err())),
        _ => Ok((peak, None)),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seeds = match corpus(arguments.corpus.as_ref()) {
        Ok(seeds) => seeds,
        Err(e) => {
            eprintln!("ringblk-fuzz: cannot read the corpus: {e}");
            return ExitCode::from(2);
        }
    };
    let mut target: Box<dyn Target> = match arguments.target {
        Name::Qcow2Header => Box::new(HeaderTarget::new(seeds)),
        Name::Qcow2Tables => Box::new(TablesTarget::new()),
        Name::Qcow2Check => Box::new(CheckTarget::new(seeds)),
        Name::LuksHeader => Box::new(LuksTarget::new()),
    };
    let (first, last) = match arguments.only {
        Some(n) => (n, n + 1),
        None => (0, arguments.executions),
    };
    let started = Instant::now();
    let (mut highest, mut differences) = (0, 0);
    for n in first..last {
        match execute(target.as_mut(), arguments.seed, n, arguments.oracle) {
            Ok((peak, difference)) => {
                highest = highest.max(peak);
                if let Some(what) = difference {
                    differences += 1;
                    eprintln!("{:?} --seed {} --only {n}: {what}", arguments.target, arguments.seed);
                }
            }
            Err(what) => {
                eprintln!("{:?} --seed {} --only {n}: {what}", arguments.target, arguments.seed);
                return ExitCode::FAILURE;
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    eprintln!(
        "{:?}: {} executions in {seconds:.1} s, at most {highest} bytes each",
        arguments.target,
        last - first
    );
    if arguments.oracle != 0 {
        eprintln!("{differences} differences from the oracle");
    }
    if differences == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
