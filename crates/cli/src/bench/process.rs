//! One rank in a process of its own: commands from standard input, answers to standard output.

#[cfg(any(feature = "nixl", feature = "cuda"))]
mod serve;

use std::io::Write;
use std::process::ExitCode;

use super::args::RankArgs;
use super::protocol::Reply;
use crate::error::CliError;

/// Runs one rank until it is told to stop.
pub(crate) fn run_rank(args: &RankArgs) -> Result<ExitCode, CliError> {
    let served = serve(args);
    if let Err(error) = &served {
        say(&Reply::Failed { reason: error.to_string() });
    }
    Ok(if served.is_ok() { ExitCode::SUCCESS } else { ExitCode::from(2) })
}

fn serve(args: &RankArgs) -> Result<(), CliError> {
    let setup = args.setup()?;
    #[cfg(any(feature = "nixl", feature = "cuda"))]
    return serve::serve(args, &setup, say);
    #[cfg(not(any(feature = "nixl", feature = "cuda")))]
    {
        let _ = setup;
        Err(crate::transports::missing(args.transport))
    }
}

/// Answers on standard output; a bench that is gone closes it, and then the next command never comes.
fn say(reply: &Reply) {
    let line = serde_json::to_string(reply).unwrap_or_default() + "\n";
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(line.as_bytes()).and_then(|()| stdout.flush());
}
