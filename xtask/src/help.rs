//! Help texts.

/// Every task, in the order of the overview.
pub(crate) const NAMES: [&str; 16] = [
    "bench",
    "test",
    "refit",
    "setup",
    "criterion",
    "chart",
    "bundle",
    "ptx",
    "python",
    "e2e",
    "loom",
    "valgrind",
    "tsan",
    "chaos",
    "tidy",
    "ci",
];

/// `cargo xtask --help`.
pub(crate) const MAIN: &str = "\
cargo xtask TASK [ARGS]

Tasks:
  bench      refit a model over NIXL on this machine and print the table
  test       run every test, those over NIXL and in etcd included
  refit      run the `refit` command, built for release
  setup      fetch what NIXL and etcd need; bench, test and refit do this themselves
  criterion  run the micro-benches
  chart      draw what benches wrote
  bundle     pack the command and NIXL for a host without internet
  ptx        compile the CUDA kernel to PTX, after a change of it
  python     build the Python package and test it
  e2e        refit a real vLLM engine from real Megatron-Core ranks, and compare its tokens
  loom       run the pool's locks in every order
  valgrind   run the tests of memory under valgrind
  tsan       run the tests of threads under ThreadSanitizer
  chaos      kill, stop and restart processes over NIXL, and count what does not hold
  tidy       check the rules of the house that no compiler checks
  ci         run what CI runs

`cargo xtask TASK --help` says more about one.
";

/// The help of one task.
pub(crate) fn of(name: &str) -> Option<&'static str> {
    Some(match name {
        "bench" => BENCH,
        "test" => TEST,
        "refit" => REFIT,
        "setup" => SETUP,
        "criterion" => CRITERION,
        "chart" => CHART,
        "bundle" => BUNDLE,
        "ptx" => PTX,
        "python" => PYTHON,
        "e2e" => E2E,
        "loom" => LOOM,
        "valgrind" => VALGRIND,
        "tsan" => TSAN,
        "chaos" => CHAOS,
        "tidy" => TIDY,
        "ci" => CI,
        _ => return None,
    })
}

const BENCH: &str = "\
cargo xtask bench [ARGS]

Sets up what is missing, builds the `refit` command for release and runs `refit bench ARGS` over NIXL.
Where NIXL is not to be had, says so and benches the in-process transport instead.

`cargo xtask bench -- --help` lists the ARGS.
";

const TEST: &str = "\
cargo xtask test [ARGS]

Sets up what is missing and runs `cargo test ARGS` with the features of NIXL and etcd on.
Where NIXL or etcd is not to be had, says so and runs the other tests.
With REFIT_REQUIRE_NIXL=1 or REFIT_REQUIRE_ETCD=1 in the environment that is an error instead.
Tests that need a GPU are built everywhere, and count as skipped where there is none; REFIT_REQUIRE_CUDA=2 makes those
fail that two GPUs are enough for.

Examples:
  cargo xtask test
  cargo xtask test -p refit-planner
  cargo xtask test -- --nocapture
";

const REFIT: &str = "\
cargo xtask refit [--] ARGS

Sets up what is missing, builds the `refit` command for release and runs it with ARGS.

Example:
  cargo xtask refit -- --help
";

const SETUP: &str = "\
cargo xtask setup

Fetches, with pip and into target/setup only:
  libclang   to build nixl-sys
  nixl       the library that nixl-sys loads at run time
  protoc     to build etcd-client
  etcd       the server that tests start
Needs Linux on x86_64 or aarch64, python3 with pip, and g++ 10 or later. Does nothing when all is there.

Set LIBCLANG_PATH, REFIT_NIXL_LIBRARY, PROTOC or REFIT_ETCD to use your own; that part is not fetched then.
Delete target/setup to start again.
";

const CRITERION: &str = "\
cargo xtask criterion [ARGS]

Runs `cargo bench -p refit-benches ARGS`.

Example:
  cargo xtask criterion -- plan
";

const CHART: &str = "\
cargo xtask chart FILE... --out FILE.svg

Runs `refit chart`, built without NIXL: draws what `refit bench --json` and benches/peers/gpu.py wrote.

Example:
  cargo xtask chart docs/bench/qwen3-4b-host-nixl.json --out docs/bench/qwen3-4b-host-nixl.svg
";

const BUNDLE: &str = "\
cargo xtask bundle [--out FILE] [--features LIST] [--tests]

Packs one tarball, at most 60 MB, that runs on Ubuntu 24.04 or later without internet, Rust or NIXL: `refit` built
for release, NIXL with UCX from the pinned wheel, the CUDA 12 runtime that UCX needs (drivers for CUDA 12 and 13 both
carry it), and all licences. Then unpacks it and replays a golden case with an empty environment.

  --out FILE       what to write, .tar.gz or .tar.xz (default: target/refit-VERSION-linux-ARCH.tar.gz)
  --features LIST  what `refit` and the tests are built with
  --tests          take the tests with their golden data along, and the scripts of benches/peers

Example:
  cargo xtask bundle --tests
  tar -xf refit-*.tar.gz && refit-*/refit bench        # on the host
";

const PTX: &str = "\
cargo xtask ptx [--check]

Compiles crates/kernels/src/move.cu to the move.ptx beside it, with a pinned NVRTC that is fetched with pip into
target/setup. Only after a change of move.cu; nobody else needs it. Needs Linux on x86_64, and no GPU.

  --check  write nothing, and fail if the PTX would change
";

const PYTHON: &str = "\
cargo xtask python [--] [ARGS]

Sets up what is missing, builds the wheel of the Python package `refit-rl` with assertions on, installs it into a Python of
its own in target/setup and runs `pytest ARGS` in python/tests; over real NIXL, in processes of their own. Needs Python 3.10 or
later. `pip install .` builds the wheel for release.

Example:
  cargo xtask python -- -k two_processes
";

const E2E: &str = "\
cargo xtask e2e [--] [--case NAME]... [--json FILE] [--keep FOLDER]

Starts ranks of real Megatron-Core trainers and a real vLLM engine as processes of this machine, without a GPU, over real
NIXL; trains tiny models for three versions, refits the engine behind each, and fails when its greedy tokens are not those of
Hugging Face's transformers on the same weights, or are still those of the version before. Unless cases are chosen, tests
of the publisher with real Megatron-Core ranks, of the backend in real engines and of the examples run first.

Fetches what it needs with pip into target/setup: 3 GB, 6 GB unpacked. Needs Python 3.12 (REFIT_E2E_PYTHON names one),
16 GB of memory, and an hour on two cores, of which the cases take a quarter.

Example:
  cargo xtask e2e -- --json docs/bench/e2e.json
  cargo xtask e2e -- --case qwen3-moe
";

const LOOM: &str = "\
cargo xtask loom

Runs the models of the pool's locks under loom: every order in which two or three threads can take them, within three
preemptions. Builds into target/loom, because everything is built with `--cfg loom`; half a minute the first time.
";

const VALGRIND: &str = "\
cargo xtask valgrind [PROGRAM]...

Builds the tests that use the host's memory and the in-process transport, and runs them under valgrind's memcheck: all, or
those of the PROGRAMs. Prints what was found in each, and fails if that is anything or a test fails. Needs valgrind.

Example:
  cargo xtask valgrind crates/pool pull
";

const TSAN: &str = "\
cargo xtask tsan [PROGRAM]...

Builds the tests in which threads share something for ThreadSanitizer, and runs them: all, or those of the PROGRAMs. Prints
what was found in each, and fails if that is anything or a test fails. Needs nightly Rust, and builds into target/tsan.

Example:
  cargo xtask tsan crates/service pool_behaviour
";

const CHAOS: &str = "\
cargo xtask chaos [--trials N] [--schedules N] [--flat N] [--neighbours N] [--lane cma|tcp|both] [--seed S] [--json FILE]

Starts source and target processes that meet in a directory and refit over real NIXL, each element known from its version;
kills, stops and restarts them at random and at the named points of the protocol; and fails when bytes of two versions were
installed, an answer did not come, a process ended that was let live, or something grew. Both lanes at a time, a quarter
of an hour as it comes and an hour at most; `--trials 40 --schedules 0 --flat 0 --neighbours 0` takes half a minute. Built as
the tests are, with assertions and overflow checks. NIXL is required.

`cargo xtask chaos -- --help` says more. docs/promises.md has what was measured.
";

const TIDY: &str = "\
cargo xtask tidy

Checks the rules of the house that no compiler checks: what the pure crates may depend on, where `unsafe` may
stand, features, leftovers, file sizes, paths of one machine, and that the PTX belongs to the kernel's source. Prints every finding, with advice.
";

const CI: &str = "\
cargo xtask ci [--no-test]

Runs what CI runs: formatting, tidy, clippy, docs, then the tests, those of the Python package too. NIXL and etcd are required.
A step that fails does not keep the next from running.

  --no-test  only the checks
";
