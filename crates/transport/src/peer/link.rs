//! What an agent knows of one incarnation of a peer, and keeps mapped of it.

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
use crate::Cause;
use crate::registry::{Holds, Ranges};

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

/// Bytes of a peer that a batch reads, in the peer's addresses.
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

    /// The ranges joined where they touch or overlap, sorted.
    pub(super) fn join(mut sources: Vec<Self>) -> Vec<Self> {
        sources.sort_unstable_by_key(|source| (source.kind, source.start));
        let mut joined: Vec<Self> = Vec::new();
        for source in sources {
            match joined.last_mut() {
                Some(last) if last.kind == source.kind && source.start <= last.end => {
                    last.end = last.end.max(source.end);
                    last.read = last.read.min(source.read);
                }
                _ => joined.push(source),
            }
        }
        joined
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_join_where_they_touch_and_remember_their_first_read() {
        let source = |start, end, read| Source { kind: MemoryKind::Cuda(0), start, end, read };
        let other = Source { kind: MemoryKind::Cuda(1), ..source(15, 25, 4) };
        let joined = Source::join(vec![
            source(30, 40, 0),
            other,
            source(10, 20, 3),
            source(20, 30, 1),
            source(12, 14, 2),
            source(41, 42, 5),
        ]);
        assert_eq!(joined, [source(10, 40, 0), source(41, 42, 5), other]);
    }
}
