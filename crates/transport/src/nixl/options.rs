use std::time::Duration;

use refit_planner::Capabilities;
#[cfg(feature = "cuda")]
use refit_pool::cuda::Device;

use super::Lanes;

/// How a [`NixlTransport`](super::NixlTransport) is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NixlOptions {
    /// The first part of the agent's name: role and rank. A random incarnation follows.
    pub prefix: String,
    /// The NIXL plugin that moves the bytes.
    pub plugin: String,
    /// Parameters of the plugin, such as UCX's `engine_config`. One worker only: `num_workers` and `num_threads` are
    /// refused. So is what chooses lanes.
    pub params: Vec<(String, String)>,
    /// Which ways UCX may take to a peer. Other plugins than UCX are told nothing of it, and held to it all the same.
    pub lanes: Lanes,
    /// Whether others may read from this agent: without it, [`metadata`](crate::Transport::metadata) is refused. A target
    /// needs none published to read, and what is not published cannot be used against it.
    pub publishes: bool,
    /// Whether a thread of NIXL's drives transfers and answers peers.
    ///
    /// Without it an agent answers only while it calls NIXL itself: peers that connect to an idle source wait for
    /// ever. Agents that only read can do without, and where cores are few they then read a little faster: the
    /// thread competes with the one that copies.
    pub progress_thread: bool,
    /// How long that thread sleeps when nothing has happened; what arrives wakes it.
    ///
    /// At zero, which is NIXL's own default, it spins: one core for every agent. On a host with fewer cores than
    /// agents that halves the rate of everything, the transfers included.
    pub progress_interval: Duration,
    /// What the transport says it can do. NIXL takes no strided reads, so `strided_reads` stays off.
    pub capabilities: Capabilities,
    /// Most bytes of a peer's metadata that are read.
    pub max_metadata: usize,
    /// How long [`connect`](crate::Transport::connect) waits for the first byte from a peer. Zero: the first
    /// transfer sets the connection up instead, and pays for it.
    pub first_byte: Duration,
    /// For how long a peer that was read from is taken to be alive: a batch that follows within this time is posted
    /// at once. Otherwise a single byte is read first, so that a peer that has died costs an error.
    ///
    /// Zero, the default, has every batch of more than one read begin with that byte. What is risked otherwise is
    /// memory, not bytes: a post that fails half-way is [`Lost`](crate::TransportError::Lost), what it would have
    /// written is quarantined, and the agent takes no new reads.
    pub probe_after: Duration,
    /// The device whose memory is read into and published.
    ///
    /// It is current wherever NIXL is called, and every registration of a peer's device memory that a batch reads is
    /// read from once while the batch is prepared: UCX maps it then, and not in the first pull.
    #[cfg(feature = "cuda")]
    pub device: Option<Device>,
}

impl NixlOptions {
    /// UCX with a progress thread that sleeps a millisecond at a time, the costs of host memory between processes of one host, 16 MiB of metadata, 10
    /// seconds for the first byte.
    #[must_use]
    pub fn new(prefix: impl Into<String>) -> Self {
        // Measured, host memory over CMA: 2 GB/s in large reads, 5 to 6 us for a small one.
        let capabilities = Capabilities { max_reads: 1 << 24, ..Capabilities::plain(2_000, 5_500) };
        Self {
            prefix: prefix.into(),
            plugin: "UCX".into(),
            params: Vec::new(),
            lanes: Lanes::Auto,
            publishes: true,
            progress_thread: true,
            progress_interval: Duration::from_millis(1),
            capabilities,
            max_metadata: 16 << 20,
            first_byte: Duration::from_secs(10),
            probe_after: Duration::ZERO,
            #[cfg(feature = "cuda")]
            device: None,
        }
    }

    /// As [`new`](Self::new), for the memory of a device, with the costs of NVLink.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn on_device(prefix: impl Into<String>, device: Device) -> Self {
        let mut options = Self::new(prefix).with_device(device);
        // Measured, H200 to H200 of one host: 300 GB/s in large reads, 5 to 6 us for a small one.
        options.capabilities.bytes_per_us = 300_000;
        options.capabilities.ns_per_read = 6_000;
        // Between the waves of one refit a peer dies no more often than while one of them is read.
        options.probe_after = Duration::from_millis(20);
        options
    }

    /// These options for the memory of a device.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn with_device(mut self, device: Device) -> Self {
        self.device = Some(device);
        self
    }

    /// These options with one more parameter of the plugin.
    #[must_use]
    pub fn with_param(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.params.push((key.into(), value.into()));
        self
    }

    /// These options with other ways to a peer.
    #[must_use]
    pub fn with_lanes(mut self, lanes: Lanes) -> Self {
        self.lanes = lanes;
        self
    }

    /// These options for an agent that only reads, or for one that others read from as well.
    #[must_use]
    pub fn with_publishing(mut self, publishes: bool) -> Self {
        self.publishes = publishes;
        self
    }

    /// These options with or without the progress thread.
    #[must_use]
    pub fn with_progress_thread(mut self, progress_thread: bool) -> Self {
        self.progress_thread = progress_thread;
        self
    }

    /// These options with another sleep of the progress thread.
    #[must_use]
    pub fn with_progress_interval(mut self, interval: Duration) -> Self {
        self.progress_interval = interval;
        self
    }

    /// These options with other capabilities: measured ones, or those of other memory.
    #[must_use]
    pub fn with_capabilities(mut self, capabilities: Capabilities) -> Self {
        self.capabilities = capabilities;
        self
    }

    /// These options with another wait for the first byte.
    #[must_use]
    pub fn with_first_byte(mut self, wait: Duration) -> Self {
        self.first_byte = wait;
        self
    }

    /// These options with another time for which a peer is taken to be alive.
    #[must_use]
    pub fn with_probe_after(mut self, time: Duration) -> Self {
        self.probe_after = time;
        self
    }
}
