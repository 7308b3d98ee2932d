//! The side that wants the weights: finds a version, takes a lease, reads, and tries again where that fails.

mod choice;
mod error;
mod lease;
mod vouch;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use refit::Publication;

use crate::groups::{Census, Offer, census};
use crate::leases::LeaseBook;
use crate::message::MAX_LEASE_MILLIS;
use crate::puller::{Cause, PullFailure, Puller};
use crate::rendezvous::{Key, Rendezvous, RendezvousError, Snapshot};
use crate::seat::{Point, Seat};
use crate::stats::ServiceStats;

pub use self::choice::{Load, choose};
pub use self::error::{Attempt, Ended, OfferError, RefreshError};
pub use self::lease::Lease;
use self::lease::NotLeased;
use self::vouch::Desk;

/// How a target reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReaderOptions {
    /// Most ranks that read a group at a time. Those that find more go to another group or wait, so that a fleet fills as a
    /// tree.
    pub fanout: NonZeroU32,
    /// The longest lease that is taken. A source may wait for a reader that died for as long.
    pub lease: Duration,
    /// For how long one attempt may go on before another group is tried.
    pub attempt: Duration,
    /// Whether what has landed is compared with what its source says of it.
    pub checks: Checks,
}

/// Whether what has landed is compared with what its source says of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Checks {
    /// It is not.
    #[default]
    Never,
    /// Where the source has answered: it does so for those who asked before it committed.
    IfAnswered,
    /// It is, and waited for until the deadline.
    Always,
}

impl Default for ReaderOptions {
    /// 16 ranks; half a minute; ten seconds.
    fn default() -> Self {
        Self {
            fanout: NonZeroU32::MIN.saturating_add(15),
            lease: Duration::from_secs(30),
            attempt: Duration::from_secs(10),
            checks: Checks::Never,
        }
    }
}

impl ReaderOptions {
    /// These options with another number of readers of a group.
    #[must_use]
    pub fn with_fanout(mut self, fanout: NonZeroU32) -> Self {
        self.fanout = fanout;
        self
    }

    /// These options with other leases.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// These options with or without checks.
    #[must_use]
    pub fn with_checks(mut self, checks: Checks) -> Self {
        self.checks = checks;
        self
    }

    /// These options with another patience.
    #[must_use]
    pub fn with_attempt(mut self, attempt: Duration) -> Self {
        self.attempt = attempt;
        self
    }
}

/// Which versions will do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Wanted {
    /// None below this.
    pub at_least: u64,
    /// None above this.
    pub at_most: Option<u64>,
    /// This one, if it is on offer; the newest otherwise.
    pub prefer: Option<u64>,
    /// Never from this group: what a relay offers itself.
    pub not_from: Option<String>,
}

impl Wanted {
    /// This version, or a newer one.
    #[must_use]
    pub fn at_least(version: u64) -> Self {
        Self { at_least: version, ..Self::default() }
    }

    /// This version and no other: whoever holds an old one may offer it still. A replica does not go back, so it is for
    /// ranks that read on their own.
    #[must_use]
    pub fn exactly(version: u64) -> Self {
        Self { at_least: version, at_most: Some(version), ..Self::default() }
    }

    /// The same, but nothing that this group offers: of a replica whose ranks relay, what they have its own ranks have, too.
    #[must_use]
    pub fn but_not_from(mut self, group: impl Into<String>) -> Self {
        self.not_from = Some(group.into());
        self
    }
}

/// A version that was read whole.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Refreshed {
    /// The version.
    pub version: u64,
    /// The group that it was read from.
    pub group: String,
}

/// One target rank, as a reader.
#[derive(Debug)]
pub struct Reader<R: Rendezvous> {
    seat: Seat<R>,
    groups: Key,
    /// The first part of its leases' names, unique among readers.
    name: String,
    incarnation: u128,
    options: ReaderOptions,
    /// Leases taken so far, so that no two have one name.
    leases: u64,
    /// The request for digests that was written last.
    asked: RefCell<Option<[u8; 32]>>,
    books: BTreeMap<String, LeaseBook>,
    /// By group: its publications as they were read last.
    publications: BTreeMap<String, Arc<[Publication]>>,
    stats: ServiceStats,
}

impl<R: Rendezvous> Reader<R> {
    /// A reader of this name and incarnation: the name for people, the incarnation drawn anew for every process.
    ///
    /// # Errors
    /// [`RendezvousError::Key`] for a name that cannot be a part of a key.
    pub fn new(
        seat: Seat<R>,
        name: &str,
        incarnation: u128,
        options: ReaderOptions,
    ) -> Result<Self, RendezvousError> {
        let groups = seat.model().groups()?;
        let name = format!("{name}-{incarnation:032x}");
        Key::new([name.as_str()])?;
        Ok(Self {
            seat,
            groups,
            name,
            incarnation,
            options,
            leases: 0,
            asked: RefCell::new(None),
            books: BTreeMap::new(),
            publications: BTreeMap::new(),
            stats: ServiceStats::default(),
        })
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> &ServiceStats {
        &self.stats
    }

    /// For how long one attempt may go on from now on, as [`ReaderOptions::attempt`].
    pub fn set_attempt(&mut self, attempt: Duration) {
        self.options.attempt = attempt;
    }

    /// Goes on under another session, after one has ended, and counts that.
    pub fn reseat(&mut self, seat: Seat<R>) {
        self.stats.rejoins += 1;
        self.seat = seat;
        // It went with the session.
        *self.asked.borrow_mut() = None;
    }

    /// What there is to read now.
    ///
    /// # Errors
    /// [`RendezvousError`].
    pub fn look(&mut self) -> Result<Census, RendezvousError> {
        let snapshot = self.seat.list(&self.groups)?;
        self.take_stock(&snapshot)
    }

    /// Waits until a group offers a version that will do, woken by the store. `None` at the deadline.
    ///
    /// # Errors
    /// [`RendezvousError`].
    pub fn wait_for(
        &mut self,
        wanted: &Wanted,
        deadline: Instant,
    ) -> Result<Option<Offer>, RendezvousError> {
        let span = tracing::debug_span!("control_discovery", reader = self.name);
        let _entered = span.enter();
        let mut snapshot = self.seat.list(&self.groups)?;
        loop {
            let census = self.take_stock(&snapshot)?;
            let none = BTreeMap::new();
            if let Some(offer) = choose(&census, wanted, &none, None, &self.name) {
                return Ok(Some(offer.clone()));
            }
            match self.seat.changed(&self.groups, snapshot.revision, deadline)? {
                Some(next) => snapshot = next,
                None => return Ok(None),
            }
        }
    }

    /// Reads a version that will do. Tries the groups that offer one, the least read first, again and again until the
    /// deadline, and gives every lease back.
    ///
    /// # Errors
    /// [`RefreshError`] with every attempt and its reason.
    pub fn refresh(
        &mut self,
        puller: &mut impl Puller,
        wanted: &Wanted,
        deadline: Instant,
    ) -> Result<Refreshed, Box<RefreshError>> {
        let read = self.read_any(puller, wanted, deadline);
        self.stats.quarantined_bytes = puller.quarantined_bytes();
        read
    }

    fn read_any(
        &mut self,
        puller: &mut impl Puller,
        wanted: &Wanted,
        deadline: Instant,
    ) -> Result<Refreshed, Box<RefreshError>> {
        let mut round = Round::new(wanted, deadline);
        loop {
            let chosen = match self.discover(&mut round) {
                Ok(Some(offer)) => offer,
                Ok(None) => return Err(round.ended(Ended::Deadline)),
                Err(error) => return Err(round.ended(Ended::Store(error))),
            };
            let now = Instant::now();
            // No longer than a pull may take: others may offer something by then.
            let patience =
                now.checked_add(self.options.attempt).map_or(deadline, |it| it.min(deadline));
            if let Err(failure) = puller.make_ready(&chosen.group, patience) {
                let ended = match failure.cause {
                    Cause::Late if Instant::now() < deadline => continue,
                    Cause::Quarantined => Ended::Quarantined(failure),
                    Cause::Lost => Ended::Lost(failure),
                    _ => Ended::Unsettled(failure),
                };
                return Err(round.ended(ended));
            }
            if self.seat.is_told() {
                return Err(round.ended(Ended::Deadline));
            }
            let began = Instant::now();
            let failure = match self.attempt(puller, &chosen, deadline) {
                Ok(()) => {
                    self.stats.refits += 1;
                    return Ok(Refreshed { version: chosen.version, group: chosen.group });
                }
                Err(Missed::Crowded) => {
                    self.stats.crowded += 1;
                    self.step_back(deadline);
                    continue;
                }
                Err(Missed::Store(error)) => return Err(round.ended(Ended::Store(error))),
                Err(Missed::Pull(failure)) => failure,
            };
            self.stats.retries.count(failure.cause);
            tracing::warn!(group = chosen.group, version = chosen.version, %failure, "an attempt to read failed");
            if failure.cause == Cause::Lost {
                return Err(round.ended(Ended::Lost(failure)));
            }
            round.failed(chosen, failure, began.elapsed());
        }
    }

    /// The next group to try, once there is one.
    fn discover(&mut self, round: &mut Round<'_>) -> Result<Option<Offer>, RendezvousError> {
        let span = tracing::debug_span!("control_discovery", reader = self.name);
        let _entered = span.enter();
        let mut snapshot = self.seat.list(&self.groups)?;
        loop {
            let now = Instant::now();
            if now >= self.seat.until(round.deadline) {
                return Ok(None);
            }
            let census = self.take_stock(&snapshot)?;
            let readers = self.load(now);
            let load = Load { readers: &readers, most: self.options.fanout };
            let chosen = choose(&census, round.wanted, &round.tried, Some(load), &self.name);
            // One that has just failed is not tried again at once, unless something has changed.
            let early = chosen.and_then(|offer| round.not_before(offer)).filter(|at| *at > now);
            if let (Some(offer), None) = (chosen, early) {
                return Ok(Some(offer.clone()));
            }
            round.withheld = census.withheld;
            // Nor is it to be said why that offers nothing.
            if let Some(group) = &round.wanted.not_from {
                round.withheld.remove(group);
            }
            let ends = self.books.values().filter_map(|book| book.next_end(now)).min();
            let until = [early, ends].into_iter().flatten().fold(round.deadline, Instant::min);
            snapshot = match self.seat.changed(&self.groups, snapshot.revision, until)? {
                Some(next) => next,
                // A lease that is over makes room, and no store says so.
                None => snapshot,
            };
        }
    }

    fn attempt(
        &mut self,
        puller: &mut impl Puller,
        offer: &Offer,
        deadline: Instant,
    ) -> Result<(), Missed> {
        let began = Instant::now();
        let left = deadline.saturating_duration_since(began);
        let time = left.min(self.options.attempt).min(self.options.lease);
        let lease = self.lease(offer, time)?;
        self.seat.at(Point::Reading);
        // The lease counts from when its source sees it, which was after this clock began.
        let mut reading = lease.reading();
        let desk = Desk {
            seat: &self.seat,
            name: &self.name,
            incarnation: self.incarnation,
            group: reading.group,
            expected: reading.expected,
            checks: self.options.checks,
            asked: &self.asked,
        };
        reading.vouch = (self.options.checks != Checks::Never).then_some(&desk);
        let read = puller.pull(&reading, began + time);
        self.seat.at(Point::Read);
        self.give_back(lease);
        read.map_err(Missed::Pull)
    }

    /// Takes a lease on an offer for `time`, and makes sure that it still stands: its source waits for the lease, or has
    /// closed it before.
    fn lease(&mut self, offer: &Offer, time: Duration) -> Result<Lease<R>, NotLeased> {
        self.leases += 1;
        let millis = u32::try_from(time.as_millis()).unwrap_or(u32::MAX).clamp(1, MAX_LEASE_MILLIS);
        let name = format!("{}-{}", self.name, self.leases);
        let mut lease = Lease::take(&self.seat, offer, self.incarnation, millis, &name)?;
        self.seat.at(Point::Leased);
        let group = self.seat.model().group(&offer.group)?;
        let snapshot = self.seat.list(&group)?;
        let census = census(self.seat.model(), &snapshot)?;
        lease.confirm(&census)?;
        let book = self.books.entry(offer.group.clone()).or_default();
        let (readers, now) = (self.seat.model().readers(&offer.group)?, Instant::now());
        book.observe(&readers, &snapshot, self.options.lease.max(time), now);
        if book.live(now).count() > self.options.fanout.get() as usize {
            return Err(NotLeased::Crowded);
        }
        let known = self.publications.remove(&offer.group).unwrap_or_default();
        lease.read_publications(known)?;
        Ok(lease)
    }

    fn give_back(&mut self, lease: Lease<R>) {
        let (group, publications) = lease.release();
        self.publications.insert(group, publications);
        self.seat.at(Point::Released);
    }

    fn take_stock(&mut self, snapshot: &Snapshot) -> Result<Census, RendezvousError> {
        let census = census(self.seat.model(), snapshot)?;
        let now = Instant::now();
        let there = |group: &String| {
            census.offers.contains_key(group) || census.withheld.contains_key(group)
        };
        self.books.retain(|group, _| there(group));
        self.publications.retain(|group, _| there(group));
        for group in census.offers.keys() {
            let readers = self.seat.model().readers(group)?;
            let book = self.books.entry(group.clone()).or_default();
            book.observe(&readers, snapshot, self.options.lease, now);
        }
        Ok(census)
    }

    /// Live readers, by group.
    fn load(&self, now: Instant) -> BTreeMap<String, usize> {
        self.books.iter().map(|(group, book)| (group.clone(), book.live(now).count())).collect()
    }

    /// Waits a little, not as long as others that stepped back at the same time.
    fn step_back(&self, deadline: Instant) {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.name.as_bytes()).update(&self.leases.to_le_bytes());
        let pause = Duration::from_micros(200 + u64::from(hasher.finalize().as_bytes()[0]) * 30);
        std::thread::sleep(pause.min(deadline.saturating_duration_since(Instant::now())));
    }
}

/// Most attempts that an error lists.
const MOST_ATTEMPTS: usize = 64;

/// The first pause before a group that failed is tried again with nothing changed, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(200));

/// What has been tried in one refresh.
struct Round<'a> {
    wanted: &'a Wanted,
    deadline: Instant,
    began: Instant,
    /// By group.
    tried: BTreeMap<String, Tried>,
    attempts: Vec<Attempt>,
    omitted: u64,
    withheld: BTreeMap<String, crate::groups::Withheld>,
}

/// What came of the attempts to read a group.
#[derive(Clone, Debug)]
pub struct Tried {
    /// How many failed.
    pub failures: u32,
    /// What was offered the last time.
    pub offer: Offer,
    /// Whether the same offer need not be tried again.
    pub refused: bool,
    /// When the last attempt ended.
    pub at: Instant,
}

impl<'a> Round<'a> {
    fn new(wanted: &'a Wanted, deadline: Instant) -> Self {
        Self {
            wanted,
            deadline,
            began: Instant::now(),
            tried: BTreeMap::new(),
            attempts: Vec::new(),
            omitted: 0,
            withheld: BTreeMap::new(),
        }
    }

    fn failed(&mut self, offer: Offer, failure: PullFailure, took: Duration) {
        let failures = self.tried.get(&offer.group).map_or(0, |tried| tried.failures);
        let refused = failure.cause == Cause::Refused;
        let (group, version) = (offer.group.clone(), offer.version);
        let tried =
            Tried { failures: failures.saturating_add(1), offer, refused, at: Instant::now() };
        self.tried.insert(group.clone(), tried);
        if self.attempts.len() < MOST_ATTEMPTS {
            self.attempts.push(Attempt { group, version, failure, took });
        } else {
            self.omitted += 1;
        }
    }

    /// When this offer may be tried, if not at once.
    fn not_before(&self, offer: &Offer) -> Option<Instant> {
        let tried = self.tried.get(&offer.group).filter(|tried| tried.offer == *offer)?;
        let doublings = tried.failures.saturating_sub(1).min(10);
        Some(tried.at + (PAUSE.0 * (1 << doublings)).min(PAUSE.1))
    }

    fn ended(self, ended: Ended) -> Box<RefreshError> {
        Box::new(RefreshError {
            wanted: self.wanted.clone(),
            attempts: self.attempts,
            omitted: self.omitted,
            withheld: self.withheld,
            took: self.began.elapsed(),
            ended,
        })
    }
}

/// Why an attempt came to nothing.
enum Missed {
    Crowded,
    Store(RendezvousError),
    Pull(PullFailure),
}

impl From<NotLeased> for Missed {
    fn from(why: NotLeased) -> Self {
        match why {
            NotLeased::Crowded => Self::Crowded,
            NotLeased::Store(error) => Self::Store(error),
            NotLeased::Failed(failure) => Self::Pull(failure),
        }
    }
}
