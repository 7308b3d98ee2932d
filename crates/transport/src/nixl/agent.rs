//! `nixl_sys`, call by call: what it answers becomes a [`Cause`] that names the call.

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::time::Duration;

use nixl_sys::{
    Agent as Handle, AgentConfig, Backend, MemType, MemoryRegion, NixlDescriptor, NixlError,
    Params, RegistrationHandle, ThreadSync, XferDescList, XferOp, XferRequest, XferStatus,
};
use refit_pool::{MemoryKind, Region};

use super::context::Context;
use super::lanes::{self, Chosen, Environment};
use super::listeners::Listeners;
use super::{LaneError, NixlLibrary, NixlOptions};
use crate::random::random;
use crate::reads::check_name;
use crate::{Cause, Status};

/// A NIXL agent with one backend.
#[derive(Debug)]
pub(super) struct Agent {
    pub(super) name: String,
    /// The device that is current in every call below.
    context: Context,
    handle: Handle,
    _backend: Backend,
    lanes: Chosen,
    listens: Vec<SocketAddr>,
}

/// How often an agent is made anew because it cannot be told whose listeners are new.
const ATTEMPTS: usize = 3;

/// Memory that NIXL knows, until this is dropped.
#[derive(Debug)]
pub(super) struct Registration {
    handle: Option<RegistrationHandle>,
    context: Context,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let _entered = self.context.try_enter();
        drop(self.handle.take());
    }
}

/// A piece of a read, as NIXL describes memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) from: u64,
    pub(super) from_device: u64,
    pub(super) into: u64,
    pub(super) into_device: u64,
    pub(super) len: u64,
}

/// A failed post, and what is known about the memory it would have written.
#[derive(Debug)]
pub(super) struct PostError {
    pub(super) cause: Cause,
    /// NIXL refused before it gave anything to the backend.
    pub(super) untouched: bool,
}

impl Agent {
    pub(super) fn new(_library: NixlLibrary, options: &NixlOptions) -> Result<Self, Cause> {
        check_name(&options.prefix)?;
        // Reads are told finished by the order of one worker's requests.
        if let Some((key, _)) = options
            .params
            .iter()
            .find(|(key, _)| matches!(key.as_str(), "num_workers" | "num_threads"))
        {
            return Err(Cause::Parameter { key: key.clone() });
        }
        let lanes = lanes::choose(&options.lanes, &Environment::current(), &lanes::adapters())?;
        let params = lanes.params(&options.params)?;
        // Lanes are UCX's.
        let params = if options.plugin == "UCX" { &params } else { &options.params };
        let context = Context::of(options);
        // Somebody else of this process may begin to listen meanwhile: an agent is blamed for what ends with it.
        for _ in 0..ATTEMPTS {
            let before = listeners(&lanes)?;
            let (name, handle, backend) = start(options, params, &context)?;
            let new = listeners(&lanes)?.without(&before);
            let beyond = new.clone().beyond_loopback();
            if beyond.is_empty() || lanes.may_listen_anywhere() {
                let listens = new.addresses();
                let (tls, devices) = (&lanes.tls, &lanes.devices);
                tracing::info!(agent = name, lanes = %lanes.lanes, tls, devices, ?listens, "NIXL agent");
                return Ok(Self { name, context, handle, _backend: backend, lanes, listens });
            }
            {
                let _entered = context.enter()?;
                drop((handle, backend));
            }
            let ended = beyond.without(&listeners(&lanes)?);
            if !ended.is_empty() {
                let (lanes, addresses) = (lanes.lanes, ended.addresses());
                return Err(LaneError::Listens { lanes, addresses }.into());
            }
        }
        let why = "other threads of this process keep opening listeners".to_owned();
        Err(LaneError::Unverified { why }.into())
    }

    /// The lanes, as text.
    pub(super) fn lanes(&self) -> String {
        let Chosen { lanes, tls, devices, .. } = &self.lanes;
        format!("{lanes} (UCX_TLS={tls}, UCX_NET_DEVICES={devices})")
    }

    /// Whether it may take an RDMA adapter.
    pub(super) fn rdma(&self) -> bool {
        self.lanes.rdma
    }

    /// Where it listened when it had started.
    pub(super) fn listens(&self) -> &[SocketAddr] {
        &self.listens
    }

    /// The device that is current in calls of NIXL.
    pub(super) fn context(&self) -> &Context {
        &self.context
    }

    pub(super) fn metadata(&self) -> Result<Vec<u8>, Cause> {
        let _entered = self.context.enter()?;
        self.handle.get_local_md().map_err(call("nixl_capi_get_local_md"))
    }

    /// Gives a peer's blob to NIXL, which says whose it is.
    pub(super) fn load(&self, blob: &[u8]) -> Result<String, Cause> {
        let _entered = self.context.enter()?;
        // The wrapper unwraps a name that the blob chose. It does so after it let its lock go, so nothing is
        // poisoned; all that a panic loses is the C string.
        catch_unwind(AssertUnwindSafe(|| self.handle.load_remote_md(blob)))
            .map_err(|_| Cause::Panicked { call: "nixl_capi_load_remote_md" })?
            .map_err(call("nixl_capi_load_remote_md"))
    }

    pub(super) fn make_connection(&self, peer: &str) -> Result<(), Cause> {
        let _entered = self.context.enter()?;
        self.handle.make_connection(peer, None).map_err(call("nixl_capi_agent_make_connection"))
    }

    pub(super) fn forget(&self, peer: &str) -> Result<(), Cause> {
        let _entered = self.context.enter()?;
        self.handle.invalidate_remote_md(peer).map_err(call("nixl_capi_invalidate_remote_md"))
    }

    pub(super) fn register(&self, region: &Region) -> Result<Registration, Cause> {
        let _entered = self.context.enter()?;
        let (memory, device) = place(region.kind())?;
        let address = usize::try_from(region.address()).map_err(|_| Cause::Wraps)?;
        let len = usize::try_from(region.len()).map_err(|_| Cause::Wraps)?;
        let descriptor = Descriptor { address, len, memory, device };
        let handle = self.handle.register_memory(&descriptor, None);
        let handle = Some(handle.map_err(call("nixl_capi_register_mem"))?);
        Ok(Registration { handle, context: self.context.clone() })
    }

    /// Builds one request from pieces whose memory is of one kind on each side.
    pub(super) fn request(
        &self,
        peer: &str,
        from: MemType,
        into: MemType,
        pieces: &[Piece],
    ) -> Result<XferRequest, Cause> {
        let _entered = self.context.enter()?;
        let list = |memory| XferDescList::new(memory).map_err(call("nixl_capi_create_xfer_dlist"));
        let (mut local, mut remote) = (list(into)?, list(from)?);
        for piece in pieces {
            let [from, into, len] = [piece.from, piece.into, piece.len]
                .map(|value| usize::try_from(value).map_err(|_| Cause::Wraps));
            let len = len?;
            local.add_desc(into?, len, piece.into_device);
            remote.add_desc(from?, len, piece.from_device);
        }
        let request = self.handle.create_xfer_req(XferOp::Read, &local, &remote, peer, None);
        request.map_err(call("nixl_capi_create_xfer_req"))
    }

    /// Starts a request.
    ///
    /// # Safety
    /// The memory that the request writes stays registered, and nobody accesses it, until [`status`](Self::status)
    /// answers something other than pending, or for ever if this fails and does not say `untouched`.
    pub(super) unsafe fn post(&self, request: &XferRequest) -> Result<Status, PostError> {
        let _entered =
            self.context.enter().map_err(|cause| PostError { cause, untouched: true })?;
        match self.handle.post_xfer_req(request, None) {
            Ok(true) => Ok(Status::Pending),
            Ok(false) => Ok(Status::Done),
            Err(error) => {
                // A peer that NIXL no longer knows is looked up before the backend is asked.
                let untouched = matches!(error, NixlError::NotFound);
                Err(PostError { cause: broken("nixl_capi_post_xfer_req", error), untouched })
            }
        }
    }

    /// Where a posted request stands. The flag of an error says whether it is the request's own end; without it,
    /// NIXL has lost the peer and with it the sight of the request.
    pub(super) fn status(&self, request: &XferRequest) -> Result<Status, (Cause, bool)> {
        // Where even this fails, NIXL may still see how the request stands.
        let _entered = self.context.try_enter();
        match self.handle.get_xfer_status(request) {
            Ok(XferStatus::Success) => Ok(Status::Done),
            Ok(XferStatus::InProgress) => Ok(Status::Pending),
            Err(error) => {
                let settled = matches!(error, NixlError::BackendError);
                Err((broken("nixl_capi_get_xfer_status", error), settled))
            }
        }
    }
}

/// A NIXL agent with one backend, under a name that was never used before.
fn start(
    options: &NixlOptions,
    params: &[(String, String)],
    context: &Context,
) -> Result<(String, Handle, Backend), Cause> {
    let name = format!("{}-{:032x}", options.prefix, u128::from_le_bytes(random()?));
    check_name(&name)?;
    let config = AgentConfig {
        enable_prog_thread: options.progress_thread,
        enable_listen_thread: false,
        // `nixl_sys` lets calls that build requests run side by side; NIXL's own lock keeps them apart.
        thread_sync: ThreadSync::Strict,
        pthr_delay_us: microseconds(options.progress_interval),
        ..AgentConfig::default()
    };
    let _entered = context.enter()?;
    let handle = Handle::new_configured(&name, &config)
        .map_err(call("nixl_capi_create_configured_agent"))?;
    let params = params.iter().map(|(key, value)| (key, value));
    let params = Params::from(params).map_err(call("nixl_capi_params_add"))?;
    let backend = handle
        .create_backend(&options.plugin, &params)
        .map_err(call("nixl_capi_create_backend"))?;
    Ok((name, handle, backend))
}

/// Where the process listens. Not to know is an error only where it matters.
fn listeners(lanes: &Chosen) -> Result<Listeners, LaneError> {
    match Listeners::now() {
        Err(error) if !lanes.may_listen_anywhere() => {
            Err(LaneError::Unverified { why: error.to_string() })
        }
        known => Ok(known.unwrap_or_default()),
    }
}

/// How NIXL names a kind of memory: its type and device.
pub(super) fn place(kind: MemoryKind) -> Result<(MemType, u64), Cause> {
    match kind {
        MemoryKind::Host => Ok((MemType::Dram, 0)),
        MemoryKind::Cuda(device) => Ok((MemType::Vram, device.into())),
        _ => Err(Cause::Kind),
    }
}

fn call(call: &'static str) -> impl Fn(NixlError) -> Cause {
    move |error| Cause::Call { call, status: error.to_string() }
}

/// For the calls that fail because of a peer.
fn broken(call: &'static str, error: NixlError) -> Cause {
    match error {
        NixlError::BackendError => Cause::Connection { call, status: error.to_string() },
        NixlError::NotFound => Cause::PeerGone,
        other => Cause::Call { call, status: other.to_string() },
    }
}

#[derive(Debug)]
struct Descriptor {
    address: usize,
    len: usize,
    memory: MemType,
    device: u64,
}

impl MemoryRegion for Descriptor {
    unsafe fn as_ptr(&self) -> *const u8 {
        ptr::with_exposed_provenance(self.address)
    }

    fn size(&self) -> usize {
        self.len
    }
}

impl NixlDescriptor for Descriptor {
    fn mem_type(&self) -> MemType {
        self.memory
    }

    fn device_id(&self) -> u64 {
        self.device
    }
}

/// Rounded up: 0 would make NIXL's thread spin.
fn microseconds(interval: Duration) -> u64 {
    u64::try_from(interval.as_nanos().div_ceil(1_000)).unwrap_or(u64::MAX)
}
