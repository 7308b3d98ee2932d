//! A target that offers what it has read: to whoever reads, one more group.

use std::time::Instant;

use crate::puller::{Cause, PullFailure, Puller, Reading};
use crate::rendezvous::Rendezvous;
use crate::replica::{InstallError, Stage};
use crate::seat::{Reseat, Seat};
use crate::source::{GroupRank, LiveSource, SourceError, SourceOptions, SourceRank};
use crate::stats::ServiceStats;

/// A target rank whose staging memory is a source rank of its own: what it has read whole others may read from it, until it
/// reads the next.
///
/// It keeps the same fence as a trainer: the version is closed and its readers are waited for before a byte is overwritten,
/// and its header is odd while reads write. The group is complete when all ranks of the replica hold one version.
#[derive(Debug)]
pub struct Relay<R: Rendezvous, P: SourceRank + Puller>(LiveSource<R, P>);

impl<R: Rendezvous, P: SourceRank + Puller> Relay<R, P> {
    /// Makes this target rank a member of a group, which offers nothing until it has read something.
    ///
    /// # Errors
    /// [`SourceError`], as [`LiveSource::join`].
    pub fn join(
        seat: Seat<R>,
        place: GroupRank,
        target: P,
        mut options: SourceOptions,
        deadline: Instant,
    ) -> Result<Self, SourceError> {
        options.relay = true;
        LiveSource::join(seat, place, target, options, deadline).map(Self)
    }

    /// The target rank.
    #[must_use]
    pub fn target(&self) -> Option<&P> {
        self.0.source()
    }

    /// The version that is offered, if one is.
    #[must_use]
    pub fn offered(&self) -> Option<u64> {
        self.0.offered()
    }

    /// What has happened on the side that offers.
    #[must_use]
    pub fn stats(&self) -> &ServiceStats {
        self.0.stats()
    }

    /// Offers again what it holds, under another session, after the last one has ended.
    ///
    /// # Errors
    /// [`SourceError`], as [`LiveSource::rejoin`].
    pub fn rejoin(&mut self, seat: Seat<R>, deadline: Instant) -> Result<(), SourceError> {
        self.0.rejoin(seat, deadline)
    }

    /// Leaves the group, as [`LiveSource::leave`].
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn leave(self, deadline: Instant) -> Result<crate::source::Left<P>, SourceError> {
        self.0.leave(deadline)
    }
}

impl<R: Rendezvous, P: SourceRank + Puller> Puller for Relay<R, P> {
    fn pull(&mut self, reading: &Reading<'_>, deadline: Instant) -> Result<(), PullFailure> {
        let mut updating = self.0.begin_update(deadline).map_err(failure)?;
        updating.source_mut().pull(reading, deadline)?;
        updating.commit_copy(reading.version).map_err(failure)
    }

    fn make_ready(&mut self, group: &str, deadline: Instant) -> Result<(), PullFailure> {
        let mut updating = self.0.begin_update(deadline).map_err(failure)?;
        updating.source_mut().make_ready(group, deadline)
    }

    fn quarantined_bytes(&self) -> u64 {
        self.0.source().map_or(0, Puller::quarantined_bytes)
    }
}

impl<R: Rendezvous, P: SourceRank + Stage> Stage for Relay<R, P> {
    /// The staged bytes are read, not written: readers go on.
    fn install(&mut self, version: u64) -> Result<(), InstallError> {
        match self.0.source_to_read() {
            Some(target) => target.install(version),
            None => Err(InstallError::new(SourceError::Gone)),
        }
    }

    fn resume(&mut self, version: u64) {
        if let Some(target) = self.0.source_to_read() {
            target.resume(version);
        }
    }
}

impl<R: Rendezvous, P: SourceRank + Puller> Reseat<R> for Relay<R, P> {
    fn reseat(&mut self, seat: &Seat<R>, deadline: Instant) -> Result<(), SourceError> {
        self.rejoin(seat.clone(), deadline)
    }
}

/// A relay that cannot offer fails its pull: what it has read may be overwritten by nobody's leave but its own.
fn failure(error: SourceError) -> PullFailure {
    let cause = match error {
        SourceError::Busy { .. } => Cause::Late,
        _ => Cause::Failed,
    };
    PullFailure::new(cause, error)
}
