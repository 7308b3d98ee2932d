//! The side that holds the weights: registered once, read by others, never asked.

mod packed;
mod repack;

use std::sync::Arc;

use refit_planner::RankLayout;
use refit_pool::{Memory, Region};
use refit_transport::{Transport, TransportLease, TransportPool};

use crate::error::RefitError;
use crate::land::DeviceLander;
use crate::memory::in_layout_order;
use crate::publication::{Place, Publication, PublishedRegion};

pub use self::packed::{PackedSource, ParamsMut, Repacked};

/// One source rank: its parameters, registered for peers to read.
///
/// Peers read whenever they like. Whoever changes the parameters must see to it that no peer reads meanwhile, and that
/// the change is over before one may: nobody who reads waits for a stream of the trainer's. Where parameters are a
/// device's, synchronise that stream first.
#[derive(Debug)]
pub struct Source<T: Transport> {
    // Dropped before the memory: its registrations cover it.
    lease: TransportLease<T>,
    transport: Arc<T>,
    layout: RankLayout,
    params: Vec<Memory>,
    /// What fills slots in memory that the processor cannot write.
    device: Option<DeviceLander>,
}

impl<T: Transport> Source<T> {
    /// Registers the parameters of a rank. Each allocation is registered once, however many parameters it holds.
    ///
    /// # Errors
    /// [`RefitError::NoMemory`], [`RefitError::StrayMemory`], [`RefitError::Size`] when memory and layout disagree;
    /// [`RefitError::Pool`] when the transport refuses to register.
    pub fn new(
        transport: Arc<T>,
        pool: &TransportPool<T>,
        layout: RankLayout,
        params: impl IntoIterator<Item = (String, Memory)>,
    ) -> Result<Self, RefitError> {
        let params = in_layout_order(&layout, params)?;
        let key = source_key(transport.agent(), layout.rank());
        let lease = pool
            .lease(key.into(), |build| {
                build.register(params.iter().map(Memory::allocation))?;
                Ok::<_, RefitError>(Vec::new())
            })
            .map_err(RefitError::from_lease)?;
        Ok(Self { lease, transport, layout, params, device: None })
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

    /// What targets need to read from this rank. Take it after everything on this agent is registered.
    ///
    /// # Errors
    /// [`RefitError::Transport`] when the agent cannot describe itself.
    pub fn publication(&self) -> Result<Publication, RefitError> {
        self.publish(&self.layout, self.places().map(|(_, place)| place).collect(), &[])
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
        Ok(Publication::new(agent, metadata, layout.clone(), places, regions.collect())?)
    }

    /// Every parameter's memory, for the trainer to change between refits.
    pub fn params_mut(&mut self) -> impl Iterator<Item = (&str, &mut Memory)> {
        self.layout.params().iter().map(|param| param.name().as_ref()).zip(&mut self.params)
    }
}

fn source_key(agent: &str, rank: u32) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("refit source v1");
    hasher.update(&rank.to_le_bytes());
    hasher.update(agent.as_bytes());
    *hasher.finalize().as_bytes()
}
