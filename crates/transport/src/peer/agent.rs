//! An agent, and how others of its process find it.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use refit_pool::cuda::Device;

use super::blob::Allocation;
use super::process::Process;
use crate::Cause;
use crate::random::random;
use crate::reads::check_name;
use crate::registry::Registry;

/// The agents of this process, by incarnation.
static AGENTS: Mutex<BTreeMap<[u8; 16], Weak<Agent>>> = Mutex::new(BTreeMap::new());

/// What an agent is to itself, and to those that read from it in the same process.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) name: String,
    pub(super) incarnation: [u8; 16],
    pub(super) process: Process,
    pub(super) device: Device,
    pub(super) registry: Arc<Registry<Allocation>>,
}

impl Agent {
    pub(super) fn start(prefix: &str, device: &Device) -> Result<Arc<Self>, Cause> {
        check_name(prefix)?;
        let incarnation = random()?;
        let name = format!("{prefix}-{:032x}", u128::from_le_bytes(incarnation));
        check_name(&name)?;
        let process = Process::current()?;
        let registry = Registry::new();
        let agent = Arc::new(Self { name, incarnation, process, device: device.clone(), registry });
        AGENTS.lock().insert(incarnation, Arc::downgrade(&agent));
        Ok(agent)
    }

    pub(super) fn find(incarnation: &[u8; 16]) -> Option<Arc<Self>> {
        AGENTS.lock().get(incarnation)?.upgrade()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        AGENTS.lock().remove(&self.incarnation);
    }
}
