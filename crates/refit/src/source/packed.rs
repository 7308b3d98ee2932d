//! A source that offers dense copies of what its targets would read scattered.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use refit_planner::{PackSlot, Packed, Param, RankLayout, pack};
use refit_pool::{ArenaPlan, Memory};
use refit_transport::{Transport, TransportLease, TransportPool};

use super::repack::{self, Copies, Placed};
use super::{ParamsMut, Source};
use crate::digest::{self, DigestRequest, Digests, Held};
use crate::error::RefitError;
use crate::header::{Expected, Header};
use crate::memory::PARAM_ALIGN;
use crate::publication::{Place, Publication};
use crate::request::PackRequest;
use crate::target::Failed;

/// One source rank that has packed: where targets each want some columns of its parameters, it offers them as dense
/// *slots*, which are read by one large read and nothing else.
///
/// Slots are copies, so they are stale when the parameters have changed. That is why committing a change fills them:
/// also of a trainer that writes its parameters by other means than [`Updating::params_mut`](super::Updating::params_mut),
/// as kernels of its own do.
///
/// They take memory of their own: at most as much as the parameters that are packed, which of dense models are the
/// row-parallel ones (about a third of a rank).
#[derive(Debug)]
pub struct PackedSource<T: Transport> {
    /// Dropped before the memory it has registered. None where nothing is packed.
    slots: Option<Slots<T>>,
    pub(super) source: Source<T>,
    packed: Packed,
    repacked: Repacked,
}

/// The memory of the slots.
#[derive(Debug)]
struct Slots<T: Transport> {
    /// Dropped before the memory that a kernel may still write.
    copies: Copies,
    /// With one arena.
    lease: TransportLease<T>,
    /// Where each slot begins in it, in the order of the slots, which is ascending.
    offsets: Vec<u64>,
}

impl<T: Transport> Slots<T> {
    fn arena(&self) -> &Memory {
        &self.lease.arenas()[0]
    }
}

/// What filling the slots came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Repacked {
    /// Bytes copied.
    pub bytes: u64,
    /// How long it took.
    pub elapsed: Duration,
}

impl<T: Transport> Source<T> {
    /// Packs what these requests ask of this rank, into one arena of the pool, and fills it from the parameters as they
    /// are. What was published before stays true of the parameters; publish again for targets to read the slots.
    ///
    /// # Errors
    /// [`RefitError::SlotBudget`] when the slots would take more than `budget` bytes; [`RefitError::Pack`] when a box
    /// reaches outside its tensor, or a parameter has the name of a slot; [`RefitError::NotHost`] for parameters that
    /// this build cannot copy; [`RefitError::Pool`] when the memory cannot be had or registered. The source comes back
    /// as it was.
    pub fn pack(
        self,
        pool: &TransportPool<T>,
        requests: &[PackRequest],
        budget: u64,
    ) -> Result<PackedSource<T>, Failed<Box<Self>>> {
        let (packed, slots) = match Slots::for_requests(&self, pool, requests, budget) {
            Ok(made) => made,
            Err(error) => return Err(Failed { error, state: Box::new(self) }),
        };
        let repacked = Repacked::default();
        let mut source = PackedSource { slots, source: self, packed, repacked };
        match source.repack() {
            Ok(()) => Ok(source),
            Err(error) => Err(Failed { error, state: Box::new(source.unpack()) }),
        }
    }
}

impl<T: Transport> PackedSource<T> {
    /// What the rank offers: its slots, and what of its parameters is not in them.
    #[must_use]
    pub fn layout(&self) -> &RankLayout {
        self.packed.layout()
    }

    /// The rank's own layout, as it was before packing.
    #[must_use]
    pub fn unpacked_layout(&self) -> &RankLayout {
        self.source.layout()
    }

    /// Bytes of memory that the slots take.
    #[must_use]
    pub fn slot_bytes(&self) -> u64 {
        self.slots.as_ref().map_or(0, |slots| slots.arena().len() as u64)
    }

    /// What targets need to read from this rank. Take it after everything on this agent is registered.
    ///
    /// # Errors
    /// [`RefitError::StaleSlots`] when a change was begun and not committed, so that the slots may not be filled; [`RefitError::Transport`] when the
    /// agent cannot describe itself.
    pub fn publication(&self) -> Result<Publication, RefitError> {
        if !self.header().stamp.is_stable() {
            return Err(RefitError::StaleSlots { rank: self.source.layout.rank() });
        }
        let mut places: BTreeMap<&str, Place> = self.source.places().collect();
        if let Some(slots) = &self.slots {
            places.extend(self.packed.slots().iter().zip(&slots.offsets).map(|(slot, offset)| {
                (&*slot.name, Place::new(slots.arena().address() + offset, slots.arena().kind()))
            }));
        }
        let of_param = |param: &Param| {
            let name = param.name();
            let rank = self.source.layout.rank();
            let missing = || RefitError::NoMemory { rank, param: name.to_string() };
            places.get(name.as_ref()).copied().ok_or_else(missing)
        };
        let layout = self.packed.layout();
        let places = layout.params().iter().map(of_param).collect::<Result<_, _>>()?;
        let registered = self.slots.as_ref().map_or(&[][..], |slots| slots.lease.registered());
        self.source.publish(layout, places, registered)
    }

    /// What the version header says.
    #[must_use]
    pub fn header(&self) -> Header {
        self.source.header()
    }

    /// What targets are to be told to expect of this rank; nothing while its parameters are being written.
    #[must_use]
    pub fn offered(&self) -> Option<Expected> {
        self.source.offered()
    }

    /// As [`Source::digests`], of what the rank offers.
    ///
    /// # Errors
    /// As [`Source::digests`].
    pub fn digests(&self, request: &DigestRequest) -> Result<Digests, RefitError> {
        let layout = self.packed.layout();
        let held = |index: usize| {
            let param = &layout.params()[index];
            let name = param.name().as_ref();
            let of_slot = self.slots.as_ref().and_then(|slots| {
                let number = self.packed.slots().iter().position(|slot| *slot.name == *name)?;
                let offset = slots.offsets[number];
                Some(Held { memory: slots.arena(), offset, bytes: param.bytes(), name })
            });
            if let Some(held) = of_slot {
                return Ok(held);
            }
            let rank = layout.rank();
            let own = self.source.layout.params();
            let index = own.binary_search_by(|own| own.name().as_ref().cmp(name));
            let missing = |_| RefitError::NoMemory { rank, param: name.to_owned() };
            self.source.held(index.map_err(missing)?)
        };
        self.source.answer(request, digest::work_of(request, layout, held)?)
    }

    /// Lets `change` write the parameters, and commits what they hold then as this version.
    ///
    /// What `change` only queues on a device has to be queued on the stream of the source's lander, or waited for: the
    /// device copies behind that stream and behind no other.
    ///
    /// # Errors
    /// As [`Updating::commit`](super::Updating::commit); what `change` has returned is lost then.
    pub fn update<R>(
        &mut self,
        version: u64,
        change: impl FnOnce(ParamsMut<'_>) -> R,
    ) -> Result<R, RefitError> {
        let mut updating = self.begin_update()?;
        let changed = change(updating.params_mut());
        updating.commit(version)?;
        Ok(changed)
    }

    /// Fills the slots from the parameters, while nobody reads them.
    pub(super) fn repack(&mut self) -> Result<(), RefitError> {
        let started = Instant::now();
        let mut bytes = 0;
        if let Some(Slots { copies, lease, offsets }) = &mut self.slots {
            let (slots, arena) = (self.packed.slots(), &mut lease.arenas_mut()[0]);
            copies.run(Placed { slots, offsets }, &self.source.params, arena)?;
            bytes = slots.iter().map(|slot| slot.bytes).sum();
        }
        self.repacked = Repacked { bytes, elapsed: started.elapsed() };
        Ok(())
    }

    /// What filling the slots came to the last time.
    #[must_use]
    pub fn repacked(&self) -> Repacked {
        self.repacked
    }

    /// The source without slots: publish it before anything changes, for they are no longer filled. Their memory goes
    /// back to the pool, so no peer may read them any more; packing for the same requests finds it again.
    #[must_use]
    pub fn unpack(self) -> Source<T> {
        self.source
    }
}

impl<T: Transport> Slots<T> {
    fn for_requests(
        source: &Source<T>,
        pool: &TransportPool<T>,
        requests: &[PackRequest],
        budget: u64,
    ) -> Result<(Packed, Option<Self>), RefitError> {
        let rank = source.layout.rank();
        let mut asked: Vec<&PackRequest> =
            requests.iter().filter(|request| request.asks(rank)).collect();
        // The order of the slots must not depend on who asked first.
        asked.sort_by_key(|request| (request.target(), request.digest()));
        let packed = pack(&source.layout, asked.iter().flat_map(|request| request.slices()))?;
        let slots = packed.slots();
        if slots.is_empty() {
            return Ok((packed, None));
        }
        let mut arena = ArenaPlan::new();
        let offsets: Vec<u64> =
            slots.iter().map(|slot| arena.push(slot.bytes, PARAM_ALIGN)).collect();
        let bytes = arena.bytes();
        if bytes > budget {
            return Err(RefitError::SlotBudget { rank, bytes, budget });
        }
        let Source { layout, params, device, .. } = source;
        repack::check(slots, layout, params, device.as_ref())?;
        let lease = pool
            .lease(key(source.transport.agent(), rank, slots).into(), |build| {
                build.arena(bytes)?;
                Ok::<_, RefitError>(Vec::new())
            })
            .map_err(RefitError::from_lease)?;
        let (arena, placed) = (&lease.arenas()[0], Placed { slots, offsets: &offsets });
        let copies = Copies::new(placed, layout, params, arena, device.as_ref())?;
        Ok((packed, Some(Self { copies, lease, offsets })))
    }
}

/// What decides the slots' memory.
fn key(agent: &str, rank: u32, slots: &[PackSlot]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("refit slots v1");
    hasher.update(&rank.to_le_bytes());
    hasher.update(&(agent.len() as u64).to_le_bytes());
    hasher.update(agent.as_bytes());
    for slot in slots {
        hasher.update(&(slot.name.len() as u64).to_le_bytes());
        hasher.update(slot.name.as_bytes());
        hasher.update(&slot.bytes.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}
