//! Everything that can be found wrong with a host before a model depends on it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use refit_planner::{Dims, Transform};
use refit_pool::{Allocator, HostAllocator, Key, Memory, Pool, PoolOptions};
use rustix::process::{Resource, getrlimit};

use super::library::{self, NixlUnavailable};
use super::{NixlLibrary, NixlOptions, NixlTransport};
use crate::{
    LocalRange, Pull, PullError, ReadOp, RemoteRange, Transport, TransportError, TransportRegistrar,
};

/// Bytes that are pulled, at odd places.
const BYTES: usize = 1 << 20;
/// Reads they are pulled in, each behind a gap that has to stay as it was.
const READS: usize = 8;
const RUN: usize = BYTES / READS - 61;
/// What gaps are filled with.
const CANARY: u8 = 0xE7;

/// How long the pull may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a process is going to do, so that its limits can be held against it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Demands {
    /// Bytes of memory that will be registered.
    pub registered_bytes: u64,
    /// Peers that will be connected at once.
    pub peers: u32,
}

impl Demands {
    /// So many bytes registered, so many peers connected.
    #[must_use]
    pub fn new(registered_bytes: u64, peers: u32) -> Self {
        Self { registered_bytes, peers }
    }

    /// What a process has open besides, and for each peer the sockets and pipes of UCX.
    fn open_files(self) -> u64 {
        256 + 8 * u64::from(self.peers)
    }
}

/// What a host that passed looks like.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Preflight {
    /// The library that was loaded, if the process maps it from a file.
    pub library: Option<PathBuf>,
    /// The ways to a peer that UCX was told to take.
    pub lanes: String,
    /// Whether an RDMA adapter is among them, and memory has to be locked for it.
    pub rdma: bool,
    /// Where an agent listens.
    pub listens: Vec<SocketAddr>,
    /// Files that this process may have open at once; none: no limit.
    pub open_files: Option<u64>,
    /// Bytes of memory that this process may lock; none: no limit.
    pub locked_bytes: Option<u64>,
    /// Bytes that were pulled from one agent into another and compared.
    pub pulled_bytes: u64,
    /// How long pulling them took, connecting not included.
    pub pull: Duration,
}

impl std::fmt::Display for Preflight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let limit =
            |limit: Option<u64>| limit.map_or_else(|| "no limit".into(), |limit| limit.to_string());
        let library = self
            .library
            .as_ref()
            .map_or_else(|| "linked".into(), |path| path.display().to_string());
        writeln!(f, "library      {library}")?;
        writeln!(f, "lanes        {}", self.lanes)?;
        writeln!(f, "rdma         {}", if self.rdma { "yes" } else { "no" })?;
        let listens: Vec<String> = self.listens.iter().map(ToString::to_string).collect();
        writeln!(
            f,
            "listens      {}",
            if listens.is_empty() { "nowhere".into() } else { listens.join(", ") }
        )?;
        writeln!(f, "open files   {}", limit(self.open_files))?;
        writeln!(f, "locked bytes {}", limit(self.locked_bytes))?;
        write!(f, "pull         {} bytes in {:?}, every one compared", self.pulled_bytes, self.pull)
    }
}

/// Why a host does not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PreflightError {
    /// There is no NIXL, or not one that has every function that is called.
    #[error(transparent)]
    Library(#[from] NixlUnavailable),
    /// The process may have fewer files open than it will need.
    #[error(
        "{have} open files are allowed (`ulimit -n`) and {need} are needed for {peers} peers: raise the limit \
         (systemd: LimitNOFILE, docker: --ulimit nofile)"
    )]
    OpenFiles {
        /// The limit.
        have: u64,
        /// What is needed.
        need: u64,
        /// Peers that it is needed for.
        peers: u32,
    },
    /// The process may lock less memory than it will register with an adapter.
    #[error(
        "{have} bytes of memory may be locked (`ulimit -l`), and {need} will be registered with an RDMA adapter: set the \
         limit to unlimited (systemd: LimitMEMLOCK, docker: --ulimit memlock=-1)"
    )]
    LockedBytes {
        /// The limit.
        have: u64,
        /// What will be registered.
        need: u64,
    },
    /// An agent could not be started, which is where lanes are refused, or agents could not read from each other.
    #[error("the start-up pull, {step}: {source}")]
    Transport {
        /// What was being done.
        step: &'static str,
        /// What went wrong.
        source: TransportError,
    },
    /// Memory for the pull could not be had.
    #[error("the start-up pull has no memory: {why}")]
    Memory {
        /// What the pool says.
        why: String,
    },
    /// The pull failed.
    #[error("the start-up pull failed: {why}")]
    Pull {
        /// What went wrong.
        why: String,
    },
    /// The pull did not settle.
    #[error(
        "the start-up pull did not settle within {waited:?}: the lanes {lanes} connect and do not move bytes; choose others"
    )]
    Unsettled {
        /// How long it was waited for.
        waited: Duration,
        /// The lanes.
        lanes: String,
    },
    /// The pull ended well and moved other bytes.
    #[error(
        "the start-up pull over {lanes} ended well and byte {at} of {BYTES} is wrong: nothing that this host pulls can be \
         trusted; update UCX and the adapter's firmware, or choose other lanes"
    )]
    Bytes {
        /// The first byte that is wrong.
        at: usize,
        /// The lanes.
        lanes: String,
    },
}

/// Loads the library, holds this process's limits against what it is going to do, starts two agents with these options,
/// looks where they listen, and pulls a mebibyte of host memory from one into the other, comparing every byte and those
/// between.
///
/// Takes a fraction of a second where all is well. Before anything else in the process uses `nixl_sys`, as
/// [`NixlLibrary::load`] says.
///
/// # Errors
/// [`PreflightError`] names what is wrong and what to do. Nothing is left behind, but for
/// [`Unsettled`](PreflightError::Unsettled): what reads may still write stays allocated until the process ends.
pub fn preflight(
    candidates: &[&Path],
    options: &NixlOptions,
    demands: Demands,
) -> Result<Preflight, PreflightError> {
    let library = NixlLibrary::load(candidates)?;
    let open_files = getrlimit(Resource::Nofile).current;
    let (need, peers) = (demands.open_files(), demands.peers);
    if let Some(have) = open_files.filter(|&have| have < need) {
        return Err(PreflightError::OpenFiles { have, need, peers });
    }
    let agent = |options: NixlOptions| {
        let transport = |source| PreflightError::Transport { step: "starting an agent", source };
        NixlTransport::new(library, options).map_err(transport)
    };
    // Whoever is read from has to answer while this thread waits for the other.
    let source = options.clone().with_publishing(true).with_progress_thread(true);
    let (source, target) = (agent(source)?, agent(options.clone())?);
    let (lanes, rdma) = (target.lanes(), target.handle().rdma());
    let locked_bytes = getrlimit(Resource::Memlock).current;
    let need = demands.registered_bytes;
    if let Some(have) = locked_bytes.filter(|&have| rdma && have < need) {
        return Err(PreflightError::LockedBytes { have, need });
    }
    let listens = [source.listens(), target.listens()].concat();
    let pull = pull(source, Arc::new(target))?;
    let pulled_bytes = (READS * RUN) as u64;
    let library = library::loaded();
    let report =
        Preflight { library, lanes, rdma, listens, open_files, locked_bytes, pulled_bytes, pull };
    tracing::info!(?report, "preflight");
    Ok(report)
}

/// Byte `at` of the source.
fn pattern(at: usize) -> u8 {
    // No two of 251 neighbours are alike, and the period divides no size that hardware likes.
    u8::try_from(at % 251).unwrap_or(0)
}

/// Where a read begins, on either side: they arrive in the opposite order.
fn places(read: usize) -> (usize, usize) {
    let stride = BYTES / READS;
    (read * stride + 13, (READS - 1 - read) * stride + 29)
}

fn pull(source: NixlTransport, target: Arc<NixlTransport>) -> Result<Duration, PreflightError> {
    let failed = |step| move |source| PreflightError::Transport { step, source };
    let no_memory = |why: String| PreflightError::Memory { why };
    let lanes = target.lanes();
    let mut memory = HostAllocator.allocate(BYTES).map_err(|error| no_memory(error.to_string()))?;
    for (at, byte) in bytes_mut(&mut memory)?.iter_mut().enumerate() {
        *byte = pattern(at);
    }
    let registration = source.register(memory.allocation()).map_err(failed("registering"))?;
    let metadata = source.metadata().map_err(failed("publishing"))?;
    let peer = target.connect(source.agent(), &metadata).map_err(failed("connecting"))?;
    let registrar = TransportRegistrar::new(Arc::clone(&target));
    let pool = Pool::new(HostAllocator, registrar, PoolOptions::default());
    let lease = pool.lease(Key::from([0; 32]), |build| {
        let arena = build.arena(BYTES as u64).map_err(|error| no_memory(error.to_string()))?;
        let read = |read| {
            let (from, into) = places(read);
            ReadOp {
                from: RemoteRange {
                    address: memory.address() + from as u64,
                    len: RUN as u64,
                    kind: memory.kind(),
                },
                into: LocalRange {
                    address: arena.address() + into as u64,
                    len: RUN as u64,
                    kind: arena.kind(),
                },
                run: RUN as u64,
                dims: Dims::none(),
                transform: Transform::Copy,
                bulk: false,
            }
        };
        let reads: Vec<ReadOp> = (0..READS).map(read).collect();
        Ok(vec![target.prepare(&peer, &reads).map_err(failed("preparing"))?])
    });
    let mut lease = match lease {
        Ok(lease) => lease,
        Err(refit_pool::LeaseError::Build(error)) => return Err(error),
        Err(other) => return Err(no_memory(other.to_string())),
    };
    for arena in lease.arenas_mut() {
        bytes_mut(arena)?.fill(CANARY);
    }
    let started = Instant::now();
    let settled = Pull::start(Arc::clone(&target), lease, Vec::new(), ..)
        .and_then(|pull| pull.wait(started + PATIENCE));
    let settled = match settled {
        Ok(settled) => settled,
        Err(PullError::Deadline { pull }) => {
            // Ending either side now could end the process.
            std::mem::forget((pull, source, registration, memory));
            return Err(PreflightError::Unsettled { waited: started.elapsed(), lanes });
        }
        Err(error) => return Err(PreflightError::Pull { why: error.to_string() }),
    };
    let took = started.elapsed();
    let wrong =
        settled.lease.arenas().first().and_then(Memory::host_bytes).map_or(Some(0), first_wrong);
    drop((settled, pool, registration));
    wrong.map_or(Ok(took), |at| Err(PreflightError::Bytes { at, lanes }))
}

fn bytes_mut(memory: &mut Memory) -> Result<&mut [u8], PreflightError> {
    memory.host_bytes_mut().ok_or_else(|| PreflightError::Memory {
        why: "the allocator gave memory that the processor cannot write".to_owned(),
    })
}

/// The first byte that is not what it should be, gaps included.
fn first_wrong(bytes: &[u8]) -> Option<usize> {
    let mut expected = vec![CANARY; BYTES];
    for read in 0..READS {
        let (from, into) = places(read);
        for at in 0..RUN {
            expected[into + at] = pattern(from + at);
        }
    }
    if bytes.len() != BYTES {
        return Some(bytes.len().min(BYTES));
    }
    bytes.iter().zip(&expected).position(|(found, wanted)| found != wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_disjoint_and_leave_gaps() {
        let mut covered = vec![0_u8; BYTES];
        for read in 0..READS {
            let (from, into) = places(read);
            assert!(from + RUN <= BYTES && into + RUN <= BYTES);
            covered[into..into + RUN].iter_mut().for_each(|byte| *byte += 1);
        }
        assert!(covered.iter().all(|&times| times < 2));
        assert_eq!(covered.iter().filter(|&&times| times == 1).count(), READS * RUN);
        assert_eq!((covered[0], covered[BYTES - 1]), (0, 0));
    }

    #[test]
    fn a_wrong_byte_is_found_wherever_it_is() {
        let mut right = vec![CANARY; BYTES];
        for read in 0..READS {
            let (from, into) = places(read);
            (0..RUN).for_each(|at| right[into + at] = pattern(from + at));
        }
        assert_eq!(first_wrong(&right), None);
        for at in [0, 29, 30, RUN, BYTES / 2 + 5, BYTES - 1] {
            right[at] ^= 1;
            assert_eq!(first_wrong(&right), Some(at));
            right[at] ^= 1;
        }
        assert_eq!(first_wrong(&right[..7]), Some(7));
        // Nothing moved at all, and everything moved to where it was.
        assert!(first_wrong(&vec![CANARY; BYTES]).is_some());
        let unmoved: Vec<u8> = (0..BYTES).map(pattern).collect();
        assert!(first_wrong(&unmoved).is_some());
    }

    #[test]
    fn demands_do_not_wrap() {
        assert!(Demands::new(u64::MAX, u32::MAX).open_files() > 1 << 34);
    }
}
