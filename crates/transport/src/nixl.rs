//! NIXL, loaded at run time, with UCX beneath.
//!
//! [`NixlLibrary::load`] is the only way in: no function here reaches `nixl_sys` without the value it returns,
//! because `nixl-sys` built against its stubs *aborts the process* when the library is missing.
//!
//! # What NIXL does that shapes this module
//!
//! - A posted read cannot be cancelled: released, deregistered or disconnected, it still writes its destination. A
//!   batch that is dropped in flight is therefore leaked with everything it points at.
//! - A post that fails half-way leaves the reads it had started running and unobservable: that is
//!   [`TransportError::Lost`](crate::TransportError::Lost), not `Failed`.
//! - Without hardware that reads memory, UCX emulates: over TCP the *source's* threads answer each read from its
//!   memory, registered or not. A source that frees memory while a peer, even one that gave up, still reads it is
//!   killed by that. Keep published memory until its readers are done or gone.
//! - Its metadata loader is safe only for what NIXL itself wrote. The envelope's digest keeps damage away from it;
//!   against forgery, whoever carries metadata must authenticate it.
//! - One poll can take as long as the bytes that are ready to move (host memory is copied by the polling thread).
//!   Deadlines are kept between polls, not inside one.
//!
//! # Lanes
//!
//! UCX takes every way to a peer that it finds, and over TCP whoever connects can read and write this process. So an agent
//! takes RDMA, or ways within the host, and TCP over loopback only, unless [`Lanes::InsecureTcp`] is asked for by name. UCX
//! is told so as its context is made, and once it is, the process's listeners are compared with those before: an agent
//! that listens beyond loopback is ended again. [`preflight`] tries all of it before anything depends on it.
//!
//! # Device memory
//!
//! With [`NixlOptions::on_device`] (feature `cuda`) an agent moves memory of a CUDA device. Its context is current in
//! every call of NIXL, whatever the calling thread had, which has it again afterwards. UCX maps a peer's allocation
//! into this process when it is first read, at 0.3 ms each: [`prepare`](crate::Transport::prepare) reads a little of
//! each into memory of the agent's own, so that the first pull runs as fast as the next ones. For that an agent keeps
//! 64 KiB of its device.
//!
//! Bytes that a NIC writes into a device are seen by work that is handed to the device after the read was seen to be
//! done. A kernel that ran before that, and goes on, may see old ones: nothing here flushes for it
//! (`cuFlushGPUDirectRDMAWrites`).
//!
//! UCX queues all copies from one device in one stream, largest first: the processor gets ahead of the link at once.
//!
//! # Environment
//!
//! Nothing here sets variables; these are read by the libraries below. `REFIT_NIXL_LIBRARY` is ours: the path of
//! `libnixl_capi.so` or its folder. `NIXL_PLUGIN_DIR` is needed only for unusual installs: the library looks in
//! `plugins/` beside itself. `UCX_TLS` and `UCX_NET_DEVICES` win over what [`Lanes`] tells UCX, and are refused where they
//! would open more. `NIXL_LOG_LEVEL` and `UCX_LOG_LEVEL` choose what they print to standard error, which they
//! do for every refusal; `fatal` keeps them quiet.

mod agent;
mod batch;
mod context;
mod lanes;
mod library;
mod link;
mod listeners;
mod options;
mod preflight;
mod transport;
mod warm_up;

pub use batch::NixlReads;
pub use lanes::{LaneError, Lanes};
pub use library::{Attempt, NixlLibrary, NixlUnavailable, Origin, Problem};
pub use options::NixlOptions;
pub use preflight::{Demands, Preflight, PreflightError, preflight};
pub use transport::{NixlRegistration, NixlTransport};
