//! XXH3-64 over strided patterns: as bytes lie in host memory, through a buffer where they have to be fetched from a device
//! or converted first.

use std::borrow::Cow;
use std::hash::Hasher;

use refit_planner::{Dim, Dims, Landing, Transform};
use refit_pool::{Memory, MemoryKind};
use refit_translate::host;
use twox_hash::xxhash3_64;

use crate::error::RefitError;
use crate::land::{DeviceLander, threads};
use crate::memory::Reach;

/// Bytes fetched from a device at once, and bytes converted at once (a multiple of every element).
const WINDOW: u64 = 4 << 20;
const CONVERTED: u64 = 64 << 10;

/// A parameter's bytes: a part of a memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held<'a> {
    pub(crate) memory: &'a Memory,
    /// Where the parameter begins in it.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) name: &'a str,
}

/// A pattern to hash. All of it lies in what is held: whoever makes this has checked that. A number of a peer that gets
/// past the check saturates, and is refused where the bytes are looked for.
#[derive(Debug)]
pub(crate) struct Work<'a> {
    pub(crate) held: Held<'a>,
    pub(crate) offset: u64,
    /// Bytes of a run, as they are held.
    pub(crate) run: u64,
    pub(crate) dims: &'a Dims,
    /// The strides that count.
    pub(crate) stride: fn(&Dim) -> u64,
    /// What happens to elements before they are hashed.
    pub(crate) transform: Transform,
    /// The answer.
    pub(crate) value: u64,
}

impl Work<'_> {
    fn bytes(&self) -> u64 {
        self.run.saturating_mul(self.dims.runs())
    }
}

/// Hashes all of it, on a few threads where that is worth it.
pub(crate) fn hash_all(
    work: &mut [Work<'_>],
    device: Option<&DeviceLander>,
    reach: &Reach,
) -> Result<(), RefitError> {
    threads::share(work, Work::bytes, |work| {
        let mut window = Window { device, reach, of: None, start: 0, bytes: Vec::new() };
        let mut scratch = Vec::new();
        work.iter_mut().try_for_each(|work| {
            work.value = hash(work, &mut window, &mut scratch)?;
            Ok(())
        })
    })
}

fn hash(
    work: &Work<'_>,
    window: &mut Window<'_>,
    scratch: &mut Vec<u8>,
) -> Result<u64, RefitError> {
    let Work { held, offset, run, dims, stride, transform, .. } = *work;
    let mut hasher = xxhash3_64::Hasher::new();
    let most = if transform == Transform::Copy { WINDOW } else { CONVERTED };
    each_run(dims.as_slice(), stride, offset, &mut |start| {
        let mut done = 0;
        while done < run {
            let part = run.saturating_sub(done).min(most);
            let bytes = window.bytes(held, start.saturating_add(done), part)?;
            if transform == Transform::Copy {
                hasher.write(&bytes);
            } else {
                hasher.write(converted(&bytes, transform, scratch)?);
            }
            done = done.saturating_add(part);
        }
        Ok(())
    })?;
    Ok(hasher.finish())
}

/// The hash of so many zeros.
pub(super) fn of_zeros(bytes: u64) -> u64 {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut hasher = xxhash3_64::Hasher::new();
    let mut left = index(bytes);
    while left > 0 {
        let part = left.min(ZEROS.len());
        hasher.write(&ZEROS[..part]);
        left = left.saturating_sub(part);
    }
    hasher.finish()
}

/// Calls `visit` with where every run begins, outermost dimension slowest.
fn each_run(
    dims: &[Dim],
    stride: fn(&Dim) -> u64,
    start: u64,
    visit: &mut impl FnMut(u64) -> Result<(), RefitError>,
) -> Result<(), RefitError> {
    let Some((dim, inner)) = dims.split_first() else { return visit(start) };
    (0..dim.count).try_for_each(|step| {
        let start = start.saturating_add(step.saturating_mul(stride(dim)));
        each_run(inner, stride, start, visit)
    })
}

/// These elements, as they are held after the transform.
fn converted<'s>(
    bytes: &[u8],
    transform: Transform,
    scratch: &'s mut Vec<u8>,
) -> Result<&'s [u8], RefitError> {
    let run = bytes.len() as u64;
    scratch.resize(index(transform.target_bytes(run)), 0);
    let dims = Dims::none();
    let landing = Landing { staging_offset: 0, target: 0, offset: 0, run, dims, transform };
    host::land(&landing, bytes, scratch)?;
    Ok(scratch)
}

/// The part of a device's memory that was fetched last, so that short runs are not fetched one by one.
struct Window<'a> {
    device: Option<&'a DeviceLander>,
    reach: &'a Reach,
    /// First address of the parameter that it is a part of.
    of: Option<u64>,
    start: u64,
    bytes: Vec<u8>,
}

impl Window<'_> {
    fn bytes<'b>(
        &'b mut self,
        held: Held<'b>,
        start: u64,
        len: u64,
    ) -> Result<Cow<'b, [u8]>, RefitError> {
        let not_host = || RefitError::NotHost { param: held.name.to_owned() };
        if held.memory.kind() == MemoryKind::Host {
            let from = index(held.offset.saturating_add(start));
            let bytes =
                held.memory.host_bytes().and_then(|bytes| bytes.get(from..)?.get(..index(len)));
            return bytes.map(Cow::Borrowed).ok_or_else(not_host);
        }
        let param = held.memory.address().saturating_add(held.offset);
        let end = start.saturating_add(len);
        let fetched = self.start.saturating_add(self.bytes.len() as u64);
        if self.of != Some(param) || start < self.start || end > fetched {
            let fetch = held.bytes.saturating_sub(start).min(WINDOW).max(len);
            self.bytes.resize(index(fetch), 0);
            (self.of, self.start) = (None, start);
            let from = index(held.offset.saturating_add(start));
            self.reach.read(held.memory, from, &mut self.bytes, self.device, held.name)?;
            self.of = Some(param);
        }
        let bytes = self
            .bytes
            .get(index(start.saturating_sub(self.start))..)
            .and_then(|bytes| bytes.get(..index(len)));
        bytes.map(Cow::Borrowed).ok_or_else(not_host)
    }
}

/// A number of bytes of memory that is there.
fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
