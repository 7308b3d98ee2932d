//! A trainer in another process that rewrites its parameters while they are read.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use refit::planner::{Band, Dtype, LayoutBuilder, LowerOptions, Mode, Param, RankLayout};
use refit::{Failed, Publication, RefitError, TargetOptions, Unfinished};
use refit_tests::link::{Link, answer, hex, unhex};
use refit_tests::ranks;
use refit_transport::Transport;
use refit_transport::conformance::Harness;

use crate::Nixl;
use crate::isolated::{Guarded, command, current};

const ROLE: &str = "REFIT_NIXL_TRAINER";

/// Enough bytes that a change falls into a read.
const BYTES: u64 = 8 << 20;

fn layout() -> RankLayout {
    let mut layout = LayoutBuilder::new(0);
    let tensor = layout.tensor("w", BYTES, 1).unwrap();
    let band = Band::new(tensor, 0..BYTES, 0..1);
    layout.param(Param::new("w", Dtype::U8, BYTES, 1).band(band)).unwrap();
    layout.build()
}

/// What every byte of a version is.
fn byte(version: u64) -> u8 {
    u8::try_from(version % 251).unwrap()
}

/// Commits version after version, with pauses of all lengths, until the input ends.
fn train() {
    let transport = Arc::new(Nixl.agent("trainer").unwrap());
    let mut source = ranks::source(&transport, &layout());
    let mut commit = |version: u64| {
        let mut updating = source.begin_update().unwrap();
        for (_, memory) in updating.params_mut() {
            memory.host_bytes_mut().unwrap().fill(byte(version));
        }
        updating.commit(version).unwrap();
        source.publication().unwrap()
    };
    answer(&hex(&commit(1).encode()));
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::io::stdin().lines().for_each(drop);
            ended.store(true, Ordering::Relaxed);
        });
        let mut version = 1;
        while !ended.load(Ordering::Relaxed) {
            version += 1;
            drop(commit(version));
            std::thread::sleep(Duration::from_micros(version * 7_919 % 12_000));
        }
    });
}

/// Pulls for some seconds from a trainer that does not wait for anybody.
pub(crate) fn rewritten_while_pulled() {
    if std::env::var_os(ROLE).is_some() {
        return train();
    }
    let mut child = command(&current(), &[(ROLE, "1")]);
    let mut child = Guarded(child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let mut link = Link::of(&mut child.0);
    let published = [Publication::decode(&unhex(&link.reply())).unwrap()];
    for mode in [Mode::Direct, Mode::Staged] {
        let engine = Arc::new(Nixl.agent("engine").unwrap());
        let options = TargetOptions::default().with_lower(LowerOptions::default().with_mode(mode));
        let (mut target, _, canaries) = ranks::target(&engine, &layout(), options);
        let (mut whole, mut torn) = (0, 0);
        let until = Instant::now() + Duration::from_secs(6);
        while Instant::now() < until && (whole < 40 || torn < 40) {
            let before = ranks::held(&target);
            let pulling = target.prepare(&published).unwrap().pull().unwrap();
            target = match pulling.wait(ranks::soon()) {
                Ok(pulled) => {
                    let (target, report) = pulled.land().unwrap().install().refreshed();
                    let wanted = byte(report.version.unwrap());
                    assert!(ranks::held(&target)["w"].iter().all(|held| *held == wanted));
                    whole += 1;
                    target
                }
                Err(Failed { error: RefitError::Torn { rank: 0, .. }, state }) => {
                    torn += 1;
                    match state {
                        Unfinished::Whole(target) => {
                            assert!(ranks::held(&target) == before, "a torn pull was installed");
                            target
                        }
                        // What it holds is nobody's to say; the next pull makes it whole.
                        Unfinished::Invalid(target) => {
                            assert_eq!(mode, Mode::Direct);
                            target.reloaded()
                        }
                        state => panic!("{state:?}"),
                    }
                }
                Err(failed) => panic!("{}", failed.error),
            };
        }
        println!("{mode:?}: {whole} pulls were whole, {torn} torn");
        assert!(whole > 0 && torn > 0, "{mode:?}: {whole} whole, {torn} torn");
        assert_eq!(engine.backend(), "nixl");
        canaries.check();
    }
}
