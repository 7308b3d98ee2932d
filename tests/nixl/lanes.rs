//! P16: which ways UCX takes, and where it listens.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use refit_tests::skip;
use refit_transport::nixl::{
    Demands, LaneError, Lanes, NixlOptions, NixlTransport, PreflightError, preflight,
};
use refit_transport::{Cause, Transport, TransportError};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::isolated::{UNSET, isolated, library};

/// As a process starts that nobody set anything up for.
const PLAIN: &[(&str, &str)] = &[("UCX_NET_DEVICES", UNSET), ("UCX_TLS", UNSET)];

fn agent(options: NixlOptions) -> Result<NixlTransport, LaneError> {
    NixlTransport::new(library(), options).map_err(|error| match error {
        TransportError::Start { cause: Cause::Lanes(error), .. } => *error,
        other => panic!("{other}"),
    })
}

/// An address of this host that others reach, if it has one. Nothing is sent.
fn outside() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect("192.0.2.1:9").ok()?;
    let address = socket.local_addr().unwrap().ip();
    (!address.is_loopback() && !address.is_unspecified()).then_some(address)
}

fn answers(address: SocketAddr) -> bool {
    TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
}

#[test]
fn p16_an_agent_listens_on_loopback_only() {
    for variables in [PLAIN, &[("UCX_NET_DEVICES", UNSET), ("UCX_TLS", "tcp")]] {
        isolated("lanes::p16_an_agent_listens_on_loopback_only", variables, || {
            let agent = agent(NixlOptions::new("a").with_lanes(Lanes::Host)).unwrap();
            println!("{}: {:?}", agent.lanes(), agent.listens());
            assert!(!agent.listens().is_empty());
            for &address in agent.listens() {
                assert!(address.ip().is_loopback() && answers(address), "{address}");
                if let Some(outside) = outside() {
                    assert!(!answers(SocketAddr::new(outside, address.port())), "{outside}");
                }
            }
        });
    }
}

#[test]
fn p16_other_addresses_are_listened_on_when_asked_by_name() {
    isolated("lanes::p16_other_addresses_are_listened_on_when_asked_by_name", PLAIN, || {
        let lanes = Lanes::InsecureTcp { interface: None };
        let agent = agent(NixlOptions::new("a").with_lanes(lanes)).unwrap();
        let Some(outside) = outside() else { return };
        // What the tests of loopback look for is there to be found.
        let beyond: Vec<_> = agent.listens().iter().filter(|at| at.ip() == outside).collect();
        assert!(!beyond.is_empty() && beyond.into_iter().all(|at| answers(*at)));
    });
}

#[test]
fn p16_variables_that_open_tcp_are_refused() {
    for variables in [
        &[("UCX_TLS", "tcp"), ("UCX_NET_DEVICES", "all")][..],
        &[("UCX_TLS", UNSET), ("UCX_NET_DEVICES", "eth0")],
        &[("UCX_TLS", "cma,tcp"), ("UCX_NET_DEVICES", "lo,eth0")],
    ] {
        isolated("lanes::p16_variables_that_open_tcp_are_refused", variables, || {
            for lanes in [Lanes::Auto, Lanes::Host] {
                let error = agent(NixlOptions::new("a").with_lanes(lanes)).unwrap_err();
                assert!(matches!(error, LaneError::Tcp { .. }), "{error}");
            }
            let error = preflight(&[], &NixlOptions::new("a"), Demands::default()).unwrap_err();
            assert!(error.to_string().contains("Lanes::InsecureTcp"), "{error}");
        });
    }
}

/// UCX's own file is read by every process on the host; what an agent asks for wins over it.
#[test]
fn p16_a_configuration_file_opens_nothing() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("ucx.conf"), "UCX_NET_DEVICES=all\n").unwrap();
    let variables = [PLAIN, &[("UCX_CONFIG_DIR", folder.path().to_str().unwrap())]].concat();
    isolated("lanes::p16_a_configuration_file_opens_nothing", &variables, || {
        let agent = agent(NixlOptions::new("a").with_lanes(Lanes::Host)).unwrap();
        assert!(!agent.listens().is_empty());
        assert!(agent.listens().iter().all(|address| address.ip().is_loopback()));
    });
}

/// A loopback interface that has another host's address, in a network of this thread's own: what is told UCX is right, and
/// where it listens is not.
#[test]
fn p16_an_agent_that_listens_all_the_same_is_ended() {
    const TEST: &str = "lanes::p16_an_agent_that_listens_all_the_same_is_ended";
    isolated(TEST, PLAIN, || {
        // SAFETY: only the network is left, and no file descriptor with it.
        if let Err(error) = unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
            return skip::skipped("root", TEST, &format!("a network of its own: {error}"));
        }
        for args in ["link set lo up", "address flush dev lo", "address add 192.0.2.7/32 dev lo"] {
            match Command::new("ip").args(args.split(' ')).status() {
                Ok(status) => assert!(status.success(), "ip {args}"),
                Err(error) => return skip::skipped("ip", TEST, &error.to_string()),
            }
        }
        let outside = "192.0.2.7".parse::<IpAddr>().unwrap();
        let error = agent(NixlOptions::new("a").with_lanes(Lanes::Host)).unwrap_err();
        let LaneError::Listens { addresses, .. } = &error else { panic!("{error}") };
        assert!(addresses.iter().all(|address| address.ip() == outside), "{error}");
        assert!(!addresses.iter().any(|&address| answers(address)), "{error}");
        // Asked for by name, it is there.
        let lanes = Lanes::InsecureTcp { interface: Some("lo".into()) };
        let agent = agent(NixlOptions::new("a").with_lanes(lanes)).unwrap();
        assert!(!agent.listens().is_empty());
        assert!(agent.listens().iter().all(|&at| at.ip() == outside && answers(at)));
    });
}

/// An engine opens its own ports while an agent starts.
#[test]
fn p16_others_listeners_are_not_the_agents() {
    isolated("lanes::p16_others_listeners_are_not_the_agents", PLAIN, || {
        let before = TcpListener::bind("0.0.0.0:0").unwrap();
        agent(NixlOptions::new("a").with_lanes(Lanes::Host)).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut held = Vec::new();
                // None is closed before the end: an agent is blamed for what ends with it.
                while !done.load(Ordering::Relaxed) {
                    if held.len() < 2_000 {
                        held.push(TcpListener::bind("0.0.0.0:0").unwrap());
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            for _ in 0..10 {
                let blamed =
                    NixlTransport::new(library(), NixlOptions::new("b").with_lanes(Lanes::Host));
                match blamed {
                    Ok(agent) => assert!(agent.listens().len() < 100),
                    Err(TransportError::Start { cause: Cause::Lanes(error), .. }) => {
                        assert!(matches!(*error, LaneError::Unverified { .. }), "{error}");
                    }
                    Err(other) => panic!("{other}"),
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        drop(before);
    });
}

#[test]
fn lanes_are_refused_by_name() {
    isolated("lanes::lanes_are_refused_by_name", PLAIN, || {
        let rdma = Lanes::Rdma { devices: vec!["no_such_adapter".into()] };
        let error = agent(NixlOptions::new("a").with_lanes(rdma)).unwrap_err();
        assert!(matches!(error, LaneError::NoAdapter { .. }), "{error}");
        for (key, value) in [("device_list", "eth0"), ("engine_config", "TLS=tcp")] {
            let error = agent(NixlOptions::new("a").with_param(key, value)).unwrap_err();
            assert!(matches!(error, LaneError::Parameter { .. }), "{error}");
        }
        // What chooses no lanes is passed on.
        agent(NixlOptions::new("a").with_param("engine_config", "MAX_RMA_RAILS=1")).unwrap();
    });
}

#[test]
fn targets_publish_nothing() {
    isolated("lanes::targets_publish_nothing", PLAIN, || {
        let target = agent(NixlOptions::new("target").with_publishing(false)).unwrap();
        let error = target.metadata().unwrap_err();
        assert!(
            matches!(error, TransportError::Connect { cause: Cause::Unpublished, .. }),
            "{error}"
        );
        let source = agent(NixlOptions::new("source")).unwrap();
        target.connect(source.agent(), &source.metadata().unwrap()).unwrap();
    });
}

fn passes() {
    for publishes in [true, false] {
        let options = NixlOptions::new("preflight").with_publishing(publishes);
        let started = Instant::now();
        let report = preflight(&[], &options, Demands::new(1 << 40, 64)).unwrap();
        println!("{report}\nin {:?}", started.elapsed());
        assert!(report.library.as_deref().is_some_and(Path::exists));
        assert!(report.listens.iter().all(|address| address.ip().is_loopback()));
        assert!(report.pulled_bytes > 1_000_000);
    }
}

#[test]
fn preflight_passes_one_sided() {
    isolated("lanes::preflight_passes_one_sided", &[("UCX_TLS", UNSET)], passes);
}

#[test]
fn preflight_passes_emulated() {
    isolated("lanes::preflight_passes_emulated", &[("UCX_TLS", "tcp")], passes);
}

#[test]
fn preflight_names_what_is_wrong() {
    isolated("lanes::preflight_names_what_is_wrong", PLAIN, || {
        let options = NixlOptions::new("preflight");
        let most = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(300), ..most }).unwrap();
        let error = preflight(&[], &options, Demands::new(0, 64)).unwrap_err();
        let PreflightError::OpenFiles { have: 300, peers: 64, .. } = error else {
            panic!("{error}")
        };
        setrlimit(Resource::Nofile, most).unwrap();
        let rdma = Lanes::Rdma { devices: vec!["no_such_adapter".into()] };
        let error = preflight(&[], &options.with_lanes(rdma), Demands::default()).unwrap_err();
        assert!(matches!(error, PreflightError::Transport { .. }), "{error}");
    });
}

#[test]
fn preflight_says_that_there_is_no_library() {
    let absent = [("REFIT_NIXL_LIBRARY", "/nonexistent/libnixl_capi.so"), ("LD_LIBRARY_PATH", "")];
    isolated("lanes::preflight_says_that_there_is_no_library", &absent, || {
        let error = preflight(&[], &NixlOptions::new("a"), Demands::default()).unwrap_err();
        assert!(matches!(error, PreflightError::Library(_)), "{error}");
    });
}
