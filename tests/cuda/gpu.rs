//! The devices there are, one test at a time.

use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::{result, sys};
use refit_pool::cuda::{CudaError, Device, Driver};
use refit_tests::skip;

/// Devices for a test, and its turn. When it goes, the thread's current context must be what it was.
pub(crate) struct Gpus {
    devices: Vec<Device>,
    before: Option<sys::CUcontext>,
    _turn: MutexGuard<'static, ()>,
}

impl Gpus {
    /// At least so many devices, or a word why not.
    pub(crate) fn get(test: &str, wanted: u32) -> Option<Self> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let why = match open() {
            Ok(devices) if devices.len() >= wanted as usize => {
                return Some(Self { devices, before: current(), _turn: turn });
            }
            Ok(devices) => format!("{wanted} devices are needed, there are {}", devices.len()),
            Err(error) => error.to_string(),
        };
        let required = std::env::var("REFIT_REQUIRE_CUDA").ok();
        let required = required.and_then(|value| value.parse().ok()).unwrap_or(0_u32);
        assert!(required < wanted, "cuda: {test}: {why}");
        let what = if wanted > 1 { format!("{wanted} GPUs") } else { "a GPU".into() };
        skip::skipped(&what, test, &why);
        None
    }
}

impl std::ops::Deref for Gpus {
    type Target = [Device];

    fn deref(&self) -> &[Device] {
        &self.devices
    }
}

impl Drop for Gpus {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(current(), self.before, "the thread's current context was changed");
        }
    }
}

fn open() -> Result<Vec<Device>, CudaError> {
    let driver = Driver::load()?;
    (0..driver.device_count()?).map(|ordinal| Device::primary(driver, ordinal)).collect()
}

/// The context that is current on this thread. Only where the driver is loaded.
pub(crate) fn current() -> Option<sys::CUcontext> {
    result::ctx::get_current().unwrap()
}

/// Bytes that differ from one another and between seeds.
pub(crate) fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let next = || {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        (state >> 33).to_le_bytes()[0]
    };
    std::iter::repeat_with(next).take(bytes).collect()
}
