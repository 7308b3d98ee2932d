use refit_planner::{Bulk, Capabilities};

/// How a [`PeerTransport`](super::PeerTransport) is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerOptions {
    /// The first part of the agent's name: role and rank. A random incarnation follows.
    pub prefix: String,
    /// What the transport says it can do and what that costs; the lowering decides by it. Whatever is said here, it
    /// reads strided and transforms.
    pub capabilities: Capabilities,
    /// Which reads go to the copy engine.
    pub engines: Engines,
    /// Streams beside the caller's that copies are spread over, from 1 to 32; other numbers count as the nearest of these.
    pub copy_streams: usize,
    /// Most bytes of a peer's metadata that are read.
    pub max_metadata: usize,
}

/// Which reads go to the copy engine, and which to the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Engines {
    /// As the lowering decided, read by read.
    #[default]
    AsPlanned,
    /// The kernel executes all of them.
    Kernel,
    /// The copy engine executes every contiguous copy, whatever the lowering says; it can do nothing else.
    Copy,
}

impl PeerOptions {
    /// What was measured between H200s over NVLink: 374 GB/s and 50 ns a read for the kernel, 395 GB/s for the copy engine.
    /// A copy of its own costs about 5 us, whatever the number of streams; with the kernel beside it some of them are
    /// hidden, and where two processes read on one GPU copies share the link better than kernels: 3 us.
    #[must_use]
    pub fn new(prefix: impl Into<String>) -> Self {
        let capabilities = Capabilities {
            strided_reads: true,
            transforms: true,
            max_reads: 1 << 22,
            bulk: Some(Bulk { bytes_per_us: 395_000, ns_per_read: 3_000 }),
            ..Capabilities::plain(374_000, 50)
        };
        Self {
            prefix: prefix.into(),
            capabilities,
            engines: Engines::default(),
            copy_streams: 2,
            max_metadata: 16 << 20,
        }
    }

    /// These options with other capabilities: measured ones.
    #[must_use]
    pub fn with_capabilities(mut self, capabilities: Capabilities) -> Self {
        self.capabilities = capabilities;
        self
    }

    /// These options with other engines: to measure one by itself.
    #[must_use]
    pub fn with_engines(mut self, engines: Engines) -> Self {
        self.engines = engines;
        self
    }

    /// These options with another number of streams for the copy engine.
    #[must_use]
    pub fn with_copy_streams(mut self, streams: usize) -> Self {
        self.copy_streams = streams;
        self
    }

    /// What is declared: `bulk` only where the copy engine is used as planned.
    pub(super) fn declared(&self) -> Capabilities {
        let bulk = self.capabilities.bulk.filter(|_| self.engines == Engines::AsPlanned);
        Capabilities { strided_reads: true, transforms: true, bulk, ..self.capabilities }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_that_are_chosen_here_are_not_declared_to_the_lowering() {
        let options = PeerOptions::new("x").with_capabilities(Capabilities {
            bulk: Some(Bulk { bytes_per_us: 2, ns_per_read: 1 }),
            ..Capabilities::plain(1, 1)
        });
        let declared = options.declared();
        assert!(declared.strided_reads && declared.transforms && declared.bulk.is_some());
        for engines in [Engines::Kernel, Engines::Copy] {
            assert_eq!(options.clone().with_engines(engines).declared().bulk, None);
        }
    }
}
