use std::cell::RefCell;
use std::time::Instant;

use refit::{DigestRequest, Digests, Expected};

use super::{Checks, OfferError};
use crate::message::{Answer, Message, Wish};
use crate::puller::{Cause, PullFailure, Vouch};
use crate::rendezvous::{Rendezvous, RendezvousError};
use crate::seat::Seat;

/// Asks the ranks of a group, through the store.
#[derive(Debug)]
pub(super) struct Desk<'a, R: Rendezvous> {
    pub(super) seat: &'a Seat<R>,
    pub(super) name: &'a str,
    pub(super) incarnation: u128,
    pub(super) group: &'a str,
    pub(super) expected: &'a [Expected],
    pub(super) checks: Checks,
    /// The digest of the request that was written last.
    pub(super) asked: &'a RefCell<Option<[u8; 32]>>,
}

impl<R: Rendezvous> Desk<'_, R> {
    /// The answers that are there, if all ranks that were asked have answered this request for what is read.
    fn find(&self, request: &DigestRequest) -> Result<Option<Vec<Digests>>, RendezvousError> {
        let mut answers = Vec::new();
        for (rank, _) in request.ranks() {
            let key = self.seat.model().digests(self.group, rank, self.name)?;
            let mut found = self.seat.list(&key)?;
            let answer = found.entries.remove(&key).and_then(|bytes| Answer::decode(&bytes).ok());
            let expected = self.expected.iter().find(|expected| expected.rank == rank);
            let ours = |answer: &Digests, expected: &Expected| {
                answer.rank == rank
                    && answer.incarnation == expected.incarnation
                    && answer.stamp == expected.stamp()
                    && answer.request == *request.digest()
            };
            match (answer, expected) {
                (Some(Answer(answer)), Some(expected)) if ours(&answer, expected) => {
                    answers.push(answer);
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(answers))
    }
}

impl<R: Rendezvous> Vouch for Desk<'_, R> {
    fn ask(&self, request: &DigestRequest) -> Result<(), PullFailure> {
        if *self.asked.borrow() == Some(*request.digest()) {
            return Ok(());
        }
        let wish =
            Wish { incarnation: self.incarnation, pack: None, digests: Some(request.clone()) };
        let written =
            self.seat.model().wish(self.name).and_then(|key| self.seat.put(&key, &wish.encode()));
        written.map_err(|error| PullFailure::new(Cause::Failed, error))?;
        *self.asked.borrow_mut() = Some(*request.digest());
        Ok(())
    }

    fn answers(
        &self,
        request: &DigestRequest,
        deadline: Instant,
    ) -> Result<Option<Vec<Digests>>, PullFailure> {
        let store = |error: RendezvousError| PullFailure::new(Cause::Failed, error);
        let prefix = self.seat.model().digests_of(self.group).map_err(store)?;
        loop {
            let before = self.seat.list(&prefix).map_err(store)?.revision;
            let found = self.find(request).map_err(store)?;
            if found.is_some() || self.checks != Checks::Always {
                return Ok(found);
            }
            let changed = self.seat.changed(&prefix, before, deadline);
            if changed.map_err(store)?.is_none() {
                let reason = OfferError::NoDigests { group: self.group.to_owned() };
                return Err(PullFailure::new(Cause::Late, reason));
            }
        }
    }
}
