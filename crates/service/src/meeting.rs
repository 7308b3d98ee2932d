//! What ranks say to each other before a refit: sources publish, targets look, and ask for packing.
//!
//! ```text
//! <name>/source/<rank>        a source rank's publication
//! <name>/pack/<target>        what a target rank would like sources to pack
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use refit::{PackRequest, Publication, PublicationError, RefitError, RequestError};

use crate::rendezvous::{Key, Life, Rendezvous, RendezvousError, SealError, Snapshot};

/// Where the ranks of one refit meet, over any store.
///
/// What is said here stays until it is taken back, or until the last clone of this goes, or its process dies. Ranks that
/// wait are woken by what changes.
#[derive(Debug)]
pub struct Meeting<R: Rendezvous>(Arc<Shared<R>>);

#[derive(Debug)]
struct Shared<R: Rendezvous> {
    // Ends before the store does.
    session: R::Session,
    store: R,
    name: Key,
}

/// Why ranks did not meet.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MeetingError {
    /// The store could not be used.
    #[error(transparent)]
    Rendezvous(#[from] RendezvousError),
    /// An entry is not a publication.
    #[error("`{key}`: {source}")]
    Publication {
        /// The entry.
        key: Key,
        /// What is wrong with it.
        source: PublicationError,
    },
    /// An entry is not a request.
    #[error("`{key}`: {source}")]
    Request {
        /// The entry.
        key: Key,
        /// What is wrong with it.
        source: RequestError,
    },
    /// An entry holds another rank's publication.
    #[error("`{key}` holds the publication of rank {found}, not of rank {expected}")]
    WrongRank {
        /// The entry.
        key: Key,
        /// The rank in its name.
        expected: u32,
        /// The rank inside.
        found: u32,
    },
    /// An entry holds another rank's request.
    #[error("`{key}` holds the request of target rank {found}, not of rank {expected}")]
    WrongTarget {
        /// The entry.
        key: Key,
        /// The rank in its name.
        expected: u32,
        /// The rank inside.
        found: u32,
    },
    /// Not every source rank published in time.
    #[error(
        "source ranks {missing:?} did not publish in `{at}` within {waited:?}{}",
        refusals(refused)
    )]
    NotPublished {
        /// Where they were waited for.
        at: Key,
        /// The ranks that are missing.
        missing: Vec<u32>,
        /// Those of them whose entry is there, but not this job's.
        refused: BTreeMap<u32, SealError>,
        /// How long the target waited.
        waited: Duration,
    },
    /// Not every target rank said in time what it would like to be packed.
    #[error(
        "target ranks {missing:?} did not ask in `{at}` within {waited:?}{}; one that wants nothing packed says so too",
        refusals(refused)
    )]
    NotAsked {
        /// Where they were waited for.
        at: Key,
        /// The ranks that are missing.
        missing: Vec<u32>,
        /// Those of them whose entry is there, but not this job's.
        refused: BTreeMap<u32, SealError>,
        /// How long the source waited.
        waited: Duration,
    },
    /// A publication and a request cannot be compared.
    #[error(transparent)]
    Refit(#[from] RefitError),
}

fn refusals(refused: &BTreeMap<u32, SealError>) -> String {
    let each = |(rank, error): (&u32, &SealError)| {
        format!("; what rank {rank} has there is refused: {error}")
    };
    refused.iter().map(each).collect()
}

impl<R: Rendezvous> Meeting<R> {
    /// Meets under `name` in a store. Where this process dies, what it said vanishes within `ttl`; a busy machine is no
    /// death, so let it be seconds.
    ///
    /// # Errors
    /// [`RendezvousError`].
    pub fn new(store: R, name: Key, ttl: Duration) -> Result<Self, RendezvousError> {
        let session = store.session(ttl)?;
        Ok(Self(Arc::new(Shared { session, store, name })))
    }

    /// Publishes for one source rank, replacing what it published before. Readers see the old or the new, whole.
    ///
    /// # Errors
    /// [`RendezvousError`]; [`RendezvousError::SessionEnded`] when the store took this process for dead: begin again.
    pub fn publish(&self, publication: &Publication) -> Result<(), MeetingError> {
        self.put(&self.source(publication.rank())?, &publication.encode())
    }

    /// Takes back what a rank published.
    ///
    /// # Errors
    /// [`RendezvousError`]; not when there was nothing.
    pub fn withdraw(&self, rank: u32) -> Result<(), MeetingError> {
        Ok(self.0.store.remove(&self.source(rank)?)?)
    }

    /// What a source rank has published, if it has.
    ///
    /// # Errors
    /// [`MeetingError`] when there is something but not a publication of that rank.
    pub fn read(&self, rank: u32) -> Result<Option<Publication>, MeetingError> {
        self.look(&self.source(rank)?, rank, publication)
    }

    /// Waits until every one of `ranks` has published, and gives all as they were at one moment, in ascending order.
    ///
    /// # Errors
    /// [`MeetingError::NotPublished`] names the ranks that are missing at the deadline.
    pub fn wait(
        &self,
        ranks: impl IntoIterator<Item = u32>,
        deadline: Instant,
    ) -> Result<Vec<Publication>, MeetingError> {
        let at = self.0.name.join("source")?;
        match self.gather(&at, ranks, deadline, publication, |_| Ok(true))? {
            Gathered::All(found) => Ok(found),
            Gathered::Missing { missing, refused, waited } => {
                Err(MeetingError::NotPublished { at, missing, refused, waited })
            }
        }
    }

    /// Tells sources what a target rank would like to be packed, replacing what it said before.
    ///
    /// # Errors
    /// As [`publish`](Self::publish).
    pub fn ask(&self, request: &PackRequest) -> Result<(), MeetingError> {
        self.put(&self.pack(request.target())?, &request.encode())
    }

    /// Takes back what a target rank asked for.
    ///
    /// # Errors
    /// [`RendezvousError`]; not when there was nothing.
    pub fn withdraw_request(&self, target: u32) -> Result<(), MeetingError> {
        Ok(self.0.store.remove(&self.pack(target)?)?)
    }

    /// What a target rank has asked for, if it has.
    ///
    /// # Errors
    /// [`MeetingError`] when there is something but not a request of that rank.
    pub fn request(&self, target: u32) -> Result<Option<PackRequest>, MeetingError> {
        self.look(&self.pack(target)?, target, request)
    }

    /// Waits until every one of these target ranks has said what it would like to be packed, if only nothing.
    ///
    /// # Errors
    /// [`MeetingError::NotAsked`] names the ranks that are missing at the deadline. A source can go on without packing,
    /// or with what [`request`](Self::request) finds.
    pub fn wait_for_requests(
        &self,
        targets: impl IntoIterator<Item = u32>,
        deadline: Instant,
    ) -> Result<Vec<PackRequest>, MeetingError> {
        let at = self.0.name.join("pack")?;
        match self.gather(&at, targets, deadline, request, |_| Ok(true))? {
            Gathered::All(found) => Ok(found),
            Gathered::Missing { missing, refused, waited } => {
                Err(MeetingError::NotAsked { at, missing, refused, waited })
            }
        }
    }

    /// Waits until every one of `ranks` has published and has packed what this request asks of it. What has not been
    /// packed at the deadline comes as it is: it is read as well, at the cost that it had before.
    ///
    /// # Errors
    /// [`MeetingError::NotPublished`] names the ranks that have published nothing by then.
    pub fn wait_until_packed(
        &self,
        ranks: impl IntoIterator<Item = u32>,
        request: &PackRequest,
        deadline: Instant,
    ) -> Result<Vec<Publication>, MeetingError> {
        let ranks: Vec<u32> = ranks.into_iter().collect();
        let at = self.0.name.join("source")?;
        let packed = |publication: &Publication| Ok(request.is_answered_by(publication)?);
        match self.gather(&at, ranks.iter().copied(), deadline, publication, packed)? {
            Gathered::All(found) => Ok(found),
            Gathered::Missing { missing, waited, .. } => {
                tracing::warn!(?missing, ?waited, "source ranks did not pack what was asked for");
                self.wait(ranks, deadline)
            }
        }
    }

    fn source(&self, rank: u32) -> Result<Key, RendezvousError> {
        self.0.name.join("source")?.join(rank.to_string())
    }

    fn pack(&self, target: u32) -> Result<Key, RendezvousError> {
        self.0.name.join("pack")?.join(target.to_string())
    }

    fn put(&self, key: &Key, value: &[u8]) -> Result<(), MeetingError> {
        Ok(self.0.store.put(key, value, Life::Session(&self.0.session))?)
    }

    fn look<V>(
        &self,
        key: &Key,
        rank: u32,
        decode: impl Fn(&Key, u32, &[u8]) -> Result<V, MeetingError>,
    ) -> Result<Option<V>, MeetingError> {
        let mut snapshot = self.0.store.list(key)?;
        if let Some(source) = snapshot.refused.remove(key) {
            return Err(RendezvousError::Seal { key: key.clone(), source }.into());
        }
        snapshot.entries.get(key).map(|value| decode(key, rank, value)).transpose()
    }

    /// What all of `ranks` say at one moment, once all of them say what is wanted.
    fn gather<V>(
        &self,
        at: &Key,
        ranks: impl IntoIterator<Item = u32>,
        deadline: Instant,
        decode: impl Fn(&Key, u32, &[u8]) -> Result<V, MeetingError>,
        wanted: impl Fn(&V) -> Result<bool, MeetingError>,
    ) -> Result<Gathered<V>, MeetingError> {
        let started = Instant::now();
        let keys: BTreeMap<u32, Key> = ranks
            .into_iter()
            .map(|rank| Ok((rank, at.join(rank.to_string())?)))
            .collect::<Result<_, RendezvousError>>()?;
        // What was wanted of those who said it, with the bytes in which they said it: most do not change from one look
        // to the next.
        let mut found: BTreeMap<u32, (Vec<u8>, V)> = BTreeMap::new();
        let mut snapshot = self.0.store.list(at)?;
        loop {
            let mut missing = Vec::new();
            for (rank, key) in &keys {
                let value = snapshot.entries.remove(key);
                let same =
                    value.is_some() && found.get(rank).map(|(bytes, _)| bytes) == value.as_ref();
                if same {
                    continue;
                }
                found.remove(rank);
                let decoded = value.map(|bytes| decode(key, *rank, &bytes).map(|it| (bytes, it)));
                match decoded.transpose()? {
                    Some((bytes, value)) if wanted(&value)? => {
                        found.insert(*rank, (bytes, value));
                    }
                    _ => missing.push(*rank),
                }
            }
            if missing.is_empty() {
                return Ok(Gathered::All(found.into_values().map(|(_, value)| value).collect()));
            }
            let Snapshot { revision, mut refused, .. } = snapshot;
            match self.0.store.changed(at, revision, deadline)? {
                Some(next) => snapshot = next,
                None => {
                    let refused = missing.iter().filter_map(|rank| {
                        keys.get(rank).and_then(|key| refused.remove(key)).map(|why| (*rank, why))
                    });
                    let (refused, waited) = (refused.collect(), started.elapsed());
                    return Ok(Gathered::Missing { missing, refused, waited });
                }
            }
        }
    }
}

/// What became of waiting for ranks.
enum Gathered<V> {
    All(Vec<V>),
    Missing { missing: Vec<u32>, refused: BTreeMap<u32, SealError>, waited: Duration },
}

fn publication(key: &Key, rank: u32, bytes: &[u8]) -> Result<Publication, MeetingError> {
    let publication = Publication::decode(bytes)
        .map_err(|source| MeetingError::Publication { key: key.clone(), source })?;
    let found = publication.rank();
    if found != rank {
        return Err(MeetingError::WrongRank { key: key.clone(), expected: rank, found });
    }
    Ok(publication)
}

fn request(key: &Key, target: u32, bytes: &[u8]) -> Result<PackRequest, MeetingError> {
    let request = PackRequest::decode(bytes)
        .map_err(|source| MeetingError::Request { key: key.clone(), source })?;
    let found = request.target();
    if found != target {
        return Err(MeetingError::WrongTarget { key: key.clone(), expected: target, found });
    }
    Ok(request)
}

impl<R: Rendezvous> Clone for Meeting<R> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}
