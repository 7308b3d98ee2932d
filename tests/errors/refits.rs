//! Refits that go wrong on the way.

use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use refit::planner::{Band, Dtype, LayoutBuilder, Param, RankLayout};
use refit::transport::local::{LocalOptions, LocalTransport, Network};
use refit::transport::{Cause, TransportError};
use refit::{Publication, RefitError, Source, Target, TargetOptions};
use refit_tests::ranks;

use super::{Said, said};

type Local = LocalTransport;

/// 128 bytes.
fn layout() -> RankLayout {
    let mut layout = LayoutBuilder::new(0);
    let tensor = layout.tensor("t", 16, 4).unwrap();
    let band = Band::new(tensor, 0..16, 0..4);
    layout.param(Param::new("w", Dtype::Bf16, 16, 4).band(band)).unwrap();
    layout.build()
}

/// A trainer, and an engine that moves so many bytes whenever it looks.
struct World {
    trainer: Arc<Local>,
    source: Source<Local>,
    published: [Publication; 1],
    target: Target<Local>,
}

fn world(bytes_per_poll: u64) -> World {
    let network = Network::new();
    let trainer = ranks::agent(&network, "trainer");
    let options = LocalOptions::default().with_bytes_per_poll(bytes_per_poll);
    let engine = Arc::new(LocalTransport::with_options(&network, "engine", options).unwrap());
    let source = ranks::source(&trainer, &layout());
    let published = [source.publication().unwrap()];
    let (target, _, _) = ranks::target(&engine, &layout(), TargetOptions::default());
    World { trainer, source, published, target }
}

pub(super) fn torn() -> Said {
    let World { mut source, published, target, .. } = world(1);
    let pulling = target.prepare(&published).unwrap().pull().unwrap();
    drop(source.begin_update().unwrap());
    said!(pulling.wait(ranks::soon()).unwrap_err().error, RefitError::Torn { .. })
}

pub(super) fn restarted() -> Said {
    let World { trainer, source, target, .. } = world(1_000);
    let announced = source.offered().unwrap();
    drop(source);
    let next = [ranks::source(&trainer, &layout()).publication().unwrap()];
    let refused = target.prepare(&next).unwrap().expecting(&[announced]).unwrap_err();
    said!(refused.error, RefitError::StaleIncarnation { .. })
}

pub(super) fn died() -> Said {
    let World { trainer, source, published, target } = world(1);
    let mut pulling = target.prepare(&published).unwrap().pull().unwrap();
    pulling.poll();
    drop((source, trainer));
    let error = pulling.wait(ranks::soon()).unwrap_err().error;
    said!(error, RefitError::Transport(TransportError::Failed { cause: Cause::PeerGone, .. }))
}

pub(super) fn silent() -> Said {
    // Its source is kept until the error has been said.
    let World { source, published, target, .. } = world(1);
    let pulling = target.prepare(&published).unwrap().pull().unwrap();
    let past = Instant::now().checked_sub(Duration::from_secs(1)).unwrap();
    let failed = pulling.wait(past).unwrap_err();
    let said = said!(failed.error, RefitError::Deadline { .. });
    drop((failed.state, source));
    said
}

pub(super) fn corrupt() -> Said {
    let World { source, published, target, .. } = world(1_000);
    let (address, len) =
        target.params().map(|(_, held)| (held.address(), held.len())).next().unwrap();
    let prepared = target.prepare(&published).unwrap();
    let answers = [source.digests(&prepared.digest_request()).unwrap()];
    let landed = prepared.pull().unwrap().wait(ranks::soon()).unwrap().land().unwrap();
    let byte = ptr::with_exposed_provenance_mut::<u8>(usize::try_from(address).unwrap() + len / 2);
    // SAFETY: the parameter is allocated for as long as the target is there, and nothing else uses it between landing
    // and verifying.
    unsafe { *byte ^= 4 };
    said!(landed.verify(&answers).unwrap_err().error, RefitError::Corrupt { .. })
}
