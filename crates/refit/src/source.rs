//! The side that holds the weights: registered once, read by others, never asked.

mod packed;
mod repack;
mod update;

use std::sync::Arc;

use refit_planner::RankLayout;
use refit_pool::{Memory, Region};
use refit_transport::{Transport, TransportLease, TransportPool, draw_incarnation};

use crate::digest::{self, DigestRequest, Digests, Held, Work};
use crate::error::RefitError;
use crate::header::{Expected, HEADER_BYTES, Header, Stamp};
use crate::land::DeviceLander;
use crate::memory::{Reach, in_layout_order};
use crate::publication::{Place, Publication, PublishedHeader, PublishedRegion};

pub use self::packed::{PackedSource, Repacked};
pub use self::update::{ParamsMut, Updating};

/// One source rank: its parameters, registered for peers to read.
///
/// Peers read whenever they like, and find out from the version header, which lies beside the parameters, whether these
/// changed meanwhile. So parameters are changed between [`begin_update`](Self::begin_update) and [`Updating::commit`] and
/// at no other time: what a peer has read in between is discarded. Nobody who reads waits for a stream of the trainer's.
/// Where parameters are a device's, synchronise that stream before either of them.
#[derive(Debug)]
pub struct Source<T: Transport> {
    // Dropped before the memory: its registrations cover it. Its one arena is the header.
    lease: TransportLease<T>,
    transport: Arc<T>,
    layout: RankLayout,
    /// What the header says; where it could not be written, what it is to say next.
    header: Header,
    params: Vec<Memory>,
    /// What fills slots in memory that the processor cannot write.
    device: Option<DeviceLander>,
    reach: Reach,
}

impl<T: Transport> Source<T> {
    /// Registers the parameters of a rank, and a header beside them, for which the pool allocates: a pool of the memory that
    /// the parameters are in. Each allocation is registered once, however many parameters it holds.
    ///
    /// The parameters are readable as they are, under version 0, until the first [`begin_update`](Self::begin_update).
    ///
    /// # Errors
    /// [`RefitError::NoMemory`], [`RefitError::StrayMemory`], [`RefitError::Size`] when memory and layout disagree;
    /// [`RefitError::Pool`] when the transport refuses to register, or there is no memory for the header;
    /// [`RefitError::NotHost`] and [`RefitError::Device`] when the header cannot be written.
    pub fn new(
        transport: Arc<T>,
        pool: &TransportPool<T>,
        layout: RankLayout,
        params: impl IntoIterator<Item = (String, Memory)>,
    ) -> Result<Self, RefitError> {
        let params = in_layout_order(&layout, params)?;
        Self::of(transport, pool, layout, params).map_err(|refused| refused.0)
    }

    /// A source of parameters in the order of the layout. They come back when there is none.
    pub(crate) fn of(
        transport: Arc<T>,
        pool: &TransportPool<T>,
        layout: RankLayout,
        params: Vec<Memory>,
    ) -> Result<Self, Box<(RefitError, Vec<Memory>)>> {
        let reach = Reach::default();
        match Self::register(&transport, pool, &layout, &params, &reach) {
            Ok((lease, header)) => {
                Ok(Self { lease, transport, layout, header, params, device: None, reach })
            }
            Err(error) => Err(Box::new((error, params))),
        }
    }

    fn register(
        transport: &Arc<T>,
        pool: &TransportPool<T>,
        layout: &RankLayout,
        params: &[Memory],
        reach: &Reach,
    ) -> Result<(TransportLease<T>, Header), RefitError> {
        let span = tracing::debug_span!("setup_registration", rank = layout.rank());
        let _entered = span.enter();
        let incarnation = draw_incarnation(transport.agent())?;
        let header = Header { incarnation, stamp: Stamp::default() };
        let key = source_key(transport.agent(), layout.rank(), params);
        let mut lease = pool
            .lease(key.into(), |build| {
                build.arena(HEADER_BYTES as u64)?;
                build.register(params.iter().map(Memory::allocation))?;
                Ok::<_, RefitError>(Vec::new())
            })
            .map_err(RefitError::from_lease)?;
        header.store_by(&mut lease.arenas_mut()[0], None, reach)?;
        Ok((lease, header))
    }

    /// Packs by this device's kernel, which parameters in its memory need, on its stream: behind whatever the trainer has
    /// queued there.
    #[cfg(feature = "cuda")]
    #[cfg_attr(docsrs, doc(cfg(feature = "cuda")))]
    #[must_use]
    pub fn with_device(mut self, device: DeviceLander) -> Self {
        self.device = Some(device);
        self
    }

    /// The rank's layout.
    #[must_use]
    pub fn layout(&self) -> &RankLayout {
        &self.layout
    }

    /// What the version header says.
    #[must_use]
    pub fn header(&self) -> Header {
        self.header
    }

    /// What targets are to be told to expect of this rank; nothing while its parameters are being written.
    #[must_use]
    pub fn offered(&self) -> Option<Expected> {
        self.header.offered_by(self.layout.rank())
    }

    /// What targets need to read from this rank. Take it after everything on this agent is registered.
    ///
    /// # Errors
    /// [`RefitError::Transport`] when the agent cannot describe itself.
    pub fn publication(&self) -> Result<Publication, RefitError> {
        self.publish(&self.layout, self.places().map(|(_, place)| place).collect(), &[])
    }

    /// Answers what a target asks of this rank: a digest of every segment that it reads, as it is to be held there. On the
    /// host at the rate of memory; memory of a device is fetched, which takes as long as that takes.
    ///
    /// # Errors
    /// [`RefitError::BeingWritten`] while a change is under way; [`RefitError::UnknownSourceParam`],
    /// [`RefitError::AskedOutside`] and [`RefitError::AskedTooMuch`] for what this rank does not have;
    /// [`RefitError::NotHost`] and [`RefitError::Device`] for memory that cannot be read.
    pub fn digests(&self, request: &DigestRequest) -> Result<Digests, RefitError> {
        let held = |index: usize| self.held(index);
        self.answer(request, digest::work_of(request, &self.layout, held)?)
    }

    /// One of the parameters.
    fn held(&self, index: usize) -> Result<Held<'_>, RefitError> {
        let (memory, param) = (&self.params[index], &self.layout.params()[index]);
        Ok(Held { memory, offset: 0, bytes: param.bytes(), name: param.name() })
    }

    fn answer(
        &self,
        request: &DigestRequest,
        mut work: Vec<Work<'_>>,
    ) -> Result<Digests, RefitError> {
        let (rank, Header { incarnation, stamp }) = (self.layout.rank(), self.header);
        if !stamp.is_stable() {
            return Err(RefitError::BeingWritten { rank });
        }
        digest::hash_all(&mut work, self.device.as_ref(), &self.reach)?;
        let values = work.iter().map(|work| work.value).collect();
        Ok(Digests { rank, incarnation, stamp, request: *request.digest(), values })
    }

    /// Where each parameter is, by name and in the order of the layout.
    fn places(&self) -> impl Iterator<Item = (&str, Place)> {
        let names = self.layout.params().iter().map(|param| param.name().as_ref());
        names.zip(self.params.iter().map(|memory| Place::new(memory.address(), memory.kind())))
    }

    /// Publishes a layout that is held in the memory of this source and in what else was registered.
    fn publish(
        &self,
        layout: &RankLayout,
        places: Vec<Place>,
        registered: &[Region],
    ) -> Result<Publication, RefitError> {
        let regions = self.lease.registered().iter().chain(registered);
        let regions = regions.map(|region| PublishedRegion {
            address: region.address(),
            len: region.len(),
            cuda: Place::new(region.address(), region.kind()).cuda,
        });
        let agent = self.transport.agent().to_owned();
        let metadata = self.transport.metadata()?;
        let memory = &self.lease.arenas()[0];
        let place = Place::new(memory.address(), memory.kind());
        let header = PublishedHeader { incarnation: self.header.incarnation, place };
        Ok(Publication::new(agent, metadata, layout.clone(), header, places, regions.collect())?)
    }

    /// Every parameter's memory, by name.
    pub fn params(&self) -> impl Iterator<Item = (&str, &Memory)> {
        self.layout.params().iter().map(|param| param.name().as_ref()).zip(&self.params)
    }
}

/// What decides the registrations. With the memory, which another source of the same rank does not share.
fn source_key(agent: &str, rank: u32, params: &[Memory]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("refit source v2");
    hasher.update(&rank.to_le_bytes());
    hasher.update(&(agent.len() as u64).to_le_bytes());
    hasher.update(agent.as_bytes());
    for allocation in params.iter().map(Memory::allocation) {
        hasher.update(&allocation.address().to_le_bytes());
        hasher.update(&allocation.len().to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}
