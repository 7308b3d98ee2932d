//! What an agent knows of one incarnation of a peer, and keeps mapped of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::RwLock;
use refit_pool::MemoryKind;
use refit_pool::cuda::Device;

use super::agent::Agent;
use super::blob::{Allocation, Blob};
use super::driver::{Mapping, look};
use super::process::{Watch, Watched};
use super::reach::{Access, Facts, Way, describe, way};
use super::view::View;
use crate::registry::{Holds, Ranges};
use crate::{Cause, ReadOp, RemoteRange};

/// Where a peer's memory is here. Memory of our own process is mapped anyway.
pub(super) type Mapped = View<Option<Arc<Mapping>>>;

/// The way to a peer.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) incarnation: [u8; 16],
    pub(super) route: String,
    end: End,
    view: RwLock<Arc<Mapped>>,
}

/// What stands at the other end.
#[derive(Debug)]
enum End {
    /// An agent of this process, not kept alive by us.
    Agent(Weak<Agent>),
    /// Another process, watched if that is possible.
    Process(Option<Watch>),
}

impl Link {
    /// Finds the way to whoever published this, and maps nothing yet.
    pub(super) fn new(own: &Agent, blob: &Blob) -> Result<Self, Cause> {
        let facts = |access| Facts {
            same_host: own.process.is_same_host(&blob.process),
            same_process: own.process.is_same_process(&blob.process),
            access,
        };
        // On another host a device of that name would be a mistake: not even looked for.
        way(facts(Access::Unseen))?;
        let seen = look(&own.device, &blob.device.uuid)?;
        let way = way(facts(seen.access))?;
        let end = match way {
            Way::Direct => {
                let agent = Agent::find(&blob.incarnation).ok_or(Cause::PeerGone)?;
                own.device.enable_access(&agent.device)?;
                End::Agent(Arc::downgrade(&agent))
            }
            Way::Ipc => End::Process(match Watch::start(&own.process, &blob.process) {
                Watched::Yes(watch) => Some(watch),
                Watched::Unseen => None,
                Watched::Gone => return Err(Cause::PeerGone),
            }),
        };
        let theirs = seen.ordinal.unwrap_or(blob.device.ordinal);
        Ok(Self {
            incarnation: blob.incarnation,
            route: describe(way, seen.access, own.device.ordinal(), theirs),
            end,
            view: RwLock::new(Arc::new(View::new())),
        })
    }

    /// Maps the allocations that hold published ranges and are not mapped yet. What is not published any more is
    /// unmapped when the last batch that reads it is gone.
    pub(super) fn map(&self, device: &Device, blob: &Blob, ranges: &Ranges) -> Result<(), Cause> {
        let before = self.view();
        let view = before.renew(&blob.holding(ranges), |allocation| match self.end {
            End::Agent(_) => Ok((allocation.base, None)),
            End::Process(_) => {
                Mapping::open(device, allocation).map(|mapping| (mapping.at(), Some(mapping)))
            }
        })?;
        *self.view.write() = Arc::new(view);
        Ok(())
    }

    pub(super) fn view(&self) -> Arc<Mapped> {
        Arc::clone(&self.view.read())
    }

    /// Whether reads may start. Where the memory is this process's, they keep it allocated by what is returned.
    pub(super) fn hold(&self, sources: &[Source]) -> Result<Option<Holds<Allocation>>, Cause> {
        match &self.end {
            End::Agent(agent) => {
                let agent = agent.upgrade().ok_or(Cause::PeerGone)?;
                let ranges = sources.iter().map(|source| (source.kind, source.start, source.len()));
                let held = agent.registry.hold(ranges);
                held.map(Some).map_err(|index| Cause::Deregistered { read: sources[index].read })
            }
            End::Process(Some(watch)) if !watch.is_running() => Err(Cause::PeerGone),
            End::Process(_) => Ok(None),
        }
    }
}

/// Bytes of one registration of a peer that a batch reads, and what lies between them, in the peer's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) kind: MemoryKind,
    pub(super) start: u64,
    pub(super) end: u64,
    /// The first read that reads there.
    pub(super) read: usize,
}

impl Source {
    fn len(&self) -> u64 {
        self.end - self.start
    }

    /// One for each registration that is read; the error is a read that leaves them.
    pub(super) fn list(published: &Ranges, reads: &[ReadOp]) -> Result<Vec<Self>, usize> {
        let mut sources: BTreeMap<(MemoryKind, u64), Self> = BTreeMap::new();
        let mut starts = Vec::new();
        for (read, op) in reads.iter().enumerate() {
            let RemoteRange { kind, address, len } = op.from;
            starts.clear();
            if !published.cover(kind, address, len, |start| starts.push(start)) {
                return Err(read);
            }
            let mut end = address + len;
            // From the last one back: each ends where the next starts.
            for &registration in starts.iter().rev() {
                let start = registration.max(address);
                let fresh = Self { kind, start, end, read };
                let source = sources.entry((kind, registration)).or_insert(fresh);
                source.start = source.start.min(start);
                source.end = source.end.max(end);
                end = registration;
            }
        }
        Ok(sources.into_values().collect())
    }
}

#[cfg(test)]
mod tests {
    use refit_planner::{Dims, Transform};

    use super::*;
    use crate::LocalRange;

    #[test]
    fn every_registration_that_is_read_is_listed_with_its_first_read() {
        let kind = MemoryKind::Cuda(0);
        let mut published = Ranges::default();
        for (address, len) in [(100, 50), (150, 50), (200, 50), (400, 50)] {
            published.push(kind, address, len).unwrap();
        }
        let read = |address, len| ReadOp {
            from: RemoteRange { address, len, kind },
            into: LocalRange { address: 0, len, kind },
            run: len,
            dims: Dims::none(),
            transform: Transform::Copy,
            bulk: false,
        };
        let source = |start, end, read| Source { kind, start, end, read };
        let reads = [read(410, 5), read(140, 70), read(160, 5), read(105, 1), read(400, 1)];
        assert_eq!(
            Source::list(&published, &reads).unwrap(),
            [source(105, 150, 1), source(150, 200, 1), source(200, 210, 1), source(400, 415, 0)]
        );
        assert_eq!(Source::list(&published, &[]).unwrap(), []);
        for outside in [read(99, 2), read(249, 2), read(300, 1), read(440, 20), read(410, u64::MAX)]
        {
            assert_eq!(Source::list(&published, &[read(400, 1), outside]), Err(1));
        }
    }
}
