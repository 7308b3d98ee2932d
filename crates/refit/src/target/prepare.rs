//! Making ready: plan, meet the sources, lower, bind, lease. Whatever was so the last time is looked up.

use std::sync::Arc;
use std::time::Instant;

use refit_planner::{
    Capabilities, Plan, Position, Program, SourceLayout, SourceParam, lower_placed, plan,
};
use refit_pool::Memory;
use refit_transport::{Peer, Transport, TransportLease};

use super::versions::{Phase, Watched};
use super::{Inner, Prepared, Refit, TargetOptions};
use crate::bind::{self, Batch};
use crate::error::RefitError;
use crate::land::Landings;
use crate::publication::Publication;
use crate::report::Report;
use crate::request::PackRequest;

/// Plans kept for a target that changes between options or between trainers.
const PLANS_KEPT: usize = 4;

/// A plan, and what it was made from.
#[derive(Debug)]
pub(super) struct Planned {
    layouts: [u8; 32],
    options: TargetOptions,
    program: Arc<Program>,
    /// What the ways to the sources could do when it was lowered, by source rank.
    links: Vec<(u32, Capabilities)>,
    /// Where its source parameters lay in their ranks' memory.
    positions: Vec<Option<Position>>,
    /// Where each wave ends among the batches.
    pub(super) ends: Arc<[usize]>,
    pub(super) plan: Arc<Plan>,
    /// How the waves are landed.
    pub(super) landings: Landings,
    /// The last binding of it: digest of the publications, and the pool's key.
    bound: Option<([u8; 32], [u8; 32])>,
}

/// Agents that stay connected while others are read from. A target that goes from one copy of a source to another, and
/// back, finds its reads as it left them; and agents that are connected anew cost some transports a descriptor each time.
const MET_KEPT: usize = 64;

/// An agent that is connected.
#[derive(Debug)]
pub(super) struct Met {
    /// The publication that it was met under last.
    publication: [u8; 32],
    peer: Peer,
    /// Which of this target's connections it is: reads that were built over another one are of no use.
    connection: u64,
}

type Refused<T> = (RefitError, Box<Inner<T>>);

/// Prepares a target, or gives it back as it was.
pub(super) fn prepare<T: Transport>(
    mut inner: Box<Inner<T>>,
    publications: &[Publication],
    invalid: bool,
) -> Result<Prepared<T>, Refused<T>> {
    let began = Instant::now();
    let mut report = Report::default();
    match inner.make_ready(publications, &mut report) {
        Ok((program, lease)) => {
            let reads = |batch| inner.transport.reads(batch) as u64;
            let ends = inner.planned[0].ends.clone();
            let data = ends.last().copied().unwrap_or_default();
            report.reads = lease.prepared()[..data].iter().map(reads).sum();
            report.wire_bytes = program.wire_bytes();
            report.needed_bytes = program.needed_bytes();
            report.staging_bytes = program.staging_bytes();
            let watched = Watched::all(&program, publications);
            let refit = Refit {
                inner,
                invalid,
                program,
                report,
                began,
                started: began,
                ends,
                wave: 0,
                posted: 0,
                phase: Phase::Before,
                sync: tracing::Span::none(),
                watched,
                failed: None,
            };
            Ok(Prepared { refit, lease })
        }
        Err(error) => Err((error, inner)),
    }
}

impl<T: Transport> Inner<T> {
    fn make_ready(
        &mut self,
        publications: &[Publication],
        report: &mut Report,
    ) -> Result<(Arc<Program>, TransportLease<T>), RefitError> {
        let (program, key) = self.planned(publications, report)?;

        let span = tracing::debug_span!("setup_registration", rank = self.layout.rank());
        let _entered = span.enter();
        let Self { transport, live, peers, .. } = self;
        let lease = self.pool.lease(key.into(), |build| {
            // The headers are read into the memory that is staged into, so that it is one allocation.
            let arena = match bind::headers(&program) {
                (_, 0) => None,
                (_, bytes) => Some(build.arena(bytes)?),
            };
            build.register(live.iter().map(Memory::allocation))?;
            let started = Instant::now();
            let (arena, registered) = (arena.as_ref(), build.registered());
            let mut batches = bind::bind(&program, publications, live, arena, registered)?;
            let of_data = |batches: &[Batch]| {
                batches.iter().map(|batch| batch.reads.len() as u64).sum::<u64>()
            };
            report.prepared_reads += of_data(&batches);
            batches.extend(bind::bind_headers(&program, publications, arena, registered)?);
            let mut prepared = Vec::with_capacity(batches.len());
            for Batch { rank, reads } in batches {
                let (_, peer) = peers.get(&rank).ok_or(RefitError::MissingPublication { rank })?;
                prepared.push(transport.prepare(peer, &reads)?);
            }
            report.prepare = started.elapsed();
            Ok::<_, RefitError>(prepared)
        });
        let lease = lease.map_err(RefitError::from_lease)?;
        if let Some(built) = lease.built() {
            report.allocations = built.allocations;
            report.allocate = built.allocate;
            report.registrations = built.registrations;
            report.register = built.register;
        }
        Ok((program, lease))
    }

    /// What the program for these publications reads badly.
    pub(super) fn pack_request(
        &mut self,
        publications: &[Publication],
    ) -> Result<PackRequest, RefitError> {
        let (program, _) = self.planned(publications, &mut Report::default())?;
        let links = &self.planned[0].links;
        PackRequest::new(&self.layout, &program, publications, |rank| {
            let met = links.iter().find(|link| link.0 == rank);
            met.map_or_else(|| self.transport.capabilities(), |link| link.1)
        })
    }

    /// The program for these publications and its key in the pool: planned anew when a layout changed, lowered anew when
    /// a source is reached in another way, bound anew when an address or an agent changed, looked up otherwise.
    fn planned(
        &mut self,
        publications: &[Publication],
        report: &mut Report,
    ) -> Result<(Arc<Program>, [u8; 32]), RefitError> {
        let started = Instant::now();
        let layouts = digest("refit layouts v1", publications, Publication::layout_digest);
        let bindings = digest("refit bindings v1", publications, Publication::digest);
        let known =
            |planned: &Planned| planned.layouts == layouts && planned.options == self.options;
        let found = match self.planned.iter().position(known) {
            Some(index) => {
                self.planned[..=index].rotate_right(1);
                let program = self.planned[0].program.clone();
                let met = self.planned[0].bound.is_some_and(|(known, _)| known == bindings);
                report.plan = started.elapsed();
                if !met {
                    self.connect(publications, program.sources(), report)?;
                }
                let planned = &self.planned[0];
                let same = met
                    || (self.links(program.sources()) == planned.links
                        && positions(program.sources(), publications) == planned.positions);
                if !same {
                    self.planned.remove(0);
                }
                same
            }
            None => false,
        };
        if !found {
            let started = Instant::now();
            let source = SourceLayout::new(publications.iter().map(Publication::layout))?;
            let plan = plan(&source, &self.layout, &self.options.plan)?;
            report.plan += started.elapsed();
            self.connect(publications, plan.sources(), report)?;

            let started = Instant::now();
            let links = self.links(plan.sources());
            let link = |rank| {
                let met = links.iter().find(|link| link.0 == rank);
                met.map_or_else(|| self.transport.capabilities(), |link| link.1)
            };
            let positions = positions(plan.sources(), publications);
            let program = lower_placed(&plan, link, &positions, &self.options.lower)?;
            let program = Arc::new(program);
            let landings = Landings::new(&program, self.device.as_ref(), &self.live)?;
            report.plans += 1;
            let (options, ends, bound) = (self.options, bind::batch_ends(&program), None);
            self.planned.truncate(PLANS_KEPT - 1);
            let plan = Arc::new(plan);
            let planned = Planned {
                layouts,
                options,
                program,
                links,
                positions,
                ends,
                plan,
                landings,
                bound,
            };
            self.planned.insert(0, planned);
            report.plan += started.elapsed();
        }
        let program = self.planned[0].program.clone();
        let key = match self.planned[0].bound {
            Some((known, key)) if known == bindings => key,
            _ => {
                let connections = self.connections(program.sources());
                let key = lease_key(&program, &bindings, &connections, &self.live);
                self.planned[0].bound = Some((bindings, key));
                key
            }
        };
        Ok((program, key))
    }

    /// What can be done with each of these sources' ranks, which have been met.
    fn links(&self, sources: &[SourceParam]) -> Vec<(u32, Capabilities)> {
        let ranks = sources.chunk_by(|a, b| a.rank == b.rank).map(|of_rank| of_rank[0].rank);
        ranks
            .filter_map(|rank| {
                let (_, peer) = self.peers.get(&rank)?;
                Some((rank, self.transport.capabilities_of(peer)))
            })
            .collect()
    }

    /// Meets every agent that is read from and that is not known yet, or not under this description.
    fn connect(
        &mut self,
        publications: &[Publication],
        sources: &[SourceParam],
        report: &mut Report,
    ) -> Result<(), RefitError> {
        let started = Instant::now();
        let span = tracing::debug_span!("setup_registration", rank = self.layout.rank());
        let _entered = span.enter();
        for source in sources.chunk_by(|a, b| a.rank == b.rank) {
            let rank = source[0].rank;
            let missing = RefitError::MissingPublication { rank };
            let publication =
                publications.iter().find(|each| each.rank() == rank).ok_or(missing)?;
            let met = self.peers.get(&rank);
            if met.is_some_and(|(digest, _)| digest == publication.digest()) {
                continue;
            }
            let peer = self.meet(publication)?;
            self.peers.insert(rank, (*publication.digest(), peer));
            // Plans that were bound to others who had this rank have to meet them again.
            self.planned.iter_mut().for_each(|planned| planned.bound = None);
        }
        self.part();
        report.connect += started.elapsed();
        Ok(())
    }

    /// Connects an agent, unless it is, as this publication describes it.
    fn meet(&mut self, publication: &Publication) -> Result<Peer, RefitError> {
        let (agent, digest) = (publication.agent(), publication.digest());
        let known = self.met.iter().position(|met| met.peer.name == agent);
        let met = match known.map(|index| self.met.remove(index)) {
            Some(met) if met.publication == *digest => met,
            // Reads that were built before stay good, so it is the same connection.
            Some(met) => {
                let peer = self.transport.connect(agent, publication.metadata())?;
                Met { publication: *digest, peer, ..met }
            }
            None => {
                let peer = self.transport.connect(agent, publication.metadata())?;
                self.connects += 1;
                Met { publication: *digest, peer, connection: self.connects }
            }
        };
        let peer = met.peer.clone();
        self.met.push(met);
        Ok(peer)
    }

    /// Forgets those agents that nothing was read from for longest, if they are many.
    fn part(&mut self) {
        let Self { met, peers, transport, .. } = self;
        let read_from = |met: &Met| peers.values().any(|(_, peer)| peer.name == met.peer.name);
        let idle = met.iter().filter(|met| !read_from(met)).count();
        let mut surplus = idle.saturating_sub(MET_KEPT);
        met.retain(|met| {
            if surplus == 0 || read_from(met) {
                return true;
            }
            surplus -= 1;
            if let Err(error) = transport.disconnect(&met.peer) {
                // It may be gone already; that nobody reads from it any more is what counts.
                tracing::debug!(agent = met.peer.name, %error, "a peer could not be forgotten");
            }
            false
        });
    }

    /// The connections that a program's reads go over.
    fn connections(&self, sources: &[SourceParam]) -> Vec<u64> {
        let ranks = sources.chunk_by(|a, b| a.rank == b.rank).map(|of_rank| of_rank[0].rank);
        ranks
            .filter_map(|rank| {
                let (_, peer) = self.peers.get(&rank)?;
                self.met.iter().find(|met| met.peer == *peer).map(|met| met.connection)
            })
            .collect()
    }
}

/// Where each of these parameters lies in its rank's registered memory: in which range, and where in there.
fn positions(sources: &[SourceParam], publications: &[Publication]) -> Vec<Option<Position>> {
    let mut positions = Vec::with_capacity(sources.len());
    for of_rank in sources.chunk_by(|a, b| a.rank == b.rank) {
        let rank = of_rank[0].rank;
        let publication = publications.iter().find(|publication| publication.rank() == rank);
        positions.extend(of_rank.iter().map(|source| publication?.position(&source.name)));
    }
    positions
}

fn digest(
    context: &'static str,
    publications: &[Publication],
    part: impl Fn(&Publication) -> &[u8; 32],
) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    for publication in publications {
        hasher.update(part(publication));
    }
    *hasher.finalize().as_bytes()
}

/// What decides the prepared reads: the program, where the sources are and how they were met, where our own parameters are.
fn lease_key(
    program: &Program,
    bindings: &[u8; 32],
    connections: &[u64],
    live: &[Memory],
) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("refit lease v2");
    hasher.update(program.hash().as_bytes());
    hasher.update(bindings);
    hasher.update(&(connections.len() as u64).to_le_bytes());
    for connection in connections {
        hasher.update(&connection.to_le_bytes());
    }
    for memory in live {
        hasher.update(&memory.address().to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}
