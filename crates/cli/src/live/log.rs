//! Logging to standard error.

use std::io;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::error::CliError;

/// Logs what RUST_LOG says, or what so many `-v` say.
pub(super) fn start(verbose: u8) -> Result<(), CliError> {
    let wanted = match verbose {
        0 => "warn",
        1 => "warn,refit=info",
        2 => "warn,refit=debug",
        _ => "info,refit=trace",
    };
    let filter = match std::env::var(EnvFilter::DEFAULT_ENV) {
        Ok(text) if !text.is_empty() => EnvFilter::try_new(&text)
            .map_err(|error| CliError::Usage(format!("RUST_LOG=`{text}`: {error}")))?,
        _ => EnvFilter::new(wanted),
    };
    // It logs the addresses of what is registered, which are nobody else's to know.
    let quiet = "nixl_sys=info".parse().map_err(|_| CliError::Usage("RUST_LOG".to_owned()))?;
    let filter = filter.add_directive(quiet);
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(false)
        // Stages are spans: when one closes, its line says how long it took.
        .with_span_events(FmtSpan::CLOSE)
        .try_init()
        .map_err(|error| CliError::Usage(format!("logging cannot start: {error}")))
}
