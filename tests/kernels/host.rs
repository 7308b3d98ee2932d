//! `move.cu` as a library of this process.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

use libloading::Library;
use refit_kernels::Table;
use refit_kernels::internal::{Launch, Placed, launches};
use refit_tests::moves::{ALIGN, Case};

/// How many threads there are, and how they share tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) blocks: u32,
    pub(crate) threads: u32,
    pub(crate) lanes: u32,
}

/// As in `shim.hpp`.
#[derive(Debug, Default)]
#[repr(C)]
struct Watch {
    source: [u64; 2],
    target: [u64; 2],
    misaligned: u64,
    outside: u64,
    stored: u64,
}

type Run = unsafe extern "C" fn(*const Launch, u32, u32, *mut Watch);

pub(crate) struct Kernel {
    run: Run,
    layout: Vec<usize>,
    /// Its thread numbers are global.
    turn: Mutex<()>,
}

impl Kernel {
    /// Compiles it once per process.
    pub(crate) fn get() -> &'static Self {
        static KERNEL: OnceLock<Kernel> = OnceLock::new();
        KERNEL.get_or_init(|| {
            let path = compile();
            // SAFETY: it has no initialisers.
            let library = unsafe { Library::new(&path) }.unwrap();
            std::fs::remove_file(&path).unwrap();
            // SAFETY: `host.cpp` declares it like this.
            let run = *unsafe { library.get::<Run>("run_launch") }.unwrap();
            // SAFETY: and this; it asserts the length.
            let layout = unsafe { library.get::<*const [usize; 32]>("LAYOUT") }.unwrap();
            // SAFETY: the address of a constant.
            let layout = unsafe { layout.read() }.to_vec();
            // Both pointers stay valid.
            std::mem::forget(library);
            Self { run, layout, turn: Mutex::new(()) }
        })
    }

    pub(crate) fn layout(&self) -> &[usize] {
        &self.layout
    }

    /// Runs a case over copies of both memories; returns the target, and how many bytes were stored.
    pub(crate) fn run(
        &self,
        case: &Case,
        shape: Shape,
        source: &[u8],
        target: &[u8],
    ) -> (Vec<u8>, u64) {
        let (source, mut target) = (Aligned::new(source), Aligned::new(target));
        // Every other table is given where its sources are when it is launched.
        let start = source.range()[0];
        let bases = [0, start].into_iter().cycle();
        let moves = case.placed(start, target.range()[0]);
        let tables: Vec<Table> = moves
            .into_iter()
            .zip(bases.clone())
            .map(|(mut moves, base)| {
                moves.iter_mut().for_each(|one| one.from -= base);
                Table::new(&moves).unwrap()
            })
            .collect();
        let placed: Vec<Placed> = tables
            .iter()
            .zip(bases)
            .map(|(table, base)| Placed {
                entries: table.entries().as_ptr().expose_provenance() as u64,
                owners: table.owners().as_ptr().expose_provenance() as u64,
                base,
                tiles: u32::try_from(table.owners().len()).unwrap(),
                start: 0,
            })
            .collect();
        let _turn = self.turn.lock().unwrap();
        let mut watch =
            Watch { source: source.range(), target: target.range(), ..Watch::default() };
        for launch in launches(&placed, shape.lanes) {
            // SAFETY: the launch points into `tables`; every load and store is checked against the two ranges, which
            // are memory of ours that nobody else uses.
            unsafe { (self.run)(&raw const launch, shape.blocks, shape.threads, &raw mut watch) };
        }
        assert_eq!((watch.misaligned, watch.outside), (0, 0), "misaligned, outside");
        (target.bytes_mut().to_vec(), watch.stored)
    }
}

/// Bytes that start at a multiple of [`ALIGN`], as device memory does.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(content: &[u8]) -> Self {
        let mut bytes = vec![0; content.len() + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        bytes[start..start + content.len()].copy_from_slice(content);
        Self { bytes, start, len: content.len() }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }

    /// From the first address to one past the last.
    fn range(&self) -> [u64; 2] {
        let start = (self.bytes.as_ptr().expose_provenance() + self.start) as u64;
        [start, start + self.len as u64]
    }
}

fn compile() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("refit-move-{}.so", std::process::id()));
    let output = Command::new("g++")
        .args(["-std=c++14", "-O2", "-ffp-contract=off", "-shared", "-fPIC"])
        .args(["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-I"])
        .arg(here.join("../crates/kernels/src"))
        .arg(here.join("kernels/host.cpp"))
        .arg("-o")
        .arg(&library)
        .output()
        .expect("this test needs g++ (Debian, Ubuntu: apt-get install g++)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}
