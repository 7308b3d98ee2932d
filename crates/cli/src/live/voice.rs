//! What a rank tells on standard output: a line for each thing that happens.

use std::io::Write;

use serde::Serialize;

/// Something that has happened. Its names in JSON stay as they are.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Event {
    /// The host will do.
    Preflight { transport: &'static str, lanes: String },
    /// Metrics can be had.
    Metrics { address: String },
    /// The rank is there.
    Joined { side: &'static str, name: String, rank: u32, ranks: u32, bytes: u64 },
    /// A version is offered.
    Published { version: u64, seconds: f64 },
    /// A version is live, and was compared if that was asked for.
    Installed { version: u64, seconds: f64, verified_bytes: u64 },
    /// The session had ended, and the rank is there again.
    Rejoined { seconds: f64 },
    /// Something did not work, and is tried again.
    Failed { error: String },
    /// The rank is about to leave.
    Leaving { reason: &'static str },
    /// It has left.
    Left { unreleased: usize },
}

/// How it is told.
#[derive(Clone, Copy, Debug)]
pub(super) struct Voice {
    pub(super) json: bool,
}

impl Voice {
    /// Tells it. Nobody may listen any more, which is no reason to stop.
    pub(super) fn say(self, event: &Event) {
        let line =
            if self.json { serde_json::to_string(event).unwrap_or_default() } else { event.text() };
        let mut stdout = std::io::stdout().lock();
        let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
    }
}

impl Event {
    fn text(&self) -> String {
        match self {
            Self::Preflight { transport, lanes } => {
                format!("preflight: {transport}, lanes {lanes}")
            }
            Self::Metrics { address } => format!("metrics: http://{address}/metrics"),
            Self::Joined { side, name, rank, ranks, bytes } => {
                let bytes = crate::sizes::bytes(*bytes);
                format!("joined: rank {rank} of {ranks} of {side} `{name}`, {bytes}")
            }
            Self::Published { version, seconds } => {
                format!("published: version {version}, in {seconds:.3} s")
            }
            Self::Installed { version, seconds, verified_bytes: 0 } => {
                format!("installed: version {version}, in {seconds:.3} s, not compared")
            }
            Self::Installed { version, seconds, verified_bytes } => format!(
                "installed: version {version}, in {seconds:.3} s, {verified_bytes} bytes compared"
            ),
            Self::Rejoined { seconds } => {
                format!("rejoined: its session had ended, in {seconds:.3} s")
            }
            Self::Failed { error } => format!("failed: {error}"),
            Self::Leaving { reason } => format!("leaving: {reason}"),
            Self::Left { unreleased: 0 } => "left".to_owned(),
            Self::Left { unreleased } => {
                format!("left: {unreleased} readers did not give their leases back")
            }
        }
    }
}
