//! How fast the kernel moves bytes, on a machine with one GPU or more, beside a copy by the driver:
//! `cargo run --release -p refit-kernels --example rates`.
//!
//! Several shapes and cache hints are tried over a few cases, then the best of each path over all of them. With a second
//! GPU the same is done with sources on that one. `REFIT_RATES_GIB` sets the bytes moved by a case, 4 GiB as a rule.

#![allow(clippy::print_stdout, reason = "that is what it is for")]

use std::error::Error;
use std::sync::Arc;

use cudarc::driver::{result, sys};
use refit_kernels::internal::PTX;
use refit_kernels::{Effect, Move, Mover, Resident, Shape, Table};
use refit_planner::{Dim, Dims, Dtype, Transform};
use refit_pool::cuda::{CudaAllocator, Device, Driver, Stream, set};
use refit_pool::{Allocator, Memory};

type Outcome<T> = Result<T, Box<dyn Error>>;

const COPY: Effect = Effect::Transform(Transform::Copy);
const NARROW: Effect = Effect::Transform(Transform::Cast { from: Dtype::F32, to: Dtype::Bf16 });
const WIDEN: Effect = Effect::Transform(Transform::Cast { from: Dtype::Bf16, to: Dtype::F32 });

/// Timed launches of which the median counts, after two that do not.
const ROUNDS: usize = 10;

/// What is moved: tables, and the bytes read and written.
struct Case {
    name: String,
    tables: Vec<Vec<Move>>,
    read: u64,
    written: u64,
}

/// The modifiers of loads and of stores.
#[derive(Clone, Copy)]
struct Hints {
    load: &'static str,
    store: &'static str,
}

const HINTS: [Hints; 6] = [
    Hints { load: ".cs", store: ".cs" },
    Hints { load: "", store: "" },
    Hints { load: "", store: ".cs" },
    Hints { load: ".L1::no_allocate", store: ".cs" },
    Hints { load: ".L1::no_allocate", store: ".L1::no_allocate" },
    Hints { load: ".nc.L1::no_allocate", store: ".L1::no_allocate" },
];

/// Where a path starts and ends.
struct Path<'a> {
    name: &'static str,
    target: &'a Device,
    source: Memory,
    into: Memory,
    /// Bytes that a case moves.
    bytes: u64,
    /// Bytes moved in a second by a copy of the driver's.
    driver: f64,
}

fn main() -> Outcome<()> {
    let driver = Driver::load()?;
    let devices = (0..driver.device_count()?).map(|ordinal| Device::primary(driver, ordinal));
    let devices = devices.collect::<Result<Vec<_>, _>>()?;
    let gib = std::env::var("REFIT_RATES_GIB").ok().map_or(Ok(4), |gib| gib.parse::<u64>())?;
    let target = devices.first().ok_or("there is no device")?;
    println!("{}, driver for CUDA {}", target.name(), driver.version());
    measure("local", target, target, gib << 30)?;
    if let Some(source) = devices.get(1) {
        println!("peer: {}", source.name());
        target.enable_access(source)?;
        measure("peer", source, target, gib << 30)?;
    }
    Ok(())
}

fn measure(name: &'static str, source: &Device, target: &Device, bytes: u64) -> Outcome<()> {
    // Rows lie twice as far apart in the source.
    let mut from = CudaAllocator::new(source.clone()).allocate(usize::try_from(2 * bytes)?)?;
    let mut into = CudaAllocator::new(target.clone()).allocate(usize::try_from(bytes)?)?;
    set(source, &mut from, 0x3D)?;
    set(target, &mut into, 0)?;
    let mut path = Path { name, target, source: from, into, bytes, driver: 0.0 };
    let stream = Stream::new(target)?;
    let (to, of) = (path.into.address(), path.source.address());
    let size = usize::try_from(bytes)?;
    let seconds = median(&stream, || {
        // SAFETY: both have the bytes, the stream is current.
        Ok(unsafe { result::memcpy_dtod_async(to, of, size, stream.raw().cast()) }?)
    })?;
    path.driver = rate(bytes, seconds);
    println!("{name}: copy by the driver: {:.1} GB/s", path.driver / 1e9);
    let mut best = (0.0, Shape::default());
    for (blocks, threads) in [(1, 256), (2, 256), (3, 256), (2, 128), (4, 128), (6, 128)] {
        for lanes in [32, 64, 128, 256].into_iter().filter(|lanes| *lanes <= threads) {
            let shape = Shape { blocks, threads, lanes };
            let score = path.score(&stream, shape, HINTS[0])?;
            if score > best.0 {
                best = (score, shape);
            }
        }
    }
    let (_, shape) = best;
    let mut best = (0.0, HINTS[0]);
    for hints in HINTS {
        let score = path.score(&stream, shape, hints)?;
        if score > best.0 {
            best = (score, hints);
        }
    }
    println!("{name}: the best shape and hints");
    let mover = mover(target, shape, best.1)?;
    for case in path.cases() {
        path.run(&mover, &stream, &case, shape, best.1)?;
    }
    Ok(())
}

impl Path<'_> {
    /// The smallest share of the driver's rate over a few cases.
    fn score(&self, stream: &Stream, shape: Shape, hints: Hints) -> Outcome<f64> {
        let mover = mover(self.target, shape, hints)?;
        let mut least = f64::INFINITY;
        for case in [self.whole(), self.rows(512), self.rows(4096)] {
            least = least.min(self.run(&mover, stream, &case, shape, hints)?);
        }
        Ok(least)
    }

    /// Prints the rate of a case; returns its share of the driver's.
    fn run(
        &self,
        mover: &Mover,
        stream: &Stream,
        case: &Case,
        shape: Shape,
        hints: Hints,
    ) -> Outcome<f64> {
        let tables = case.tables.iter().map(|moves| mover.upload(&Table::new(moves)?));
        let tables = tables.collect::<Result<Vec<Resident>, _>>()?;
        let tables: Vec<&Resident> = tables.iter().collect();
        let seconds = median(stream, || {
            // SAFETY: every case stays inside both memories; `median` waits for the stream.
            Ok(unsafe { mover.launch(&tables, stream) }?)
        })?;
        // Half of what is read and written together: what a copy moves.
        let moved = rate(case.read + case.written, seconds) / 2.0;
        println!(
            "{:<5} {:<22} {:>7.1} GB/s {:>6.3} of the driver's  blocks {} threads {} lanes {:<3} ld{} st{}",
            self.name,
            case.name,
            moved / 1e9,
            moved / self.driver,
            shape.blocks,
            shape.threads,
            shape.lanes,
            hints.load,
            hints.store,
        );
        Ok(moved / self.driver)
    }

    fn cases(&self) -> Vec<Case> {
        let mut cases = vec![self.whole(), self.split(8), self.small(8 << 10)];
        cases.extend([512, 1024, 4096, 65_536].map(|run| self.rows(run)));
        cases.push(self.elements("f32 to bf16", NARROW, self.bytes, self.bytes / 2));
        cases.push(self.elements("bf16 to f32", WIDEN, self.bytes / 2, self.bytes));
        let zero = self.elements("zeros", Effect::Zero, self.bytes, self.bytes);
        cases.push(Case { read: 0, ..zero });
        cases
    }

    fn one(&self, at: u64, run: u64, dims: Dims, effect: Effect) -> Move {
        Move { from: self.source.address() + at, into: self.into.address() + at, run, dims, effect }
    }

    fn whole(&self) -> Case {
        self.elements("one run", COPY, self.bytes, self.bytes)
    }

    fn elements(&self, name: &str, effect: Effect, read: u64, written: u64) -> Case {
        let one = self.one(0, read, Dims::none(), effect);
        Case { name: name.to_owned(), tables: vec![vec![one]], read, written }
    }

    fn split(&self, tables: u64) -> Case {
        let part = self.bytes / tables;
        let table = |index| vec![self.one(index * part, part, Dims::none(), COPY)];
        Case {
            name: format!("{tables} tables"),
            tables: (0..tables).map(table).collect(),
            read: self.bytes,
            written: self.bytes,
        }
    }

    fn small(&self, run: u64) -> Case {
        let moves = (0..self.bytes / run).map(|at| self.one(at * run, run, Dims::none(), COPY));
        Case {
            name: format!("moves of {run} B"),
            tables: vec![moves.collect()],
            read: self.bytes,
            written: self.bytes,
        }
    }

    fn rows(&self, run: u64) -> Case {
        let dim = Dim { count: self.bytes / run, source_stride: 2 * run, target_stride: run };
        Case {
            name: format!("rows of {run} B"),
            tables: vec![vec![self.one(0, run, Dims::one(dim), COPY)]],
            read: self.bytes,
            written: self.bytes,
        }
    }
}

/// The kernel in this shape, with other hints than it was compiled with.
fn mover(device: &Device, shape: Shape, hints: Hints) -> Outcome<Arc<Mover>> {
    let ptx = PTX
        .replace("ld.global.cs.", &format!("ld.global{}.", hints.load))
        .replace("st.global.cs.", &format!("st.global{}.", hints.store));
    Ok(Mover::with(device, shape, &ptx)?)
}

#[allow(clippy::cast_precision_loss, reason = "a rate needs no more digits")]
fn rate(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / seconds
}

/// Seconds that the device takes for what `work` queues.
fn median(stream: &Stream, mut work: impl FnMut() -> Outcome<()>) -> Outcome<f64> {
    let _entered = stream.device().enter()?;
    let raw: sys::CUstream = stream.raw().cast();
    let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT);
    let (start, end) = (event()?, event()?);
    let mut times = Vec::with_capacity(ROUNDS);
    for round in 0..ROUNDS + 2 {
        // SAFETY: events and stream are of the current device.
        unsafe { result::event::record(start, raw) }?;
        work()?;
        // SAFETY: as above.
        unsafe { result::event::record(end, raw) }?;
        stream.synchronize()?;
        // SAFETY: both are recorded, and what they mark is done.
        let milliseconds = unsafe { result::event::elapsed(start, end) }?;
        if round >= 2 {
            times.push(f64::from(milliseconds) / 1e3);
        }
    }
    for event in [start, end] {
        // SAFETY: made above and used no more.
        unsafe { result::event::destroy(event) }?;
    }
    times.sort_by(f64::total_cmp);
    Ok((times[(ROUNDS - 1) / 2] + times[ROUNDS / 2]) / 2.0)
}
