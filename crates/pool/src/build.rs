use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::budget::Reservation;
use crate::registrar::{Core, Registrations, merged};
use crate::{AllocateError, Allocator, Memory, PoolError, Region, Registrar};

/// What an entry holds besides the caller's prepared work.
///
/// Fields are dropped in the order they are declared in, and that order is the point: nothing is freed while it is
/// registered, and bytes go back to the budget when they really are free.
#[derive(Debug)]
pub(crate) struct Holdings<R: Registrar> {
    pub(crate) registrations: Registrations<R>,
    pub(crate) arenas: Vec<Memory>,
    /// Adopted memory, in case a registration was shared between two owners.
    adopted: Vec<Region>,
    pub(crate) reservation: Reservation,
}

/// What building an entry cost: what a warm lease does not pay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BuildCost {
    /// Arenas allocated.
    pub allocations: u64,
    /// Time spent allocating, evicting others included.
    pub allocate: Duration,
    /// Pieces of memory registered.
    pub registrations: u64,
    /// Time spent registering.
    pub register: Duration,
}

/// Gives room in the budget, evicting idle entries where needed.
pub(crate) trait Reserve {
    fn reserve(&self, bytes: u64) -> Result<Reservation, PoolError>;
}

/// Builds an entry: allocates its arenas and registers what it reads into.
///
/// If the build fails or panics, everything done through this is undone.
#[derive(Debug)]
pub struct Build<'a, R: Registrar> {
    holdings: Holdings<R>,
    context: Context<'a>,
    cost: BuildCost,
}

struct Context<'a> {
    allocator: &'a dyn Allocator,
    reserve: &'a dyn Reserve,
}

impl std::fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("allocator", &self.allocator).finish_non_exhaustive()
    }
}

impl<'a, R: Registrar> Build<'a, R> {
    pub(crate) fn new(
        core: &Arc<Core<R>>,
        allocator: &'a dyn Allocator,
        reserve: &'a dyn Reserve,
    ) -> Self {
        let holdings = Holdings {
            registrations: Registrations::new(Arc::clone(core)),
            arenas: Vec::new(),
            adopted: Vec::new(),
            reservation: Reservation::none(Arc::clone(&core.ledger)),
        };
        Self { holdings, context: Context { allocator, reserve }, cost: BuildCost::default() }
    }

    pub(crate) fn finish(self) -> (Holdings<R>, BuildCost) {
        (self.holdings, self.cost)
    }

    /// Allocates and registers an arena: one allocation, and one registration unless [`max_registration`] asks for
    /// more. The lease lends it as [`arenas`](crate::Lease::arenas), in the order of these calls.
    ///
    /// An arena of 0 bytes allocates and registers nothing. The region's share in the memory's lifetime is meant for
    /// the prepared work, which goes before the memory does; kept elsewhere, it delays the freeing.
    ///
    /// [`max_registration`]: crate::PoolOptions::max_registration
    ///
    /// # Errors
    /// [`PoolError::Budget`] before anything is allocated; [`PoolError::Allocate`] and [`PoolError::Register`] when
    /// the allocator or the registrar refuses. The build is then as it was before the call.
    pub fn arena(&mut self, bytes: u64) -> Result<Region, PoolError> {
        let kind = self.context.allocator.kind();
        let started = Instant::now();
        let (reservation, memory) = if bytes == 0 {
            (None, Memory::empty(kind))
        } else {
            let len =
                usize::try_from(bytes).map_err(|error| AllocateError::new(kind, bytes, error))?;
            let reservation = self.context.reserve.reserve(bytes)?;
            (Some(reservation), self.context.allocator.allocate(len)?)
        };
        // From here on an early return drops the memory before the reservation.
        let region = memory.allocation().clone();
        if bytes != 0 {
            self.holdings.reservation.ledger().allocated();
            self.cost.allocations += 1;
            self.cost.allocate += started.elapsed();
            self.add([region.clone()])?;
        }
        self.holdings.arenas.push(memory);
        if let Some(reservation) = reservation {
            self.holdings.reservation.absorb(reservation);
        }
        Ok(region)
    }

    /// Registers memory that others own, for as long as the entry lives: whole allocations, as
    /// [`Memory::allocation`] gives them. Repeated and overlapping regions are registered once.
    ///
    /// # Errors
    /// [`PoolError::Register`] when the registrar refuses; the build is then as it was before the call.
    pub fn register<'r>(
        &mut self,
        allocations: impl IntoIterator<Item = &'r Region>,
    ) -> Result<(), PoolError> {
        let adopted = merged(allocations.into_iter().cloned());
        self.add(adopted.iter().cloned())?;
        self.holdings.adopted.extend(adopted);
        Ok(())
    }

    fn add(&mut self, regions: impl IntoIterator<Item = Region>) -> Result<(), PoolError> {
        let (started, before) = (Instant::now(), self.registered().len());
        self.holdings.registrations.add(regions)?;
        self.cost.registrations += (self.registered().len() - before) as u64;
        self.cost.register += started.elapsed();
        Ok(())
    }

    /// What is registered so far, piece by piece, disjoint and sorted by kind and address. A read must not cross
    /// from one piece to the next.
    #[must_use]
    pub fn registered(&self) -> &[Region] {
        self.holdings.registrations.regions()
    }
}
