use std::sync::Arc;
use std::time::Instant;

use refit::planner::RankLayout;
use refit::pool::{LeaseError, Memory};
use refit::transport::{Transport, TransportLease, TransportPool, draw_incarnation};
use refit::{
    HEADER_BYTES, Header, Place, Publication, PublishedHeader, PublishedRegion, RefitError, Stamp,
    Target,
};

use crate::puller::{PullFailure, Puller, Reading};
use crate::replica::{InstallError, Stage};
use crate::source::SourceRank;

/// A target rank that others may read from: its parameters, registered, and a header beside them.
#[derive(Debug)]
pub struct Lending<T: Transport, P> {
    // Dropped before the target: its registrations cover the target's memory.
    header: LentHeader<T>,
    target: P,
}

#[derive(Debug)]
struct LentHeader<T: Transport> {
    /// Registers the target's parameters; its one arena is the header.
    lease: TransportLease<T>,
    transport: Arc<T>,
    layout: RankLayout,
    places: Vec<Place>,
    header: Header,
}

impl<T: Transport, P> Lending<T, P> {
    /// Registers the parameters of `target`, and has `wrap` make a rank of it that pulls into them.
    ///
    /// The header is allocated by the pool, which is one of the memory that the parameters are in.
    ///
    /// # Errors
    /// [`RefitError`] when the transport refuses to register, and where the header cannot be written; and what `wrap`
    /// fails with.
    pub fn new(
        transport: Arc<T>,
        pool: &TransportPool<T>,
        target: Target<T>,
        wrap: impl FnOnce(Target<T>) -> Result<P, RefitError>,
    ) -> Result<Self, RefitError> {
        let incarnation = draw_incarnation(transport.agent())?;
        let layout = target.layout().clone();
        let params: Vec<&Memory> = target.params().map(|(_, memory)| memory).collect();
        let places = params.iter().map(|memory| Place::new(memory.address(), memory.kind()));
        let places: Vec<Place> = places.collect();
        let mut hasher = blake3::Hasher::new_derive_key("refit service lent target v1");
        hasher.update(&incarnation.to_le_bytes());
        let key = *hasher.finalize().as_bytes();
        let leased = pool.lease(key.into(), |build| {
            build.arena(HEADER_BYTES as u64)?;
            build.register(params.iter().map(|memory| memory.allocation()))?;
            Ok::<_, RefitError>(Vec::new())
        });
        let mut lease = leased.map_err(|error| match error {
            LeaseError::Pool(error) => RefitError::Pool(error),
            LeaseError::Build(error) => error,
            _ => RefitError::Unsupported { what: "a pool error that this release does not know" },
        })?;
        // Odd: what is in there now is no version.
        let header = Header { incarnation, stamp: Stamp { epoch: 1, version: 0 } };
        store(&mut lease, header)?;
        let header = LentHeader { lease, transport, layout, places, header };
        Ok(Self { header, target: wrap(target)? })
    }

    /// The rank that pulls.
    #[must_use]
    pub fn target(&self) -> &P {
        &self.target
    }
}

fn store<T: Transport>(lease: &mut TransportLease<T>, header: Header) -> Result<(), RefitError> {
    let arena = lease.arenas_mut().first_mut().ok_or(RefitError::NoStaging)?;
    header.store(arena)
}

impl<T: Transport> LentHeader<T> {
    fn next_epoch(&self) -> Result<u64, RefitError> {
        let rank = self.layout.rank();
        self.header.stamp.epoch.checked_add(1).ok_or(RefitError::Epochs { rank })
    }

    /// Writes a header with the next epoch. The epoch is spent, also if that fails.
    fn advance(&mut self, version: u64) -> Result<(), RefitError> {
        self.header.stamp = Stamp { epoch: self.next_epoch()?, version };
        store(&mut self.lease, self.header)
    }
}

impl<T: Transport, P: std::fmt::Debug> SourceRank for Lending<T, P> {
    fn publication(&self) -> Result<Publication, RefitError> {
        let LentHeader { lease, transport, layout, places, header } = &self.header;
        let regions = lease.registered().iter().map(|region| PublishedRegion {
            address: region.address(),
            len: region.len(),
            cuda: Place::new(region.address(), region.kind()).cuda,
        });
        let arena = lease.arenas().first().ok_or(RefitError::NoStaging)?;
        let place = Place::new(arena.address(), arena.kind());
        let header = PublishedHeader { incarnation: header.incarnation, place };
        let agent = transport.agent().to_owned();
        let (metadata, layout) = (transport.metadata()?, layout.clone());
        Ok(Publication::new(agent, metadata, layout, header, places.clone(), regions.collect())?)
    }

    fn incarnation(&self) -> u128 {
        self.header.header.incarnation
    }

    fn begin(&mut self) -> Result<(), RefitError> {
        let Stamp { version, .. } = self.header.header.stamp;
        if self.header.header.stamp.is_stable() { self.header.advance(version) } else { Ok(()) }
    }

    fn commit(&mut self, version: u64) -> Result<u64, RefitError> {
        // After a header that may be half written, and after one that is even, the next but one is.
        self.begin()?;
        self.header.advance(version)?;
        Ok(self.header.header.stamp.epoch)
    }
}

impl<T: Transport, P: Puller> Puller for Lending<T, P> {
    fn pull(&mut self, reading: &Reading<'_>, deadline: Instant) -> Result<(), PullFailure> {
        self.target.pull(reading, deadline)
    }

    fn make_ready(&mut self, deadline: Instant) -> Result<(), PullFailure> {
        self.target.make_ready(deadline)
    }
}

impl<T: Transport, P: Stage> Stage for Lending<T, P> {
    fn install(&mut self, version: u64) -> Result<(), InstallError> {
        self.target.install(version)
    }

    fn resume(&mut self, version: u64) {
        self.target.resume(version);
    }
}
