//! Which etcd, and as whom.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};

use crate::rendezvous::{Key, RendezvousError};

/// How long a call may take, if nobody says otherwise.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How often a connection with nothing on it is tried; servers take more than one in 5 seconds for an attack.
const PING: Duration = Duration::from_secs(6);

/// Which etcd, and as whom.
///
/// Everything that is secret stays out of `Debug`, errors and logs.
#[derive(Clone)]
pub struct EtcdOptions {
    pub(super) endpoints: Vec<String>,
    pub(super) root: String,
    pub(super) timeout: Duration,
    user: Option<(String, String)>,
    authority: Option<Vec<u8>>,
    identity: Option<(Vec<u8>, Vec<u8>)>,
    domain: Option<String>,
}

impl EtcdOptions {
    /// A cluster, by the addresses of its members: `http://127.0.0.1:2379`, `https://etcd-0.example:2379`.
    pub fn new<E: Into<String>>(endpoints: impl IntoIterator<Item = E>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            root: "refit".to_owned(),
            timeout: TIMEOUT,
            user: None,
            authority: None,
            identity: None,
            domain: None,
        }
    }

    /// What all keys begin with, `refit` if nobody says otherwise: letters, digits, `.`, `_`, `-`, and `/` between parts.
    /// Jobs with different ones do not see each other.
    #[must_use]
    pub fn with_root(mut self, root: impl Into<String>) -> Self {
        self.root = root.into();
        self
    }

    /// How long a call may take before it is an error, 5 seconds if nobody says otherwise.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// A user of etcd and its password. Passwords go over `https://` or to this host only.
    #[must_use]
    pub fn with_user(mut self, name: impl Into<String>, password: impl Into<String>) -> Self {
        self.user = Some((name.into(), password.into()));
        self
    }

    /// Certificates, as PEM, of the authorities that a server's certificate must come from. `https://` needs it: what
    /// the system trusts is not consulted.
    #[must_use]
    pub fn with_authority(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.authority = Some(pem.into());
        self
    }

    /// The certificate and the key, as PEM, by which a server is to know this process.
    #[must_use]
    pub fn with_identity(
        mut self,
        certificate: impl Into<Vec<u8>>,
        key: impl Into<Vec<u8>>,
    ) -> Self {
        self.identity = Some((certificate.into(), key.into()));
        self
    }

    /// The name that a server's certificate must bear, if not that of its address.
    #[must_use]
    pub fn with_domain(mut self, domain: impl Into<String>) -> Self {
        self.domain = Some(domain.into());
        self
    }

    /// What the client wants to know, once it is clear that it makes sense.
    pub(super) fn connect(&self) -> Result<ConnectOptions, RendezvousError> {
        let refuse = |why: &'static str| Err(RendezvousError::Options { store: super::STORE, why });
        if self.endpoints.is_empty() {
            return refuse("no address of a server is given");
        }
        if Key::new(self.root.split('/')).is_err() {
            return refuse(
                "the root has other characters than letters, digits, `.`, `_`, `-`, and `/` between parts",
            );
        }
        if self.timeout.is_zero() {
            return refuse("no call can be done in no time; give a timeout");
        }
        let mut tls = false;
        for endpoint in &self.endpoints {
            let (secure, rest) =
                match (endpoint.strip_prefix("https://"), endpoint.strip_prefix("http://")) {
                    (Some(rest), _) => (true, rest),
                    (_, Some(rest)) => (false, rest),
                    _ => return refuse("an address begins with neither `https://` nor `http://`"),
                };
            if rest.contains('@') {
                return refuse("an address has a user in it, which logs would show; give it apart");
            }
            if self.user.is_some() && !secure && !is_loopback(rest) {
                return refuse(
                    "a password would go over the network in the clear; use `https://` addresses",
                );
            }
            tls |= secure;
            if !secure && (self.authority.is_some() || self.identity.is_some()) {
                return refuse("certificates are given, but an address begins with `http://`");
            }
        }
        let mut options = ConnectOptions::new()
            .with_connect_timeout(self.timeout)
            .with_keep_alive(PING, self.timeout)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some((name, password)) = &self.user {
            options = options.with_user(name, password);
        }
        if tls {
            let Some(authority) = &self.authority else {
                return refuse(
                    "an address begins with `https://`, but no certificate of an authority is given",
                );
            };
            let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(authority));
            if let Some((certificate, key)) = &self.identity {
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            if let Some(domain) = &self.domain {
                tls = tls.domain_name(domain);
            }
            options = options.with_tls(tls);
        }
        Ok(options)
    }
}

/// Whether an address without its scheme is on this host.
fn is_loopback(address: &str) -> bool {
    let host = address.split('/').next().unwrap_or_default();
    let host = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdOptions")
            .field("endpoints", &self.endpoints)
            .field("root", &self.root)
            .field("timeout", &self.timeout)
            .field("user", &self.user.as_ref().map(|(name, _)| name))
            .field("authority", &self.authority.is_some())
            .field("identity", &self.identity.is_some())
            .field("domain", &self.domain)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(options: &EtcdOptions) -> &'static str {
        match options.connect() {
            Ok(_) => "",
            Err(RendezvousError::Options { why, .. }) => why,
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let local = || EtcdOptions::new(["http://127.0.0.1:2379"]);
        let far = || EtcdOptions::new(["http://etcd.example:2379"]);
        let tls = || EtcdOptions::new(["https://etcd.example:2379"]);
        for (options, expected) in [
            (EtcdOptions::new([""; 0]), "no address"),
            (EtcdOptions::new(["127.0.0.1:2379"]), "neither"),
            (EtcdOptions::new(["http://me:secret@127.0.0.1:2379"]), "logs would show"),
            (local().with_root("a//b"), "the root"),
            (local().with_root(""), "the root"),
            (local().with_timeout(Duration::ZERO), "in no time"),
            (far().with_user("me", "secret"), "in the clear"),
            (
                EtcdOptions::new(["http://127.0.0.1.example:1"]).with_user("me", "secret"),
                "in the clear",
            ),
            (tls().with_user("me", "secret"), "no certificate"),
            (local().with_authority("pem"), "certificates are given"),
        ] {
            assert!(why(&options).contains(expected), "{options:?}: {}", why(&options));
        }
        for options in [
            local().with_user("me", "secret"),
            EtcdOptions::new(["http://[::1]:2379", "http://localhost:1"]).with_user("me", "secret"),
            far(),
            tls().with_authority("pem").with_user("me", "secret"),
        ] {
            assert_eq!(why(&options), "", "{options:?}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let options = EtcdOptions::new(["https://a:1"])
            .with_user("me", "hush")
            .with_authority("hush")
            .with_identity("hush", "hush");
        let shown = format!("{options:?}");
        assert!(shown.contains("me") && !shown.contains("hush"), "{shown}");
    }
}
