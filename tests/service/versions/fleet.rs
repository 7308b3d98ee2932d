//! Trainers and engines of one process, each with an agent of its own.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use refit::planner::{Band, Dtype, LayoutBuilder, Param, RankLayout};
use refit::transport::local::{LocalOptions, LocalTransport, Network};
use refit::{Source, TargetOptions};
use refit_service::keys::Model;
use refit_service::rank::{Direct, Shadow, Unattended};
use refit_service::reader::{Reader, ReaderOptions};
use refit_service::rendezvous::{InProcess, Key, Rendezvous};
use refit_service::source::{GroupRank, LiveSource, SourceOptions, Updating};
use refit_service::{Point, Seat};
use refit_tests::ranks;

pub(crate) type Local = LocalTransport;
pub(crate) type LocalSource = LiveSource<InProcess, Source<Local>>;

const ROWS: u64 = 60;
const COLS: u64 = 32;

/// Rows of one tensor, one share for each rank.
pub(crate) fn rows(rank: u32, ranks: u32) -> RankLayout {
    let mut layout = LayoutBuilder::new(rank);
    let tensor = layout.tensor("w", ROWS, COLS).unwrap();
    let share = ROWS / u64::from(ranks);
    let own = u64::from(rank) * share..(u64::from(rank) + 1) * share;
    let band = Band::new(tensor, own, 0..COLS);
    layout.param(Param::new("w", Dtype::Bf16, share, COLS).band(band)).unwrap();
    layout.build()
}

/// Every byte of a version. Neighbours differ.
pub(crate) fn byte(version: u64) -> u8 {
    u8::try_from(version * 37 % 251).unwrap()
}

/// A store, a network, and a model.
#[derive(Clone, Debug)]
pub(crate) struct Fleet {
    pub(crate) store: Arc<InProcess>,
    pub(crate) network: Network,
    pub(crate) model: Model,
    /// How many bytes move at a time.
    pub(crate) bytes_per_poll: u64,
}

impl Fleet {
    pub(crate) fn new() -> Self {
        Self {
            store: Arc::new(InProcess::new()),
            network: Network::new(),
            model: Model::new(Key::new(["job", "model"]).unwrap()),
            bytes_per_poll: 16 << 20,
        }
    }

    pub(crate) fn model(&self, name: &str) -> Self {
        Self { model: Model::new(Key::new(["job", name]).unwrap()), ..self.clone() }
    }

    pub(crate) fn slow(&self, bytes_per_poll: u64) -> Self {
        Self { bytes_per_poll, ..self.clone() }
    }

    pub(crate) fn seat(&self) -> Seat<InProcess> {
        let session = self.store.session(Duration::from_secs(1)).unwrap();
        Seat::new(self.store.clone(), Arc::new(session), self.model.clone())
    }

    pub(crate) fn agent(&self, name: &str) -> Arc<Local> {
        let options = LocalOptions::default().with_bytes_per_poll(self.bytes_per_poll);
        Arc::new(LocalTransport::with_options(&self.network, name, options).unwrap())
    }

    /// All ranks of a group, which offer nothing yet.
    pub(crate) fn group(&self, group: &str, size: u32, options: SourceOptions) -> Vec<LocalSource> {
        (0..size).map(|rank| self.rank(group, rank, size, options)).collect()
    }

    pub(crate) fn rank(
        &self,
        group: &str,
        rank: u32,
        size: u32,
        options: SourceOptions,
    ) -> LocalSource {
        let agent = self.agent(&format!("{group}-{rank}-{}", unique()));
        let source = ranks::source(&agent, &rows(rank, size));
        let place = GroupRank { group: group.to_owned(), rank, ranks: size };
        LiveSource::join(self.seat(), place, source, options, soon()).unwrap()
    }

    pub(crate) fn reader(&self, name: &str, options: ReaderOptions) -> Reader<InProcess> {
        Reader::new(self.seat(), name, unique().into(), options).unwrap()
    }

    /// A reader that says whether it is reading.
    pub(crate) fn watched(&self, reading: &Arc<AtomicBool>) -> Reader<InProcess> {
        let reading = reading.clone();
        let seat = self.seat().with_observer(Arc::new(move |point| match point {
            Point::Reading => reading.store(true, Ordering::SeqCst),
            Point::Read => reading.store(false, Ordering::SeqCst),
            _ => {}
        }));
        Reader::new(seat, "engine", unique().into(), ReaderOptions::default()).unwrap()
    }

    /// A target rank that reads in place.
    pub(crate) fn direct(&self, rank: u32, size: u32) -> Direct<Local, Unattended> {
        let agent = self.agent(&format!("engine-{}", unique()));
        let (target, _, _) = ranks::target(&agent, &rows(rank, size), TargetOptions::default());
        Direct::new(target, Unattended)
    }
}

/// A number that no other call of this process gets.
pub(crate) fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

pub(crate) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

pub(crate) fn millis(millis: u64) -> Instant {
    Instant::now() + Duration::from_millis(millis)
}

pub(crate) fn fanout(most: u32) -> ReaderOptions {
    ReaderOptions::default().with_fanout(NonZeroU32::new(most).unwrap())
}

/// Writes a version, in pieces, so that a reader may come in between.
pub(crate) fn write(updating: &mut Updating<'_, InProcess, Source<Local>>, version: u64) {
    let mut changing = updating.source_mut().begin_update().unwrap();
    for (_, memory) in changing.params_mut() {
        for piece in memory.host_bytes_mut().unwrap().chunks_mut(256) {
            piece.fill(byte(version));
            std::thread::yield_now();
        }
    }
}

/// All ranks of a group go on to a version.
pub(crate) fn commit(group: &mut [LocalSource], version: u64) {
    for source in group.iter_mut() {
        let mut updating = source.begin_update(soon()).unwrap();
        write(&mut updating, version);
        updating.commit(version).unwrap();
    }
}

/// Whether every byte of a target is of this version.
pub(crate) fn is_whole(target: &Direct<Local, Unattended>, version: u64) -> bool {
    let mut params = target.params().unwrap();
    params.all(|(_, memory)| memory.host_bytes().unwrap().iter().all(|&it| it == byte(version)))
}

/// A rank whose live parameters are apart from those it reads into.
pub(crate) fn live_is_whole(
    shadow: &Shadow<Local, impl refit_service::rank::Engine>,
    version: u64,
) -> bool {
    shadow
        .params()
        .flat_map(|(_, memory)| memory.host_bytes().unwrap())
        .all(|&found| found == byte(version))
}
