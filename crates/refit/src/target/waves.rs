//! The waves of a refit while they are under way: posted, arrived, landed.
//!
//! The processor lands a wave before the next is posted: it would have to share the parameters with the reads. A device
//! lands while reads go on, so that as many waves are under way as have staging memory of their own, and the wire has
//! always something to do.

use std::ops::{ControlFlow, Range};
use std::time::{Duration, Instant};

use refit_transport::{Progress, Pull, PullError, Refusal, Settled, Transport, TransportLease};

use super::versions::Phase;
use super::{Inner, Refit};
use crate::error::RefitError;

/// Where the waves of a refit stand.
#[derive(Debug)]
pub(super) enum Reading<T: Transport> {
    /// Reads are under way, or wait for a landing to make room.
    UnderWay(Pull<T>),
    /// All waves have arrived, and all but the last have begun to land.
    Arrived(TransportLease<T>),
    /// No read is under way that could be waited for.
    Stopped(Stop<T>),
}

/// Why waves do not go on.
#[derive(Debug)]
pub(super) enum Stop<T: Transport> {
    /// Time is up. Reads are under way still.
    Deadline(Box<Pull<T>>),
    Pull(PullError<T>),
    Landing(RefitError),
    /// What was read is not to be used.
    Version(RefitError),
}

impl<T: Transport> Refit<T> {
    /// Posts the first reads.
    pub(super) fn begin(&mut self, lease: TransportLease<T>) -> Reading<T> {
        // A refit that failed may have left landings behind.
        match self.wait_landed(0..self.ends.len()) {
            Ok(()) if self.phase == Phase::Before => self.post_headers(lease),
            Ok(()) => self.post(lease),
            Err(error) => Reading::Stopped(Stop::Landing(error)),
        }
    }

    /// Prepares landing while the first reads are under way. If that fails, they have to settle before anybody is told.
    pub(super) fn make_ready_to_land(&mut self) {
        self.failed = self.inner.planned[0].landings.make_ready(&self.program).err();
    }

    /// Posts the next waves, as many as may be under way, when none is.
    fn post(&mut self, lease: TransportLease<T>) -> Reading<T> {
        let first = self.posted;
        self.posted = (first + self.window()).min(self.ends.len());
        let batches = self.batches(first).start..self.ends[self.posted - 1];
        let reading = self.start(lease, batches);
        if first == 0 {
            self.report.posting = match &reading {
                Reading::UnderWay(pull) => pull.stats().posting,
                _ => Duration::ZERO,
            };
            self.report.ready = self.began.elapsed().saturating_sub(self.report.posting);
        }
        reading
    }

    /// Posts the reads of the headers, when nothing else is under way.
    fn post_headers(&mut self, lease: TransportLease<T>) -> Reading<T> {
        let data = self.ends.last().copied().unwrap_or_default();
        self.report.headers += self.watched.len() as u64;
        self.start(lease, data..data + self.watched.len())
    }

    fn start(&mut self, lease: TransportLease<T>, batches: Range<usize>) -> Reading<T> {
        let live = std::mem::take(&mut self.inner.live);
        match Pull::start(self.inner.transport.clone(), lease, live, batches) {
            Ok(pull) => Reading::UnderWay(pull),
            Err(error) => Reading::Stopped(Stop::Pull(error)),
        }
    }

    /// Looks at what is under way and moves it on. Never waits for reads; what the processor lands is landed here.
    pub(super) fn drive(&mut self, mut pull: Pull<T>) -> Reading<T> {
        pull.poll();
        if self.phase != Phase::Data {
            return match pull.progress() {
                Progress::Pending => Reading::UnderWay(pull),
                Progress::Done | Progress::Failed => self.headers_ended(pull.finish()),
            };
        }
        if self.lands_beside_reads()
            && self.failed.is_none()
            && let Err(error) = self.move_on(&mut pull)
        {
            // Its reads have to settle before anybody is told.
            self.failed = Some(error);
        }
        match pull.progress() {
            Progress::Pending => Reading::UnderWay(pull),
            Progress::Done
                if self.lands_beside_reads()
                    && self.failed.is_none()
                    && self.posted < self.ends.len() =>
            {
                Reading::UnderWay(pull)
            }
            Progress::Done | Progress::Failed => self.ended(pull.finish()),
        }
    }

    /// Begins to land what has arrived, and posts what has found room. The last wave lands when it is asked to.
    fn move_on(&mut self, pull: &mut Pull<T>) -> Result<(), RefitError> {
        while self.wave + 1 < self.ends.len() && pull.has_arrived(self.batches(self.wave)) {
            let staging = pull.device_arena();
            let Inner { planned, live, .. } = &mut *self.inner;
            planned[0].landings.land(&self.program, self.wave, staging, live)?;
            self.wave += 1;
        }
        while self.posted < self.ends.len() {
            let before = self.posted - self.program.slots();
            if before >= self.wave || !self.inner.planned[0].landings.has_landed(before)? {
                break;
            }
            pull.extend(self.ends[self.posted]).map_err(refused)?;
            self.posted += 1;
        }
        Ok(())
    }

    /// Takes back what reads that have ended wrote.
    fn settled(
        &mut self,
        ended: Result<Settled<T>, PullError<T>>,
    ) -> ControlFlow<Reading<T>, TransportLease<T>> {
        match ended {
            Ok(Settled { lease, live, .. }) => {
                self.inner.live = live;
                ControlFlow::Continue(lease)
            }
            Err(PullError::Deadline { pull }) => ControlFlow::Break(Reading::UnderWay(*pull)),
            Err(error) => ControlFlow::Break(Reading::Stopped(Stop::Pull(error))),
        }
    }

    /// Goes on after the headers have been read.
    fn headers_ended(&mut self, ended: Result<Settled<T>, PullError<T>>) -> Reading<T> {
        let lease = match self.settled(ended) {
            ControlFlow::Continue(lease) => lease,
            ControlFlow::Break(reading) => return reading,
        };
        let looked = self.look(&lease);
        self.sync = tracing::Span::none();
        match looked {
            Err(error) => Reading::Stopped(Stop::Version(error)),
            Ok(()) if self.phase == Phase::Before => {
                self.phase = Phase::Data;
                self.post(lease)
            }
            Ok(()) => {
                self.report.pull = self.started.elapsed().saturating_sub(self.report.land);
                Reading::Arrived(lease)
            }
        }
    }

    /// Goes on after data has been read.
    fn ended(&mut self, ended: Result<Settled<T>, PullError<T>>) -> Reading<T> {
        let lease = match self.settled(ended) {
            ControlFlow::Continue(lease) => lease,
            ControlFlow::Break(reading) => return reading,
        };
        if let Some(error) = self.failed.take() {
            return Reading::Stopped(Stop::Landing(error));
        }
        if self.posted == self.ends.len() {
            // Never with the data: what is posted together arrives in any order.
            self.phase = Phase::After;
            self.sync = tracing::debug_span!("receive_sync", rank = self.inner.layout.rank());
            return self.post_headers(lease);
        }
        if let Err(error) = self.land(&lease) {
            return Reading::Stopped(Stop::Landing(error));
        }
        self.wave += 1;
        self.post(lease)
    }

    /// Lands what the current wave has staged. On a device this only begins here.
    pub(super) fn land(&mut self, lease: &TransportLease<T>) -> Result<(), RefitError> {
        let started = Instant::now();
        let Inner { planned, live, .. } = &mut *self.inner;
        let staging = lease.arenas().first();
        planned[0].landings.land(&self.program, self.wave, staging, live)?;
        self.report.land += started.elapsed();
        Ok(())
    }

    /// Writes the fills and waits for everything that lands.
    pub(super) fn fill(&mut self) -> Result<(), RefitError> {
        let started = Instant::now();
        let Inner { planned, live, .. } = &mut *self.inner;
        planned[0].landings.fill(&self.program, live)?;
        self.report.land += started.elapsed();
        Ok(())
    }

    /// Waits until these waves have landed, as far as they were begun.
    pub(super) fn wait_landed(&mut self, waves: Range<usize>) -> Result<(), RefitError> {
        self.inner.planned[0].landings.wait(waves)
    }

    /// Sees to it that nothing is landed any more into parameters that are handed back. If waiting fails, the device has
    /// failed and moves nothing.
    pub(super) fn end_landings(&mut self) {
        if let Err(landing) = self.wait_landed(0..self.ends.len()) {
            tracing::warn!(%landing, "a landing failed as well");
        }
    }

    fn lands_beside_reads(&self) -> bool {
        self.inner.planned[0].landings.are_beside_reads()
    }

    /// How many waves may be under way at once.
    fn window(&self) -> usize {
        if self.lands_beside_reads() { self.program.slots() } else { 1 }
    }

    /// The lease's batches of a wave.
    fn batches(&self, wave: usize) -> Range<usize> {
        wave.checked_sub(1).map_or(0, |before| self.ends[before])..self.ends[wave]
    }
}

fn refused(refusal: Refusal) -> RefitError {
    match refusal {
        Refusal::NotOwned { batch, len } => RefitError::NotOwned { batch, len },
        Refusal::Overlap { first, second } => RefitError::Overlap { first, second },
        _ => RefitError::Unsupported { what: "a wave whose reads were not prepared" },
    }
}
