use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::Cause;
use crate::reads::check_name;
use crate::registry::Registry;

/// A set of agents that can reach one another. Cheap to clone; clones are the same network.
#[derive(Clone, Debug, Default)]
pub struct Network(Arc<Mutex<HashMap<String, Weak<Agent>>>>);

/// One member.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) name: String,
    /// Unique in the process, so that the next agent of the same name is not taken for this one.
    pub(super) incarnation: u64,
    pub(super) registry: Arc<Registry<()>>,
    pub(super) network: Network,
}

/// A way to an agent that does not keep it alive.
#[derive(Clone, Debug)]
pub(super) struct Link {
    incarnation: u64,
    agent: Weak<Agent>,
}

impl Network {
    /// A network without agents.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn join(&self, name: &str) -> Result<Arc<Agent>, Cause> {
        static INCARNATIONS: AtomicU64 = AtomicU64::new(0);
        check_name(name)?;
        let mut agents = self.0.lock();
        if agents.get(name).is_some_and(|agent| agent.strong_count() > 0) {
            return Err(Cause::NameTaken);
        }
        let agent = Arc::new(Agent {
            name: name.into(),
            incarnation: INCARNATIONS.fetch_add(1, Ordering::Relaxed),
            registry: Registry::new(),
            network: self.clone(),
        });
        agents.insert(name.into(), Arc::downgrade(&agent));
        Ok(agent)
    }

    pub(super) fn find(&self, name: &str, incarnation: u64) -> Result<Link, Cause> {
        let agent = self.0.lock().get(name).cloned().ok_or(Cause::UnknownPeer)?;
        let link = Link { incarnation, agent };
        match link.reach() {
            Some(agent) if agent.incarnation == incarnation => Ok(link),
            _ => Err(Cause::PeerGone),
        }
    }
}

impl Link {
    pub(super) fn reach(&self) -> Option<Arc<Agent>> {
        self.agent.upgrade()
    }
}

impl PartialEq for Link {
    fn eq(&self, other: &Self) -> bool {
        self.incarnation == other.incarnation
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let mut agents = self.network.0.lock();
        // The name may have been taken over by the next incarnation.
        if agents.get(&self.name).is_some_and(|agent| agent.strong_count() == 0) {
            agents.remove(&self.name);
        }
    }
}
