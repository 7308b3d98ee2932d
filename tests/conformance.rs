//! The in-process transport against the suite that every transport has to pass.

use std::thread;
use std::time::{Duration, Instant};

use refit_pool::HostAllocator;
use refit_transport::conformance::{Harness, Report, cases, run_all};
use refit_transport::local::{LocalOptions, LocalTransport, Network};
use refit_transport::{Transport, TransportError};

struct Local {
    network: Network,
    options: LocalOptions,
}

impl Harness for Local {
    type Transport = LocalTransport;
    type Allocator = HostAllocator;

    fn agent(&self, role: &str) -> Result<LocalTransport, TransportError> {
        LocalTransport::with_options(&self.network, role, self.options)
    }

    fn allocator(&self) -> HostAllocator {
        HostAllocator
    }
}

fn report(options: LocalOptions) -> Report {
    run_all(&Local { network: Network::new(), options })
}

#[test]
fn local_passes_every_case() {
    let report = report(LocalOptions::default());
    assert!(report.failed.is_empty() && report.skipped.is_empty(), "{report}");
    assert_eq!(report.passed.len(), cases::<Local>().len());
}

#[test]
fn local_passes_without_strided_reads_and_in_small_steps() {
    let report =
        report(LocalOptions::default().with_strided_reads(false).with_bytes_per_poll(4099));
    assert!(report.failed.is_empty() && report.skipped.is_empty(), "{report}");
}

#[test]
fn names_are_taken_while_their_agent_lives() {
    let network = Network::new();
    let first = LocalTransport::new(&network, "trainer-0").unwrap();
    assert!(matches!(
        LocalTransport::new(&network, "trainer-0"),
        Err(TransportError::Start { .. })
    ));
    assert!(matches!(
        LocalTransport::new(&network, "trainer 0"),
        Err(TransportError::Start { .. })
    ));
    let stale = first.metadata().unwrap();
    drop(first);
    let second = LocalTransport::new(&network, "trainer-0").unwrap();
    let reader = LocalTransport::new(&network, "engine-0").unwrap();
    // The name is back, but what the first one published is not about the second.
    assert!(reader.connect("trainer-0", &stale).is_err());
    reader.connect("trainer-0", &second.metadata().unwrap()).unwrap();
}

/// Many pulls side by side in one process, agents coming and going.
#[test]
fn suites_run_side_by_side() {
    let network = Network::new();
    let started = Instant::now();
    thread::scope(|scope| {
        for worker in 0..4 {
            let network = &network;
            scope.spawn(move || {
                let harness = Prefixed { network, worker };
                let case = cases::<Prefixed<'_>>()
                    .into_iter()
                    .find(|case| case.name == "two_peers_at_once")
                    .unwrap();
                while started.elapsed() < Duration::from_millis(300) {
                    (case.run)(&harness).unwrap();
                }
            });
        }
    });
}

struct Prefixed<'n> {
    network: &'n Network,
    worker: usize,
}

impl Harness for Prefixed<'_> {
    type Transport = LocalTransport;
    type Allocator = HostAllocator;

    fn agent(&self, role: &str) -> Result<LocalTransport, TransportError> {
        LocalTransport::new(self.network, &format!("{role}-{}", self.worker))
    }

    fn allocator(&self) -> HostAllocator {
        HostAllocator
    }
}
