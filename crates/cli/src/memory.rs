//! The most memory that this process has had resident.

use std::fs;

use crate::error::CliError;

/// Forgets the peak so far, where the kernel lets us; where not, a peak is that of the whole run until then.
pub(crate) fn forget_peak() {
    // proc(5): writing 5 resets VmHWM. Some sandboxes forbid it.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// `VmHWM`, in bytes.
pub(crate) fn peak_bytes() -> Result<u64, CliError> {
    let status = fs::read_to_string("/proc/self/status")
        .map_err(CliError::system("read /proc/self/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    Ok(kilobytes.unwrap_or_default() * 1024)
}
