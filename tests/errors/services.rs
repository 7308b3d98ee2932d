//! Workers, groups and replicas.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use refit::TargetOptions;
use refit::pool::Memory;
use refit::translate::PostAction;
use refit_service::groups::Withheld;
use refit_service::rank::{Direct, Engine, EngineError, RankError, Shadow, Unattended};
use refit_service::reader::{Attempt, ReaderOptions, RefreshError, Wanted};
use refit_service::replica::{Replica, ReplicaError, ReplicaRank};
use refit_service::source::{SourceError, SourceOptions};
use refit_service::worker::{Agent, Standing, Worker, WorkerError, WorkerOptions};
use refit_tests::ranks;

use super::fleet::{Fleet, commit, millis, rows, soon, unique};
use super::{Said, said};

struct Idle;

impl Agent for Idle {
    fn name(&self) -> String {
        "engine-0".to_owned()
    }

    fn poll(&mut self) -> Standing {
        Standing::Quiet
    }

    fn bytes(&self) -> u64 {
        0
    }
}

fn worker() -> Worker<Idle> {
    Worker::start("puller", WorkerOptions::default(), soon(), |_| Ok(Idle)).unwrap()
}

pub(super) fn busy() -> Said {
    let worker = worker();
    let (go_on, wait) = mpsc::channel::<()>();
    let (began, begins) = mpsc::channel::<()>();
    let error = std::thread::scope(|scope| {
        let worker = &worker;
        scope.spawn(move || {
            worker.call("post", soon(), move |_, _| {
                began.send(()).unwrap();
                wait.recv().unwrap();
            })
        });
        begins.recv().unwrap();
        let late = Instant::now() + Duration::from_millis(20);
        let error = worker.call("pull", late, |_, _| ()).unwrap_err();
        go_on.send(()).unwrap();
        error
    });
    said!(error, WorkerError::Busy { .. })
}

pub(super) fn panicked() -> Said {
    let error = worker().call("pull", soon(), |_, _| panic!("out of cheese")).unwrap_err();
    said!(error, WorkerError::Panicked { .. })
}

pub(super) fn incomplete() -> Said {
    let fleet = Fleet::new();
    let mut trainer = [fleet.rank("trainer", 0, 2, SourceOptions::default())];
    commit(&mut trainer, 1);
    let mut reader = fleet.reader("engine", ReaderOptions::default());
    let error =
        reader.refresh(&mut fleet.direct(0, 1), &Wanted::at_least(1), millis(20)).unwrap_err();
    let RefreshError { withheld, .. } = &*error;
    let why = withheld["trainer"].clone();
    let Said { kind, .. } = said!(why, Withheld::Incomplete { .. });
    Said { kind, text: error.to_string() }
}

pub(super) fn half() -> Said {
    let fleet = Fleet::new();
    let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
    commit(&mut trainer, 1);
    let mut replica: Vec<_> = (0..2)
        .map(|rank| {
            let agent = fleet.agent(&format!("shadow-{rank}"));
            let layout = rows(rank, 2);
            let (target, _, _) = ranks::target(&agent, &layout, TargetOptions::default());
            let (live, _) = ranks::memory(&layout);
            let shadow = Shadow::new(target, live, Vec::new(), Unattended).unwrap();
            let place = ReplicaRank { replica: "engine".to_owned(), rank, ranks: 2 };
            let reader = fleet.reader("engine", ReaderOptions::default());
            let (life, fresh) = (unique().into(), Duration::from_secs(1));
            Replica::join(fleet.seat(), place, life, reader, shadow, fresh, soon()).unwrap()
        })
        .collect();
    // The other one is not told. Until it has staged the version, however busy the machine is.
    let tried =
        (0..8).map(|doublings| replica[0].refresh(1, millis(100 << doublings)).unwrap_err());
    let mut tried = tried.skip_while(|error| matches!(error, ReplicaError::Staging { .. }));
    said!(tried.next().unwrap(), ReplicaError::Deadline { .. })
}

pub(super) fn rollback() -> Said {
    let fleet = Fleet::new();
    let mut trainer = fleet.rank("trainer", 0, 1, SourceOptions::default());
    commit(std::slice::from_mut(&mut trainer), 5);
    let error = trainer.begin_update(soon()).unwrap().commit(4).unwrap_err();
    said!(error, SourceError::NotNewer { .. })
}

#[derive(Debug)]
struct Asleep;

impl Engine for Asleep {
    fn pause(&mut self) -> Result<(), EngineError> {
        Err("its weights are not mapped".into())
    }

    fn derive(
        &mut self,
        _: &[PostAction],
        _: &mut dyn Iterator<Item = (&str, &Memory)>,
    ) -> Result<(), EngineError> {
        unreachable!("nothing is written while it sleeps")
    }

    fn resume(&mut self, _: u64) {
        unreachable!("it never paused")
    }
}

pub(super) fn asleep() -> Said {
    let fleet = Fleet::new();
    let mut trainer = fleet.group("trainer", 1, SourceOptions::default());
    commit(&mut trainer, 1);
    let agent = fleet.agent("engine");
    let (target, _, canaries) = ranks::target(&agent, &rows(0, 1), TargetOptions::default());
    let mut direct = Direct::new(target, Asleep);
    let mut reader = fleet.reader("engine", ReaderOptions::default());
    let error = reader.refresh(&mut direct, &Wanted::at_least(1), millis(500)).unwrap_err();
    let Attempt { failure, .. } = &error.attempts[0];
    let why = failure.reason.downcast_ref::<RankError>().unwrap();
    let Said { kind, .. } = said!(why, RankError::Engine { what: "pause", .. });
    // Nothing was written.
    let mut held = direct.params().unwrap().flat_map(|(_, memory)| memory.host_bytes().unwrap());
    assert!(held.all(|&byte| byte == refit_tests::oracle::POISON));
    canaries.check();
    Said { kind, text: error.to_string() }
}
