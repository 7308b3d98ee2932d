//! The side that holds the weights and says which version they are of, and when they may be read.
//!
//! ```text
//!            join                begin_update                       commit(version)
//! LiveSource ────▶ not announced ────────────▶ Updating (may write) ───────────────▶ open
//!                                    ▲                                                │
//!                                    └── closed, no reader left, header odd ◀─────────┘
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::time::{Duration, Instant};

use refit::transport::draw_incarnation;
use refit::{DigestRequest, Digests, Expected, Publication, RefitError};

use crate::keys::Model;
use crate::leases::LeaseBook;
use crate::message::{Announcement, Answer, Member, Message, MessageError, Offering, Wish};
use crate::rendezvous::{Key, Rendezvous, RendezvousError};
use crate::seat::{Point, Seat};
use crate::stats::ServiceStats;

/// One rank's parameters, and the header beside them that peers read last.
pub trait SourceRank: Debug {
    /// What peers need to read from it. Asked for after a commit only.
    ///
    /// # Errors
    /// [`RefitError`], here and below, from what holds the parameters.
    fn publication(&self) -> Result<Publication, RefitError>;

    /// Hashes what a target asks of it.
    ///
    /// # Errors
    /// See [`publication`](Self::publication).
    fn digests(&self, request: &DigestRequest) -> Result<Digests, RefitError>;

    /// Makes the header say that the parameters are being written, if it does not. Behind this they may be.
    ///
    /// # Errors
    /// See [`publication`](Self::publication).
    fn begin(&mut self) -> Result<(), RefitError>;

    /// Makes the header say that they are whole and of this version, behind all that was written. Gives back what it says:
    /// an even epoch, and none that it ever said before.
    ///
    /// # Errors
    /// See [`publication`](Self::publication).
    fn commit(&mut self, version: u64) -> Result<Expected, RefitError>;
}

/// Which group a rank belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GroupRank {
    /// The group: ranks that commit together, such as one data-parallel copy of a trainer.
    pub group: String,
    /// The rank in it, counted from 0.
    pub rank: u32,
    /// How many there are.
    pub ranks: u32,
}

/// How a source treats its readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SourceOptions {
    /// No lease counts for longer, whatever it says: the longest that a dead reader holds up a trainer.
    pub most_lease: Duration,
    /// How long a source that is dropped waits for its readers.
    pub drain: Duration,
    /// Whether it offers what it has read from others.
    pub(crate) relay: bool,
}

impl Default for SourceOptions {
    /// Half a minute; two seconds.
    fn default() -> Self {
        Self { most_lease: Duration::from_secs(30), drain: Duration::from_secs(2), relay: false }
    }
}

impl SourceOptions {
    /// These options with another bound on leases.
    #[must_use]
    pub fn with_most_lease(mut self, most: Duration) -> Self {
        self.most_lease = most;
        self
    }

    /// These options with another wait when dropped.
    #[must_use]
    pub fn with_drain(mut self, drain: Duration) -> Self {
        self.drain = drain;
        self
    }
}

/// A source rank that others find by the rendezvous.
///
/// Dropped, it withdraws what it published, waits a while for readers, and gives up its memory only if none may be left:
/// reads that were abandoned, or whose lease ran out, may still be under way, and memory must outlive them.
#[derive(Debug)]
pub struct LiveSource<R: Rendezvous, S: SourceRank> {
    /// `None` once it was given back, by what consumes the rest.
    source: Option<S>,
    desk: Desk<R>,
}

/// What a source tells others, and what it knows of them.
#[derive(Debug)]
struct Desk<R: Rendezvous> {
    seat: Seat<R>,
    keys: Keys,
    place: GroupRank,
    options: SourceOptions,
    member: Member,
    /// The last version committed, as it was announced or would have been.
    last: Option<Announcement>,
    /// Whether the header says that version, and nobody may write.
    stable: bool,
    /// Whether readers may believe that it is offered.
    open: bool,
    /// By target: the request that was answered last, and the epoch that the answer is of.
    answered: BTreeMap<String, ([u8; 32], u64)>,
    stats: ServiceStats,
}

#[derive(Debug)]
struct Keys {
    member: Key,
    publication: Key,
    version: Key,
    readers: Key,
}

/// The right to write a source's parameters, from [`LiveSource::begin_update`] to [`commit`](Self::commit).
///
/// Dropped, it leaves the version closed: nobody reads, and the next update begins at once.
#[derive(Debug)]
#[must_use = "nobody can read the source until it is committed"]
pub struct Updating<'a, R: Rendezvous, S: SourceRank> {
    source: &'a mut S,
    desk: &'a mut Desk<R>,
}

/// What [`LiveSource::leave`] gives back.
#[derive(Debug)]
pub struct Left<S> {
    /// The rank.
    pub source: S,
    /// Leases that were not given back: their readers may still be reading. Keep the memory until they are known to be
    /// gone.
    pub unreleased: Vec<Key>,
}

impl<R: Rendezvous, S: SourceRank> LiveSource<R, S> {
    /// Makes this rank a member of its group. Nothing is offered until the first commit.
    ///
    /// A rank that is there already is never taken over. Where it is this rank's former life, its entry vanishes with its
    /// session, and this waits for that until the deadline.
    ///
    /// # Errors
    /// [`SourceError::Taken`] when another life of this rank is there until the deadline; [`SourceError`] otherwise.
    pub fn join(
        seat: Seat<R>,
        place: GroupRank,
        source: S,
        options: SourceOptions,
        deadline: Instant,
    ) -> Result<Self, SourceError> {
        let member = Member {
            rank: place.rank,
            ranks: place.ranks,
            // Of whoever claims the place. What it holds is known, and read by others, when it commits.
            incarnation: draw_incarnation(&place.group).map_err(RefitError::from)?,
            relay: options.relay,
            publication: [0; 32],
        };
        // What the others would not read is not worth writing.
        Member::decode(&member.encode())?;
        let keys = Keys::new(seat.model(), &place)?;
        let desk = Desk {
            seat,
            keys,
            place,
            options,
            member,
            last: None,
            stable: false,
            open: false,
            answered: BTreeMap::new(),
            stats: ServiceStats::default(),
        };
        desk.enter(None, deadline)?;
        Ok(Self { source: Some(source), desk })
    }

    /// Joins again after the session ended: under another one, and with the version that was committed last.
    ///
    /// # Errors
    /// As [`join`](Self::join).
    pub fn rejoin(&mut self, seat: Seat<R>, deadline: Instant) -> Result<(), SourceError> {
        let source = self.source.as_ref().ok_or(SourceError::Gone)?;
        let desk = &mut self.desk;
        desk.seat = seat;
        desk.open = false;
        match desk.last.filter(|_| desk.stable) {
            Some(last) => {
                let publication = source.publication()?;
                desk.member.publication = *publication.digest();
                desk.enter(Some(&publication), deadline)?;
                desk.announce(last)?;
            }
            None => {
                // It went with the session, and the next commit has to write it whatever it is.
                desk.member.publication = [0; 32];
                desk.enter(None, deadline)?;
            }
        }
        desk.stats.rejoins += 1;
        Ok(())
    }

    /// Whether this rank's session has ended, as far as the store knows, so that it has to [`rejoin`](Self::rejoin) before
    /// others find it.
    ///
    /// # Errors
    /// [`RendezvousError`].
    pub fn has_vanished(&self) -> Result<bool, RendezvousError> {
        Ok(self.desk.look()? != There::Itself)
    }

    /// The rank. `None` only while it is given back.
    #[must_use]
    pub fn source(&self) -> Option<&S> {
        self.source.as_ref()
    }

    /// The rank, for what leaves its published bytes as they are.
    pub(crate) fn source_to_read(&mut self) -> Option<&mut S> {
        self.source.as_mut()
    }

    /// The version that is offered, if one is.
    #[must_use]
    pub fn offered(&self) -> Option<u64> {
        self.desk.last.filter(|_| self.desk.open).map(|last| last.version)
    }

    /// What has happened so far.
    #[must_use]
    pub fn stats(&self) -> &ServiceStats {
        &self.desk.stats
    }

    /// Waits until nobody reads the version on offer, and gives the right to overwrite it.
    ///
    /// It waits for those only that were reading when it closed the version, each at most as long as its lease says, as
    /// [`SourceOptions::most_lease`] allows, and by our clock: never for the dead.
    ///
    /// # Errors
    /// [`SourceError::Busy`] when readers are left at the deadline. Nothing was written, and the version is open again.
    pub fn begin_update(&mut self, deadline: Instant) -> Result<Updating<'_, R, S>, SourceError> {
        let source = self.source.as_mut().ok_or(SourceError::Gone)?;
        let desk = &mut self.desk;
        if let Some(last) = desk.last.filter(|_| desk.open) {
            desk.seat.at(Point::Closing);
            let closed = Announcement { offering: Offering::Closed, ..last };
            desk.seat.put(&desk.keys.version, &closed.encode())?;
            desk.seat.at(Point::Closed);
            let left = desk.drain(deadline)?;
            if !left.alive.is_empty() {
                desk.announce(last)?;
                return Err(desk.busy(left.alive));
            }
            desk.open = false;
        }
        desk.seat.at(Point::Drained);
        desk.stable = false;
        source.begin()?;
        desk.seat.at(Point::Writing);
        Ok(Updating { source, desk })
    }

    /// Answers targets that have asked since the last commit what its bytes hash to. Takes as long as hashing does.
    ///
    /// # Errors
    /// [`SourceError`] when the store cannot be reached.
    pub fn answer(&mut self) -> Result<(), SourceError> {
        let source = self.source.as_ref().ok_or(SourceError::Gone)?;
        match self.desk.last.filter(|_| self.desk.open) {
            Some(last) => self.desk.answer(source, last.epoch),
            None => Ok(()),
        }
    }

    /// Leaves the group: withdraws what was published, waits for readers until the deadline, and gives the rank back.
    ///
    /// # Errors
    /// [`SourceError`] when the store cannot be reached. The source is dropped then.
    pub fn leave(mut self, deadline: Instant) -> Result<Left<S>, SourceError> {
        self.desk.withdraw()?;
        let left = self.desk.drain(deadline)?;
        let source = self.source.take().ok_or(SourceError::Gone)?;
        Ok(Left { source, unreleased: left.alive.into_iter().chain(left.expired).collect() })
    }
}

impl<R: Rendezvous> Desk<R> {
    fn enter(
        &self,
        publication: Option<&Publication>,
        deadline: Instant,
    ) -> Result<(), SourceError> {
        let GroupRank { group, rank, .. } = &self.place;
        let span = tracing::debug_span!("source_preparation", group, rank);
        let _entered = span.enter();
        if let Err(there) = self.seat.claim(&self.keys.member, &self.member.encode(), deadline)? {
            let GroupRank { group, rank, .. } = self.place.clone();
            let holder = Member::decode(&there).ok().map(|member| member.incarnation);
            return Err(SourceError::Taken { group, rank, holder });
        }
        if let Some(publication) = publication {
            self.seat.put(&self.keys.publication, &publication.encode())?;
        }
        self.seat.at(Point::Joined);
        Ok(())
    }

    /// The offer goes first, so that whoever looks again after taking a lease finds nothing to read; the member last, because
    /// the next life of this rank writes the others as soon as that is gone. What such a life has written stays: where its
    /// member is there, this one's entries went with its session.
    fn withdraw(&mut self) -> Result<(), RendezvousError> {
        // Who leaves waits for its readers, told or not.
        self.seat.ignore_stop();
        if self.look()? == There::Another {
            self.open = false;
            return Ok(());
        }
        let store = self.seat.rendezvous();
        store.remove(&self.keys.version)?;
        self.open = false;
        store.remove(&self.keys.publication)?;
        store.remove(&self.keys.member)?;
        self.seat.at(Point::Withdrawn);
        Ok(())
    }

    /// Who has this rank's place.
    fn look(&self) -> Result<There, RendezvousError> {
        let found = self.seat.list(&self.keys.member)?;
        let Some(there) = found.entries.get(&self.keys.member) else { return Ok(There::Nobody) };
        let committed = self.last.map(|last| last.incarnation);
        let ours = |it: u128| it == self.member.incarnation || Some(it) == committed;
        Ok(match Member::decode(there) {
            Ok(member) if !ours(member.incarnation) => There::Another,
            _ => There::Itself,
        })
    }

    /// Waits for the readers that were there when the version was closed. Whoever came later looks again, finds it closed,
    /// and does not read: there is no need to know them.
    fn drain(&mut self, deadline: Instant) -> Result<Leftover, SourceError> {
        let began = Instant::now();
        let most = self.options.most_lease;
        let mut book = LeaseBook::default();
        let mut snapshot = self.seat.list(&self.keys.readers)?;
        book.observe(&self.keys.readers, &snapshot, most, began);
        let mut waiting: BTreeSet<Key> = book.live(began).cloned().collect();
        let mut expired = BTreeSet::new();
        if waiting.is_empty() {
            return Ok(Leftover { alive: waiting, expired });
        }
        self.stats.waits += 1;
        loop {
            let now = Instant::now();
            let live: BTreeSet<Key> = book.live(now).cloned().collect();
            for over in waiting.difference(&live) {
                if snapshot.entries.contains_key(over) {
                    tracing::warn!(lease = %over, "a reader's lease ran out before it was given back");
                    self.stats.leases_expired += 1;
                    expired.insert(over.clone());
                } else {
                    self.stats.leases_released += 1;
                }
            }
            // One that is given back late was given back all the same.
            expired.retain(|key| snapshot.entries.contains_key(key));
            waiting.retain(|key| live.contains(key));
            if waiting.is_empty() || now >= self.seat.until(deadline) {
                self.stats.waited += began.elapsed();
                self.stats.waits_late += u64::from(!waiting.is_empty());
                return Ok(Leftover { alive: waiting, expired });
            }
            let until = book.next_end(now).map_or(deadline, |end| end.min(deadline));
            let readers = &self.keys.readers;
            if let Some(next) = self.seat.changed(readers, snapshot.revision, until)? {
                book.observe(readers, &next, most, Instant::now());
                snapshot = next;
            }
        }
    }

    fn announce(&mut self, announcement: Announcement) -> Result<(), SourceError> {
        let written = self.seat.put(&self.keys.version, &announcement.encode());
        // A write that failed may have taken effect: whoever writes next has to close it, and wait for those who believed it.
        self.open = !matches!(written, Err(RendezvousError::SessionEnded));
        written?;
        self.seat.at(Point::Opened);
        Ok(())
    }

    fn commit(&mut self, source: &mut impl SourceRank, version: u64) -> Result<(), SourceError> {
        let GroupRank { group, rank, .. } = &self.place;
        let span = tracing::debug_span!("source_preparation", group, rank, version);
        let _entered = span.enter();
        let Expected { incarnation, epoch, .. } = source.commit(version)?;
        let publication = source.publication()?;
        if publication.rank() != self.place.rank {
            let GroupRank { group, rank, .. } = self.place.clone();
            return Err(SourceError::WrongRank { group, rank, found: publication.rank() });
        }
        let announcement = Announcement { incarnation, version, epoch, offering: Offering::Open };
        self.last = Some(announcement);
        self.stable = true;
        self.seat.at(Point::Committed);
        let member = Member { incarnation, publication: *publication.digest(), ..self.member };
        if member != self.member {
            // Its version is closed, so that nobody takes one for the other's.
            self.seat.put(&self.keys.publication, &publication.encode())?;
            self.seat.put(&self.keys.member, &member.encode())?;
            self.member = member;
        }
        self.stats.commits += 1;
        // So that the answers are there when the version is.
        self.answer(source, epoch)?;
        self.announce(announcement)
    }

    /// Tells the targets that ask what this version's bytes hash to.
    fn answer(&mut self, source: &impl SourceRank, epoch: u64) -> Result<(), SourceError> {
        let model = self.seat.model().clone();
        let GroupRank { group, rank, .. } = &self.place;
        let wishes = self.seat.list(&model.wishes()?)?;
        let mut asking = BTreeSet::new();
        for (key, value) in &wishes.entries {
            let Some(target) = key.parts().last() else { continue };
            // What one target writes is no reason to fail for the others.
            let Ok(Wish { digests: Some(request), .. }) = Wish::decode(value) else { continue };
            asking.insert(target.to_owned());
            let known = (*request.digest(), epoch);
            if self.answered.get(target) == Some(&known) {
                continue;
            }
            match source.digests(&request) {
                Ok(digests) => {
                    let key = model.digests(group, *rank, target)?;
                    self.seat.put(&key, &Answer(digests).encode())?;
                }
                Err(error) => {
                    tracing::debug!(target, %error, "a request for digests is not for this source");
                }
            }
            self.answered.insert(target.to_owned(), known);
        }
        let gone: Vec<String> =
            self.answered.keys().filter(|target| !asking.contains(*target)).cloned().collect();
        for target in gone {
            self.seat.rendezvous().remove(&model.digests(group, *rank, &target)?)?;
            self.answered.remove(&target);
        }
        Ok(())
    }

    fn busy(&self, readers: BTreeSet<Key>) -> SourceError {
        let GroupRank { group, rank, .. } = self.place.clone();
        SourceError::Busy { group, rank, readers: readers.into_iter().collect() }
    }
}

/// Who has a rank's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum There {
    Nobody,
    Itself,
    /// Another life of the rank.
    Another,
}

/// Readers that were there when a version was closed, and did not give their leases back.
struct Leftover {
    /// Their leases are not over.
    alive: BTreeSet<Key>,
    /// Their leases are.
    expired: BTreeSet<Key>,
}

impl Keys {
    fn new(model: &Model, place: &GroupRank) -> Result<Self, RendezvousError> {
        let GroupRank { group, rank, .. } = place;
        Ok(Self {
            member: model.member(group, *rank)?,
            publication: model.publication(group, *rank)?,
            version: model.version(group, *rank)?,
            readers: model.readers(group)?,
        })
    }
}

impl<R: Rendezvous, S: SourceRank> Updating<'_, R, S> {
    /// The rank, to write its parameters.
    pub fn source_mut(&mut self) -> &mut S {
        self.source
    }

    /// Declares the parameters whole and of this version, and offers them.
    ///
    /// A version names bytes for ever: what is committed later, also after a restart from an older checkpoint, has a larger
    /// number. Others may still hold, and offer, what was committed under it.
    ///
    /// # Errors
    /// [`SourceError::NotNewer`] for a version that is not above the last one; [`SourceError`] when the store cannot be
    /// reached. Where the session has ended, [`LiveSource::rejoin`] offers the version.
    pub fn commit(self, version: u64) -> Result<(), SourceError> {
        match self.desk.last {
            Some(last) if version <= last.version => {
                Err(SourceError::NotNewer { version, last: last.version })
            }
            _ => self.desk.commit(self.source, version),
        }
    }

    /// The same, of bytes that somebody else has given this version: relays take what they find.
    pub(crate) fn commit_copy(self, version: u64) -> Result<(), SourceError> {
        self.desk.commit(self.source, version)
    }
}

impl<R: Rendezvous, S: SourceRank> Drop for LiveSource<R, S> {
    fn drop(&mut self) {
        let Some(source) = self.source.take() else { return };
        let desk = &mut self.desk;
        let withdrawn = desk.withdraw().map_err(SourceError::from);
        let drained = withdrawn.and_then(|()| desk.drain(Instant::now() + desk.options.drain));
        let GroupRank { group, rank, .. } = &desk.place;
        match drained {
            Ok(left) if left.alive.is_empty() && left.expired.is_empty() => drop(source),
            Ok(left) => {
                let readers = left.alive.len() + left.expired.len();
                tracing::error!(
                    group,
                    rank,
                    readers,
                    "a source was dropped while it was read: its memory is leaked"
                );
                std::mem::forget(source);
            }
            Err(error) => {
                tracing::error!(group, rank, %error, "a source was dropped, its readers unknown: its memory is leaked");
                std::mem::forget(source);
            }
        }
    }
}

impl SourceError {
    /// Whether the session has ended: [`LiveSource::rejoin`] goes on from here.
    #[must_use]
    pub fn is_session_ended(&self) -> bool {
        matches!(self, Self::Rendezvous(RendezvousError::SessionEnded))
    }
}

/// Why a source could not do what it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The store could not be used.
    #[error(transparent)]
    Rendezvous(#[from] RendezvousError),
    /// What holds the parameters failed.
    #[error(transparent)]
    Refit(#[from] RefitError),
    /// What it would tell others is nothing that they would read.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The layout is another rank's.
    #[error(
        "rank {rank} of group `{group}` holds the layout of rank {found}; number the ranks of a group from 0"
    )]
    WrongRank {
        /// The group.
        group: String,
        /// The rank that joins.
        rank: u32,
        /// The layout's.
        found: u32,
    },
    /// The rank is there already.
    #[error(
        "rank {rank} of group `{group}` is there already, as {}; if that is its former life, its entry vanishes with its \
         session: wait longer; if not, two processes were given one rank",
        holder.map_or_else(|| "something unreadable".to_owned(), |it| format!("incarnation {it:032x}"))
    )]
    Taken {
        /// The group.
        group: String,
        /// The rank.
        rank: u32,
        /// Who is there, if that can be read.
        holder: Option<u128>,
    },
    /// The version is being read.
    #[error(
        "rank {rank} of group `{group}` is still read under {}; nothing was written: begin again later",
        readers.iter().map(Key::as_str).collect::<Vec<_>>().join(", ")
    )]
    Busy {
        /// The group.
        group: String,
        /// The rank.
        rank: u32,
        /// The leases.
        readers: Vec<Key>,
    },
    /// A version that has been, or an older one.
    #[error(
        "version {version} is not newer than {last}, which was committed last; versions name bytes for ever: count on"
    )]
    NotNewer {
        /// The version given.
        version: u64,
        /// The last one.
        last: u64,
    },
    /// The rank was given back.
    #[error("the source has left its group; join again")]
    Gone,
}
