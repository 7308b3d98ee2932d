use std::collections::BTreeMap;
use std::sync::Arc;

use refit::{Expected, Publication};

use super::OfferError;
use crate::groups::{Census, Offer};
use crate::message::{Message, ReaderLease};
use crate::puller::{Cause, PullFailure, Reading};
use crate::rendezvous::{Key, Rendezvous, RendezvousError};
use crate::seat::Seat;

/// The right to read an offer, which its source respects until it runs out. Given back when it is dropped.
#[derive(Debug)]
pub struct Lease<R: Rendezvous> {
    seat: Seat<R>,
    /// `None` once it was given back.
    key: Option<Key>,
    offer: Offer,
    publications: Arc<[Publication]>,
    expected: Vec<Expected>,
}

/// Why a lease was not had.
pub(super) enum NotLeased {
    /// Enough others read.
    Crowded,
    Store(RendezvousError),
    Failed(PullFailure),
}

impl From<RendezvousError> for NotLeased {
    fn from(error: RendezvousError) -> Self {
        Self::Store(error)
    }
}

impl<R: Rendezvous> Lease<R> {
    /// Writes the lease. It is good for nothing until it is [confirmed](Self::confirm).
    pub(super) fn take(
        seat: &Seat<R>,
        offer: &Offer,
        incarnation: u128,
        millis: u32,
        name: &str,
    ) -> Result<Self, RendezvousError> {
        let key = seat.model().reader(&offer.group, name)?;
        let value = ReaderLease { incarnation, version: offer.version, millis };
        seat.put(&key, &value.encode())?;
        let expected = offer.ranks.iter().map(|rank| Expected {
            rank: rank.member.rank,
            incarnation: rank.member.incarnation,
            version: offer.version,
            epoch: rank.epoch,
        });
        Ok(Self {
            seat: seat.clone(),
            key: Some(key),
            expected: expected.collect(),
            offer: offer.clone(),
            publications: Arc::default(),
        })
    }

    /// Whether the offer still stood after the lease was written. Only then does its source wait for us.
    pub(super) fn confirm(&self, census: &Census) -> Result<(), NotLeased> {
        let (group, version) = (self.offer.group.clone(), self.offer.version);
        let reason = match (census.offers.get(&group), census.withheld.get(&group)) {
            (Some(offer), _) if *offer == self.offer => return Ok(()),
            (Some(offer), _) => {
                let restarted = offer
                    .ranks
                    .iter()
                    .zip(&self.offer.ranks)
                    .any(|(now, before)| now.member.incarnation != before.member.incarnation);
                if restarted {
                    let reason = OfferError::Restarted { group };
                    return Err(NotLeased::Failed(PullFailure::new(Cause::Stale, reason)));
                }
                OfferError::Moved { group, version, now: offer.version }
            }
            (None, Some(why)) => OfferError::Withdrawn { group, version, why: why.clone() },
            (None, None) => OfferError::Left { group },
        };
        Err(NotLeased::Failed(PullFailure::new(Cause::Vanished, reason)))
    }

    /// Reads the publications of all ranks, those that are not known from before.
    pub(super) fn read_publications(&mut self, known: Arc<[Publication]>) -> Result<(), NotLeased> {
        let fail = |cause, reason: OfferError| NotLeased::Failed(PullFailure::new(cause, reason));
        let digests = self.offer.ranks.iter().map(|rank| &rank.member.publication);
        if known.len() == self.offer.ranks.len()
            && known.iter().map(Publication::digest).eq(digests)
        {
            self.publications = known;
            return Ok(());
        }
        let known: BTreeMap<&[u8; 32], &Publication> =
            known.iter().map(|publication| (publication.digest(), publication)).collect();
        let name = &self.offer.group;
        let mut publications = Vec::with_capacity(self.offer.ranks.len());
        for rank in &self.offer.ranks {
            let group = || name.clone();
            let (rank, digest) = (rank.member.rank, &rank.member.publication);
            let publication = match known.get(digest) {
                Some(publication) => (*publication).clone(),
                None => {
                    let key = self.seat.model().publication(name, rank)?;
                    let mut found = self.seat.list(&key)?;
                    let Some(bytes) = found.entries.remove(&key) else {
                        let reason = OfferError::NoPublication { group: group(), rank };
                        return Err(fail(Cause::Vanished, reason));
                    };
                    Publication::decode(&bytes).map_err(|source| {
                        fail(
                            Cause::Refused,
                            OfferError::Publication { group: group(), rank, source },
                        )
                    })?
                }
            };
            if publication.digest() != digest {
                let reason = OfferError::Republished { group: group(), rank };
                return Err(fail(Cause::Stale, reason));
            }
            if publication.rank() != rank {
                let found = publication.rank();
                let reason = OfferError::OtherRank { group: group(), rank, found };
                return Err(fail(Cause::Refused, reason));
            }
            publications.push(publication);
        }
        self.publications = publications.into();
        Ok(())
    }

    /// What there is to read.
    #[must_use]
    pub fn reading(&self) -> Reading<'_> {
        Reading {
            group: &self.offer.group,
            version: self.offer.version,
            publications: &self.publications,
            expected: &self.expected,
            vouch: None,
        }
    }

    /// Gives it back, and the group with what is known of it.
    pub(super) fn release(mut self) -> (String, Arc<[Publication]>) {
        self.give_back();
        (self.offer.group.clone(), std::mem::take(&mut self.publications))
    }

    fn give_back(&mut self) {
        let Some(key) = self.key.take() else { return };
        if let Err(error) = self.seat.rendezvous().remove(&key) {
            // It runs out by itself.
            tracing::warn!(lease = %key, %error, "a lease could not be given back");
        }
    }
}

impl<R: Rendezvous> Drop for Lease<R> {
    fn drop(&mut self) {
        self.give_back();
    }
}
