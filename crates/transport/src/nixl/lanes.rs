//! Which ways UCX may take to a peer. Pure, but for looking at the environment and at the host's adapters.
//!
//! UCX takes whatever it finds: on TCP it listens on every interface, and whoever connects there can read and write this
//! process, registered memory or not. What it may take is said when an agent is made, as parameters of NIXL's plugin:
//! `engine_config` goes to `ucp_config_modify` for that agent's context alone. Two of its properties shape this module. A
//! variable of the environment wins over it, so `UCX_TLS` and `UCX_NET_DEVICES` are looked at and refused where they say
//! otherwise. And it is cut at commas, so a value can only be one word: `lo`, or `^tcp`, which is all but TCP.

use std::fmt;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::Path;

/// Which ways UCX may take to a peer.
///
/// Whatever is chosen is logged when an agent starts, and every listener that the agent opened is looked at: one beyond
/// loopback is an error unless [`InsecureTcp`](Self::InsecureTcp) was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lanes {
    /// [`Rdma`](Self::Rdma) over all adapters where this process can open one with an active port, else
    /// [`Host`](Self::Host).
    #[default]
    Auto,
    /// Peers of this host: shared memory, one process copying from another, CUDA IPC, and TCP over loopback.
    Host,
    /// RDMA and what [`Host`](Self::Host) has, but no TCP at all.
    Rdma {
        /// The adapters, such as `mlx5_0`; none: all of them.
        devices: Vec<String>,
    },
    /// TCP as well, over this interface or over all. Everybody who can open a connection to it can read and write the
    /// memory of this process: for networks that nobody else is on.
    InsecureTcp {
        /// The interface, such as `eth0`; none: all of them.
        interface: Option<String>,
    },
}

impl fmt::Display for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Host => f.write_str("host"),
            Self::Rdma { devices } if devices.is_empty() => f.write_str("rdma"),
            Self::Rdma { devices } => write!(f, "rdma:{}", devices.join("+")),
            Self::InsecureTcp { interface: None } => f.write_str("insecure-tcp"),
            Self::InsecureTcp { interface: Some(interface) } => {
                write!(f, "insecure-tcp:{interface}")
            }
        }
    }
}

/// Why an agent does not get its lanes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LaneError {
    /// The environment opens TCP beyond loopback.
    #[error(
        "lanes `{lanes}` and UCX_TLS=`{tls}`, UCX_NET_DEVICES=`{devices}` would let UCX use TCP beyond loopback, where \
         whoever connects can read and write this process: unset the variables, or ask for it by name \
         (`Lanes::InsecureTcp`)"
    )]
    Tcp {
        /// What was asked for.
        lanes: Lanes,
        /// What UCX would take for `UCX_TLS`.
        tls: String,
        /// What UCX would take for `UCX_NET_DEVICES`.
        devices: String,
    },
    /// The environment overrides what was asked for.
    #[error(
        "{variable}=`{value}` in the environment overrides lanes `{lanes}`: unset it, or ask for the lanes that it means"
    )]
    Overridden {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What was asked for.
        lanes: Lanes,
    },
    /// A transport that is not on the list.
    #[error(
        "UCX_TLS names `{name}`, which is not on the list of transports that are allowed ({}): leave it out",
        TRANSPORTS.join(", ")
    )]
    Transport {
        /// The name.
        name: String,
    },
    /// Not the name of an adapter or interface.
    #[error(
        "`{name}` cannot be the name of an adapter or interface: 1 to 64 letters, digits, `.`, `_` and `-`"
    )]
    Device {
        /// What was given.
        name: String,
    },
    /// No adapter to use.
    #[error(
        "lanes `{lanes}` need an RDMA adapter with an active port that this process may open, and the host has {found}: \
         pass /dev/infiniband into the container and check `ibstat`, or use `Lanes::Host` where all peers are on one host"
    )]
    NoAdapter {
        /// What was asked for.
        lanes: Lanes,
        /// Adapters that could be used.
        found: String,
    },
    /// A parameter of the plugin that chooses lanes as well.
    #[error("parameter `{key}` chooses lanes: choose them with `NixlOptions::with_lanes`")]
    Parameter {
        /// The parameter.
        key: String,
    },
    /// The agent listened where others can connect.
    #[error(
        "with lanes `{lanes}` the agent listened on {}, beyond loopback, where whoever connects can read and write this \
         process; it was ended again. Look for a UCX configuration file (ucx.conf), or ask for it by name \
         (`Lanes::InsecureTcp`)",
        list(addresses)
    )]
    Listens {
        /// What was asked for.
        lanes: Lanes,
        /// Where it listened.
        addresses: Vec<SocketAddr>,
    },
    /// It could not be found out where the agent listens.
    #[error(
        "where the agent listens cannot be told ({why}), so that it may be beyond loopback: mount /proc, or ask for TCP by \
         name (`Lanes::InsecureTcp`)"
    )]
    Unverified {
        /// Why not.
        why: String,
    },
}

fn list(addresses: &[SocketAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Every transport of UCX that may be named in `UCX_TLS`, aliases included.
const TRANSPORTS: &[&str] = &[
    "all",
    "self",
    "sm",
    "shm",
    "mm",
    "posix",
    "sysv",
    "cma",
    "knem",
    "xpmem",
    "tcp",
    "ib",
    "rc",
    "rc_v",
    "rc_x",
    "rc_verbs",
    "rc_mlx5",
    "rc_gda",
    "ud",
    "ud_v",
    "ud_x",
    "ud_verbs",
    "ud_mlx5",
    "dc",
    "dc_x",
    "dc_mlx5",
    "gga",
    "gga_mlx5",
    "srd",
    "cuda",
    "cuda_copy",
    "cuda_ipc",
    "gdr_copy",
];

/// Parameters of the plugin and settings of UCX that would undo what is chosen here.
const CHOOSING: [&str; 2] = ["device_list", "ucx_devices"];

/// What the environment says to UCX about lanes.
#[derive(Clone, Debug, Default)]
pub(super) struct Environment {
    pub(super) tls: Option<String>,
    pub(super) devices: Option<String>,
}

impl Environment {
    pub(super) fn current() -> Self {
        // What is not UTF-8 names no transport and no device: it is refused with the sign for what it was not.
        let get = |name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        Self { tls: get("UCX_TLS"), devices: get("UCX_NET_DEVICES") }
    }
}

/// Lanes as UCX is told them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chosen {
    /// For what was asked.
    pub(super) lanes: Lanes,
    /// What UCX will take for `UCX_TLS` and for `UCX_NET_DEVICES`.
    pub(super) tls: String,
    pub(super) devices: String,
    /// Whether an RDMA adapter is among them.
    pub(super) rdma: bool,
    /// `engine_config`'s elements, before the caller's own.
    settings: Vec<String>,
    /// `device_list`, if adapters were named.
    device_list: Option<String>,
}

impl Chosen {
    /// Whether listeners beyond loopback were asked for.
    pub(super) fn may_listen_anywhere(&self) -> bool {
        matches!(self.lanes, Lanes::InsecureTcp { .. })
    }

    /// The parameters of the plugin: the caller's and those that choose the lanes.
    pub(super) fn params(
        &self,
        given: &[(String, String)],
    ) -> Result<Vec<(String, String)>, LaneError> {
        let mut params = Vec::new();
        let mut settings = self.settings.clone();
        for (key, value) in given {
            if CHOOSING.contains(&key.as_str()) {
                return Err(LaneError::Parameter { key: key.clone() });
            }
            if key != "engine_config" {
                params.push((key.clone(), value.clone()));
                continue;
            }
            for setting in value.split(',') {
                // UCX takes them with its prefix as well, and in either case.
                let name =
                    setting.split('=').next().unwrap_or_default().trim().to_ascii_uppercase();
                let name = name.strip_prefix("UCX_").unwrap_or(&name);
                if matches!(name, "TLS" | "NET_DEVICES") {
                    return Err(LaneError::Parameter { key: format!("engine_config {name}") });
                }
                settings.push(setting.to_owned());
            }
        }
        if !settings.is_empty() {
            params.push(("engine_config".to_owned(), settings.join(",")));
        }
        params.extend(self.device_list.clone().map(|list| ("device_list".to_owned(), list)));
        Ok(params)
    }
}

/// How far TCP reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Tcp {
    Off,
    Loopback,
    Beyond,
}

/// What UCX is to be told, given what the environment tells it and the adapters that can be used.
pub(super) fn choose(
    lanes: &Lanes,
    environment: &Environment,
    adapters: &[String],
) -> Result<Chosen, LaneError> {
    let names: &[String] = match lanes {
        Lanes::Rdma { devices } => devices,
        Lanes::InsecureTcp { interface: Some(interface) } => std::slice::from_ref(interface),
        _ => &[],
    };
    if let Some(name) = names.iter().find(|name| !plain(name)) {
        return Err(LaneError::Device { name: name.escape_debug().to_string() });
    }
    let no_adapter = || LaneError::NoAdapter {
        lanes: lanes.clone(),
        found: if adapters.is_empty() { "none".into() } else { adapters.join(", ") },
    };
    let (tls, devices, device_list) = match lanes {
        Lanes::Auto if !adapters.is_empty() && leaves_rdma(environment, adapters)? => {
            (Some("^tcp"), None, None)
        }
        Lanes::Auto | Lanes::Host => (None, Some("lo"), None),
        Lanes::Rdma { devices } => {
            if adapters.is_empty() || devices.iter().any(|name| !adapters.contains(name)) {
                return Err(no_adapter());
            }
            // NIXL cuts at a comma and a blank, and adds the port. It wins over the environment.
            (Some("^tcp"), None, (!devices.is_empty()).then(|| devices.join(", ")))
        }
        Lanes::InsecureTcp { interface } => (None, interface.as_deref(), None),
    };
    let effective = |given: &Option<String>, ours: Option<&str>| {
        given.as_deref().or(ours).unwrap_or("all").to_owned()
    };
    let mut chosen = Chosen {
        lanes: lanes.clone(),
        rdma: false,
        tls: effective(&environment.tls, tls),
        devices: match &device_list {
            Some(list) => list.replace(", ", ","),
            None => effective(&environment.devices, devices),
        },
        settings: [
            tls.map(|tls| format!("TLS={tls}")),
            devices.map(|name| format!("NET_DEVICES={name}")),
        ]
        .into_iter()
        .flatten()
        .collect(),
        device_list,
    };
    chosen.rdma = !adapters.is_empty() && chosen.devices != "lo";
    let tcp = reach(&chosen.tls, &chosen.devices, adapters)?;
    let allowed = match lanes {
        Lanes::Auto | Lanes::Host => Tcp::Loopback,
        Lanes::Rdma { .. } => Tcp::Off,
        Lanes::InsecureTcp { .. } => Tcp::Beyond,
    };
    if tcp == Tcp::Beyond && allowed < tcp {
        let Chosen { lanes, tls, devices, .. } = chosen;
        return Err(LaneError::Tcp { lanes, tls, devices });
    }
    let overridden =
        |variable, value: String| LaneError::Overridden { variable, value, lanes: lanes.clone() };
    if tcp > allowed {
        return Err(overridden("UCX_TLS", chosen.tls));
    }
    // What was asked for by name has to be what there is.
    if matches!(lanes, Lanes::Host | Lanes::InsecureTcp { interface: Some(_) })
        && devices.is_some_and(|devices| chosen.devices != devices)
    {
        return Err(overridden("UCX_NET_DEVICES", chosen.devices));
    }
    Ok(chosen)
}

/// Whether the environment lets UCX use adapters with TCP off.
fn leaves_rdma(environment: &Environment, adapters: &[String]) -> Result<bool, LaneError> {
    let devices = environment.devices.as_deref().unwrap_or("all");
    let some = devices.split(',').map(str::trim).any(|device| {
        let adapter = device.split(':').next().unwrap_or_default();
        device == "all" || adapters.iter().any(|known| known == adapter)
    });
    Ok(some && reach(environment.tls.as_deref().unwrap_or("^tcp"), devices, adapters)? == Tcp::Off)
}

fn plain(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=64).contains(&name.len()) && name.bytes().all(plain)
}

/// How far TCP reaches with these values of `UCX_TLS` and `UCX_NET_DEVICES`; where in doubt, further.
fn reach(tls: &str, devices: &str, adapters: &[String]) -> Result<Tcp, LaneError> {
    let (inverted, names) = match tls.strip_prefix('^') {
        Some(rest) => (true, rest),
        None => (false, tls),
    };
    let mut named = false;
    for name in names.split(',').map(str::trim) {
        // A backslash asks for exactly this one, and what follows a colon for what it may be used.
        let plain = name.trim_start_matches('\\');
        let plain = plain.split(':').next().unwrap_or_default();
        if !TRANSPORTS.contains(&plain) {
            return Err(LaneError::Transport { name: name.escape_debug().to_string() });
        }
        named |= plain == "tcp" || plain == "all";
    }
    if named == inverted {
        return Ok(Tcp::Off);
    }
    let mut reach = Tcp::Off;
    for device in devices.split(',').map(str::trim) {
        let adapter = device.split(':').next().unwrap_or_default();
        if device == "lo" {
            reach = reach.max(Tcp::Loopback);
        } else if !adapters.iter().any(|known| known == adapter) {
            // Interfaces, patterns, inversions and `all`.
            reach = Tcp::Beyond;
        }
    }
    Ok(reach)
}

/// The RDMA adapters with an active port that this process may open.
pub(super) fn adapters() -> Vec<String> {
    usable(Path::new("/sys/class"), Path::new("/dev/infiniband"))
}

fn usable(class: &Path, nodes: &Path) -> Vec<String> {
    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    let active = |adapter: &str| {
        let ports = class.join("infiniband").join(adapter).join("ports");
        let state = |port: &String| fs::read_to_string(ports.join(port).join("state"));
        names(&ports)
            .iter()
            .filter_map(|port| state(port).ok())
            .any(|state| state.starts_with("4:"))
    };
    let mut adapters: Vec<String> = names(&class.join("infiniband_verbs"))
        .iter()
        .filter(|node| File::options().read(true).write(true).open(nodes.join(node)).is_ok())
        .filter_map(|node| {
            fs::read_to_string(class.join("infiniband_verbs").join(node).join("ibdev")).ok()
        })
        .map(|adapter| adapter.trim().to_owned())
        .filter(|adapter| plain(adapter) && active(adapter))
        .collect();
    adapters.sort();
    adapters.dedup();
    adapters
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(tls: Option<&str>, devices: Option<&str>) -> Environment {
        Environment { tls: tls.map(Into::into), devices: devices.map(Into::into) }
    }

    fn chosen(lanes: &Lanes, adapters: &[&str]) -> Result<Chosen, LaneError> {
        with(lanes, None, None, adapters)
    }

    fn with(
        lanes: &Lanes,
        tls: Option<&str>,
        devices: Option<&str>,
        adapters: &[&str],
    ) -> Result<Chosen, LaneError> {
        let adapters: Vec<String> = adapters.iter().map(ToString::to_string).collect();
        choose(lanes, &environment(tls, devices), &adapters)
    }

    fn params(lanes: &Lanes, adapters: &[&str]) -> Vec<(String, String)> {
        chosen(lanes, adapters).unwrap().params(&[]).unwrap()
    }

    fn rdma(devices: &[&str]) -> Lanes {
        Lanes::Rdma { devices: devices.iter().map(ToString::to_string).collect() }
    }

    fn tcp(interface: Option<&str>) -> Lanes {
        Lanes::InsecureTcp { interface: interface.map(Into::into) }
    }

    fn pair(key: &str, value: &str) -> Vec<(String, String)> {
        vec![(key.into(), value.into())]
    }

    #[test]
    fn what_ucx_is_told() {
        let ib: &[&str] = &["mlx5_0", "mlx5_1"];
        assert_eq!(params(&Lanes::Auto, &[]), pair("engine_config", "NET_DEVICES=lo"));
        assert_eq!(params(&Lanes::Auto, ib), pair("engine_config", "TLS=^tcp"));
        assert_eq!(params(&Lanes::Host, ib), pair("engine_config", "NET_DEVICES=lo"));
        assert_eq!(params(&rdma(&[]), ib), pair("engine_config", "TLS=^tcp"));
        let mut named = pair("engine_config", "TLS=^tcp");
        named.extend(pair("device_list", "mlx5_0, mlx5_1"));
        assert_eq!(params(&rdma(ib), ib), named);
        assert_eq!(params(&tcp(None), &[]), []);
        assert_eq!(params(&tcp(Some("eth0")), &[]), pair("engine_config", "NET_DEVICES=eth0"));
    }

    #[test]
    fn tcp_beyond_loopback_takes_its_name() {
        let ib: &[&str] = &["mlx5_0"];
        for (tls, devices) in [
            (None, Some("eth0")),
            (None, Some("all")),
            (None, Some("lo,eth0")),
            (None, Some("^lo")),
            (None, Some("l*")),
            (None, Some("")),
            (Some("tcp"), Some("eth0")),
            (Some("^cma"), Some("eth0")),
            (Some("\\tcp"), Some("eth0")),
            (Some("cma,tcp:aux"), Some("eth0")),
            (Some("all"), Some("mlx5_0:1,eth0")),
        ] {
            for lanes in [Lanes::Auto, Lanes::Host] {
                let refused = with(&lanes, tls, devices, &[]);
                assert!(
                    matches!(refused, Err(LaneError::Tcp { .. })),
                    "{tls:?} {devices:?}: {refused:?}"
                );
            }
            assert!(with(&tcp(None), tls, devices, &[]).is_ok(), "{tls:?} {devices:?}");
        }
        assert!(matches!(with(&rdma(&[]), Some("all"), None, ib), Err(LaneError::Tcp { .. })));
        let loopback = with(&rdma(&[]), Some("tcp"), Some("lo"), ib);
        assert!(matches!(loopback, Err(LaneError::Overridden { variable: "UCX_TLS", .. })));
        let other = with(&tcp(Some("eth0")), None, Some("eth1"), &[]);
        assert!(matches!(other, Err(LaneError::Overridden { variable: "UCX_NET_DEVICES", .. })));
    }

    #[test]
    fn an_environment_that_opens_nothing_may_choose() {
        let ib: &[&str] = &["mlx5_0"];
        for (lanes, tls, devices, adapters) in [
            (Lanes::Auto, Some("tcp"), None, &[][..]),
            (Lanes::Auto, Some("tcp"), Some("lo"), &[]),
            (Lanes::Auto, Some("tcp"), None, ib),
            (Lanes::Auto, None, Some("lo"), ib),
            (Lanes::Host, Some("sm,self,cma,tcp,cuda"), Some("lo"), &[]),
            (Lanes::Auto, Some("rc,cuda_copy,cuda_ipc"), None, ib),
            (Lanes::Auto, Some("rc"), Some("eth0"), ib),
            (Lanes::Auto, None, Some("mlx5_0:1"), ib),
            (Lanes::Auto, Some("all"), Some("lo,mlx5_0:1"), ib),
            (rdma(&["mlx5_0"]), Some("all"), Some("eth0"), ib),
        ] {
            let found = with(&lanes, tls, devices, adapters);
            assert!(found.is_ok(), "{lanes} {tls:?} {devices:?}: {found:?}");
        }
    }

    /// Where the environment keeps UCX within the host, adapters are no reason to turn TCP off: nothing would be left.
    #[test]
    fn auto_leaves_a_lane() {
        for (tls, devices) in [(None, Some("lo")), (Some("tcp"), Some("lo")), (Some("tcp"), None)] {
            let chosen = with(&Lanes::Auto, tls, devices, &["mlx5_0"]).unwrap();
            assert_eq!(chosen.params(&[]).unwrap(), pair("engine_config", "NET_DEVICES=lo"));
            assert!(!chosen.rdma);
        }
        assert!(with(&Lanes::Auto, None, None, &["mlx5_0"]).unwrap().rdma);
    }

    #[test]
    fn transports_come_from_the_list() {
        for (tls, name) in
            [("", ""), ("tpc", "tpc"), ("rc,,tcp", ""), ("^", ""), ("a\u{202e}", "a\\u{202e}")]
        {
            let name = name.to_owned();
            assert_eq!(
                with(&Lanes::Host, Some(tls), None, &[]),
                Err(LaneError::Transport { name })
            );
        }
    }

    #[test]
    fn adapters_that_cannot_be_used_are_not() {
        let error = chosen(&rdma(&[]), &[]).unwrap_err();
        assert!(matches!(&error, LaneError::NoAdapter { found, .. } if found == "none"), "{error}");
        let error = chosen(&rdma(&["mlx5_7"]), &["mlx5_0"]).unwrap_err();
        assert!(error.to_string().contains("rdma:mlx5_7") && error.to_string().contains("mlx5_0"));
        for name in ["", "a,b", "a, b", "a=b", "a\n"] {
            assert!(matches!(chosen(&rdma(&[name]), &["a"]), Err(LaneError::Device { .. })));
            assert!(matches!(chosen(&tcp(Some(name)), &[]), Err(LaneError::Device { .. })));
        }
    }

    #[test]
    fn parameters_do_not_undo_the_choice() {
        let chosen = chosen(&Lanes::Host, &[]).unwrap();
        for (key, value) in [
            ("device_list", "eth0"),
            ("ucx_devices", "eth0"),
            ("engine_config", "NET_DEVICES=eth0"),
            ("engine_config", "MAX_RMA_RAILS=1,UCX_TLS=tcp"),
            ("engine_config", "net_devices=all"),
        ] {
            let refused = chosen.params(&pair(key, value));
            assert!(matches!(refused, Err(LaneError::Parameter { .. })), "{key} {value}");
        }
        let mut given = pair("engine_config", "MAX_RMA_RAILS=1");
        given.extend(pair("num", "1"));
        let mut wanted = pair("num", "1");
        wanted.extend(pair("engine_config", "NET_DEVICES=lo,MAX_RMA_RAILS=1"));
        assert_eq!(chosen.params(&given).unwrap(), wanted);
    }

    #[test]
    fn adapters_are_those_that_are_active_and_may_be_opened() {
        let folder = std::env::temp_dir().join(format!("refit-adapters-{}", std::process::id()));
        let (class, nodes) = (folder.join("class"), folder.join("nodes"));
        let write = |path: &Path, text: &str| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for (node, adapter, state, there) in [
            ("uverbs0", "mlx5_0", "4: ACTIVE\n", true),
            ("uverbs1", "mlx5_1", "1: DOWN\n", true),
            ("uverbs2", "mlx5_2", "4: ACTIVE\n", false),
        ] {
            write(&class.join("infiniband").join(adapter).join("ports/1/state"), state);
            write(
                &class.join("infiniband_verbs").join(node).join("ibdev"),
                &format!("{adapter}\n"),
            );
            if there {
                write(&nodes.join(node), "");
            }
        }
        write(&class.join("infiniband_verbs/abi_version"), "6\n");
        assert_eq!(usable(&class, &nodes), ["mlx5_0"]);
        assert_eq!(usable(&folder.join("none"), &nodes), [""; 0]);
        fs::remove_dir_all(folder).unwrap();
    }
}
