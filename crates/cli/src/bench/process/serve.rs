//! Serving over the transports that cross processes.

use std::io::BufRead;
use std::sync::Arc;

use refit::transport::Transport;

use super::super::args::{RankArgs, Role};
use super::super::protocol::Reply;
use super::super::rank::{self, RankSetup};
use crate::device::Home;
use crate::error::CliError;
use crate::transports::{self, TransportName};

/// Serves a rank over the transport that was asked for.
pub(super) fn serve(args: &RankArgs, setup: &RankSetup, say: fn(&Reply)) -> Result<(), CliError> {
    let home = Home::new(setup.gpu)?;
    let (role, name) = (args.role, format!("{}-{}", args.role.name(), setup.rank));
    match args.transport {
        #[cfg(feature = "nixl")]
        TransportName::Nixl => {
            let transport = transports::nixl(&name, role == Role::Source, &home)?;
            follow(role, setup, &home, transport, say)
        }
        #[cfg(feature = "cuda")]
        TransportName::Peer => follow(role, setup, &home, transports::peer(&name, &home)?, say),
        #[cfg(feature = "cuda")]
        TransportName::Auto => {
            let transport = transports::auto(&name, role == Role::Source, &home)?;
            follow(role, setup, &home, transport, say)
        }
        other => Err(transports::missing(other)),
    }
}

/// Carries out the commands from standard input.
fn follow<T: Transport>(
    role: Role,
    setup: &RankSetup,
    home: &Home,
    transport: Arc<T>,
    say: fn(&Reply),
) -> Result<(), CliError> {
    let commands =
        std::io::stdin().lock().lines().map_while(|line| serde_json::from_str(&line.ok()?).ok());
    match role {
        Role::Source => rank::source(setup, home, transport, commands, |reply| say(&reply)),
        Role::Target => rank::target(setup, home, transport, commands, |reply| say(&reply)),
    }
}
