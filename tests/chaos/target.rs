//! A target rank: refits again and again, verifies every byte of what it holds, and says what came of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use refit::TargetOptions;
use refit_service::puller::Cause;
use refit_service::rank::{Direct, Shadow, Unattended};
use refit_service::reader::{Ended, Reader, ReaderOptions, RefreshError, Wanted};
use refit_service::rendezvous::Directory;
use refit_service::replica::{Replica, ReplicaError, ReplicaRank};
use refit_tests::ranks::{self, Canaries};
use refit_transport::TransportPool;
use refit_transport::nixl::NixlTransport;
use serde::{Deserialize, Serialize};

use crate::child::{ANEW, Orders, TTL, after, agent, now_micros, passes, say};
use crate::model::{Cut, Model, Share};

/// What a target is told at its start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) folder: String,
    pub(crate) model: Model,
    pub(crate) kind: Kind,
    /// How long a refit may take, in milliseconds.
    pub(crate) patience: u64,
    /// How many refits; without end where it is 0.
    pub(crate) times: u64,
    /// Whether a version that it holds will do: then it reads it again.
    pub(crate) again: bool,
    /// How long it rests between refits, in microseconds.
    pub(crate) rest: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// Reads in place, and asks for checks of what arrived if so.
    Direct,
    /// This rank of a replica of so many.
    Replica(u32, u32),
}

enum Stand {
    Direct(Box<Reader<Directory>>, Box<Direct<NixlTransport, Unattended>>),
    Replica(Box<Replica<Directory, Shadow<NixlTransport, Unattended>>>),
    /// Between two sessions.
    Nowhere,
}

struct Rank {
    part: Part,
    orders: Orders,
    store: Arc<Directory>,
    incarnation: u128,
    share: Share,
    pool: TransportPool<NixlTransport>,
    canaries: Vec<Canaries>,
    stand: Stand,
}

/// How a refit ended, in words of the protocol of lines.
struct Outcome {
    what: &'static str,
    version: u64,
    attempts: u64,
    error: String,
}

/// Several, each on a thread of its own, with an agent of its own.
pub(crate) fn run(parts: &[Part]) {
    let orders = Orders::listen();
    std::thread::scope(|scope| {
        for part in parts {
            let orders = orders.clone();
            scope.spawn(move || refit(part, orders));
        }
    });
}

fn refit(part: &Part, orders: Orders) {
    let mut rank = Rank::join(part.clone(), orders);
    say("ready");
    let mut last = 0;
    let mut done = 0;
    while !rank.orders.ended() {
        let at_least = if part.again { 0 } else { last + 1 };
        let (began, deadline) = (now_micros(), after(Duration::from_millis(part.patience)));
        let due = began + part.patience * 1_000;
        let Outcome { what, version, attempts, error } = rank.refresh(at_least, deadline);
        let ended = now_micros();
        if what == "ok" {
            last = version;
        }
        if let Err(why) = rank.verify() {
            say(&format!("torn {why}"));
        }
        done += 1;
        let pool = rank.pool.stats();
        let registrations = pool.registrations - pool.deregistrations;
        let model = part.model.salt;
        // A rank of a replica that holds what will do has nothing to read.
        let reads = u8::from(part.kind == Kind::Direct || !part.again);
        say(&format!(
            "refit {what} {began} {ended} {due} {version} {attempts} {registrations} {model} {reads} {error}"
        ));
        rank.say_what_is_served();
        if done == part.times {
            break;
        }
        std::thread::sleep(Duration::from_micros(part.rest));
    }
    // Counts are asked for by others before it ends.
    while !rank.orders.ended() {
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Rank {
    fn join(part: Part, orders: Orders) -> Self {
        let store = Arc::new(Directory::new(&part.folder).unwrap());
        let transport = agent("target");
        let cut = match part.kind {
            Kind::Direct => Cut::Rows(0, 1),
            Kind::Replica(rank, ranks) => Cut::Cols(rank, ranks),
        };
        let share = part.model.share(cut);
        let layout = share.layout();
        let (target, pool, canaries) = ranks::target(&transport, &layout, TargetOptions::default());
        let mut canaries = vec![canaries];
        let incarnation = u128::from(now_micros()) << 64 | u128::from(std::process::id());
        let stand = Stand::Nowhere;
        let mut this =
            Self { part, orders, store, incarnation, share, pool, canaries: Vec::new(), stand };
        this.stand = match this.part.kind {
            Kind::Direct => {
                Stand::Direct(Box::new(this.reader()), Box::new(Direct::new(target, Unattended)))
            }
            Kind::Replica(..) => {
                let (live, more) = ranks::memory(&layout);
                canaries.push(more);
                let shadow = Shadow::new(target, live, Vec::new(), Unattended).unwrap();
                this.replica(shadow)
            }
        };
        this.canaries = canaries;
        this
    }

    fn reader(&self) -> Reader<Directory> {
        let seat = self.orders.seat(&self.store, &format!("model-{}", self.part.model.salt));
        let options = ReaderOptions::default()
            .with_lease(Duration::from_millis(300))
            .with_attempt(Duration::from_millis(self.part.patience / 2));
        Reader::new(seat, "target", self.incarnation, options).unwrap()
    }

    fn replica(&mut self, shadow: Shadow<NixlTransport, Unattended>) -> Stand {
        let Kind::Replica(rank, ranks) = self.part.kind else { return Stand::Nowhere };
        let seat = self.orders.seat(&self.store, &format!("model-{}", self.part.model.salt));
        let place = ReplicaRank { replica: format!("replica-{ranks}"), rank, ranks };
        // Another life of this rank, also within this process.
        self.incarnation += 1 << 32;
        let (fresh, deadline) = (TTL / 2, after(Duration::from_secs(10)));
        let reader = self.reader();
        let joined = Replica::join(seat, place, self.incarnation, reader, shadow, fresh, deadline);
        match joined {
            Ok(joined) => Stand::Replica(Box::new(joined)),
            Err(ReplicaError::Rendezvous(error)) if passes(&error) => anew(&error.to_string()),
            Err(error) => panic!("{error}"),
        }
    }

    fn refresh(&mut self, at_least: u64, deadline: Instant) -> Outcome {
        let (attempts, result) = match &mut self.stand {
            Stand::Direct(reader, direct) => {
                let before = reader.stats().retries.total();
                let wanted = Wanted::at_least(at_least);
                let result = reader.refresh(direct.as_mut(), &wanted, deadline);
                let result = result.map(|refreshed| refreshed.version).map_err(Failure::of_reader);
                (reader.stats().retries.total() - before, result)
            }
            Stand::Replica(replica) => {
                let before = replica.stats().retries.total();
                let result = replica.refresh(at_least, deadline);
                let result = result.map(|ready| ready.version).map_err(Failure::of_replica);
                (replica.stats().retries.total() - before, result)
            }
            Stand::Nowhere => panic!("between two sessions"),
        };
        match result {
            Ok(version) => Outcome { what: "ok", version, attempts, error: String::new() },
            Err(Failure::Error(error)) => Outcome { what: "error", version: 0, attempts, error },
            Err(Failure::Session) => {
                self.reseat();
                Outcome { what: "session", version: 0, attempts, error: String::new() }
            }
            Err(Failure::Anew(why)) => anew(&why),
        }
    }

    /// Under another session, and as another life of a rank.
    fn reseat(&mut self) {
        match std::mem::replace(&mut self.stand, Stand::Nowhere) {
            Stand::Direct(mut reader, direct) => {
                reader.reseat(
                    self.orders.seat(&self.store, &format!("model-{}", self.part.model.salt)),
                );
                self.stand = Stand::Direct(reader, direct);
            }
            Stand::Replica(mut replica) => {
                // Another life of this rank, with the memory and the agent of the last.
                self.incarnation += 1 << 32;
                let seat =
                    self.orders.seat(&self.store, &format!("model-{}", self.part.model.salt));
                let deadline = after(Duration::from_secs(10));
                match replica.rejoin(seat, self.incarnation, deadline) {
                    Ok(()) => {}
                    // The next refresh finds that it is not there, and it is tried again.
                    Err(error) if error.is_session_ended() => {}
                    Err(ReplicaError::Rendezvous(error)) if passes(&error) => {}
                    Err(error @ ReplicaError::Taken { .. }) => anew(&error.to_string()),
                    Err(error) => panic!("{error}"),
                }
                self.stand = Stand::Replica(replica);
            }
            Stand::Nowhere => {}
        }
    }

    /// Every byte of what is live, and those beside it.
    fn verify(&self) -> Result<(), String> {
        self.canaries.iter().for_each(Canaries::check);
        match &self.stand {
            Stand::Direct(_, direct) => match (direct.version(), direct.params()) {
                (Some(version), Some(params)) => self.share.verify(params, version),
                _ => Ok(()),
            },
            Stand::Replica(replica) => match replica.installed() {
                Some(version) => self.share.verify(replica.stage().params(), version),
                None => Ok(()),
            },
            Stand::Nowhere => Ok(()),
        }
    }

    /// What this rank may answer for, and when that was so.
    fn say_what_is_served(&mut self) {
        let (Stand::Replica(replica), Kind::Replica(_, ranks)) = (&mut self.stand, self.part.kind)
        else {
            return;
        };
        let replica_number = 100 * self.part.model.salt + u64::from(ranks);
        for _ in 0..3 {
            let before = now_micros();
            if let Some(version) = replica.serving() {
                say(&format!("serve {before} {} {version} {replica_number}", now_micros()));
                if let Err(why) = self.share.verify(replica.stage().params(), version) {
                    say(&format!("torn served: {why}"));
                }
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    }
}

/// Ends this process, which is of no more use.
fn anew(why: &str) -> ! {
    say(&format!("anew {why}"));
    std::process::exit(ANEW.into())
}

enum Failure {
    /// One that names what happened: the next refit may succeed.
    Error(String),
    /// The session ended meanwhile.
    Session,
    /// This process is of no more use.
    Anew(String),
}

impl Failure {
    fn of_reader(error: Box<RefreshError>) -> Self {
        if error.is_session_ended() {
            return Self::Session;
        }
        let text = error.to_string();
        match error.ended {
            Ended::Lost(_) => Self::Anew(text),
            Ended::Unsettled(failure) if failure.cause == Cause::Lost => Self::Anew(text),
            _ => Self::Error(text),
        }
    }

    fn of_replica(error: ReplicaError) -> Self {
        let text = error.to_string();
        if error.is_session_ended() {
            return Self::Session;
        }
        match error {
            ReplicaError::Staging { source, .. } => Self::of_reader(source),
            // Its place went with a session that ended, and another life has taken it.
            ReplicaError::Superseded { .. } | ReplicaError::Invalid { .. } => Self::Anew(text),
            _ => Self::Error(text),
        }
    }
}
