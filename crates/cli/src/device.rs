//! Where a rank's memory lives: on the host or on a CUDA device. What a rank holds is written and read on the host
//! alone, so that nothing is checked by what it checks.

#[cfg(feature = "cuda")]
mod cuda;

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use refit::planner::{LowerOptions, RankLayout};
use refit::pool::{
    AllocateError, Allocator, ArenaPlan, HostAllocator, Memory, MemoryKind, PoolError,
};

use refit::transport::Transport;
use refit::{RefitError, Source, Target};
use serde::Serialize;

use crate::error::CliError;

/// The kind of memory that a person can name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceName {
    /// Ordinary memory
    #[default]
    Host,
    /// The memory of NVIDIA GPUs
    Cuda,
}

/// The memory of one rank.
#[derive(Clone, Debug)]
pub(crate) enum Home {
    Host,
    #[cfg(feature = "cuda")]
    Cuda(cuda::Gpu),
}

/// What memory holds before its first refit.
pub(crate) const POISON: u8 = 0xa5;

/// Parameters start at multiples of this, as CUDA's own allocations do.
const ALIGN: u64 = 256;

/// Bytes around every parameter that nobody may write.
const GUARD: u64 = 256;

/// Named parameters.
pub(crate) type Params = Vec<(String, Memory)>;

impl Allocator for Home {
    fn kind(&self) -> MemoryKind {
        match self {
            Self::Host => HostAllocator.kind(),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => gpu.kind(),
        }
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, AllocateError> {
        match self {
            Self::Host => HostAllocator.allocate(bytes),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => gpu.allocate(bytes),
        }
    }
}

/// A part of a parameter that one thread writes.
pub(crate) enum Part<'a> {
    Host(&'a mut [u8]),
    #[cfg(feature = "cuda")]
    Cuda {
        memory: std::sync::Arc<std::sync::Mutex<&'a mut Memory>>,
        range: Range<usize>,
    },
}

impl Home {
    /// The memory of a GPU, or of the host where none is named.
    ///
    /// # Errors
    /// [`CliError::Usage`] in a build without CUDA, [`CliError::Cuda`] for a GPU that cannot be had.
    pub(crate) fn new(gpu: Option<u32>) -> Result<Self, CliError> {
        let Some(gpu) = gpu else { return Ok(Self::Host) };
        #[cfg(feature = "cuda")]
        return Ok(Self::Cuda(cuda::Gpu::new(gpu)?));
        #[cfg(not(feature = "cuda"))]
        Err(CliError::Usage(format!("GPU {gpu}: {}", crate::transports::without("CUDA", "cuda"))))
    }

    /// How to lower for parameters in this memory.
    pub(crate) fn lowering(&self) -> LowerOptions {
        match self {
            Self::Host => LowerOptions::default(),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => LowerOptions::on_device(),
        }
    }

    /// Gives a target with parameters in this memory what lands bytes there.
    pub(crate) fn equip<T: Transport>(&self, target: Target<T>) -> Result<Target<T>, CliError> {
        match self {
            Self::Host => Ok(target),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => Ok(target.with_device(gpu.lander()?)),
        }
    }

    /// Gives a source with parameters in this memory what packs them there.
    pub(crate) fn equip_source<T: Transport>(
        &self,
        source: Source<T>,
    ) -> Result<Source<T>, CliError> {
        match self {
            Self::Host => Ok(source),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => Ok(source.with_device(gpu.lander()?)),
        }
    }

    /// Every parameter of a layout in an allocation of its own, as an engine or a trainer without an arena holds them.
    pub(crate) fn separate(&self, layout: &RankLayout) -> Result<Params, CliError> {
        let allocate = |param: &refit::planner::Param| {
            let bytes = usize::try_from(param.bytes()).unwrap_or(usize::MAX);
            let memory = self.allocate(bytes).map_err(allocation)?;
            Ok((param.name().to_string(), memory))
        };
        layout.params().iter().map(allocate).collect()
    }

    /// Poisoned memory for every parameter of a layout, carved from one allocation, and the memory around them.
    pub(crate) fn guarded(&self, layout: &RankLayout) -> Result<(Params, Guards), CliError> {
        let mut arena = ArenaPlan::new();
        let (mut parts, mut guards, mut end) = (Vec::new(), Vec::new(), 0);
        for param in layout.params() {
            arena.push(GUARD, 1);
            let start = arena.push(param.bytes(), ALIGN);
            guards.push((end, start - end));
            parts.push((start, param.bytes()));
            end = arena.bytes();
        }
        guards.push((arena.push(GUARD, 1), GUARD));
        let mut memory = self
            .allocate(usize::try_from(arena.bytes()).unwrap_or(usize::MAX))
            .map_err(allocation)?;
        self.set(&mut memory, POISON)?;
        parts.extend(guards);
        let mut params = memory.carve(&parts).map_err(RefitError::from)?;
        let guards = params.split_off(layout.params().len());
        let names = layout.params().iter().map(|param| param.name().to_string());
        Ok((names.zip(params).collect(), Guards(guards)))
    }

    /// Writes one byte into all of a memory.
    pub(crate) fn set(&self, memory: &mut Memory, byte: u8) -> Result<(), CliError> {
        match self {
            Self::Host => memory.host_bytes_mut().ok_or_else(elsewhere)?.fill(byte),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => gpu.set(memory, byte)?,
        }
        Ok(())
    }

    /// Copies the first half of a memory to its second half and says how long that took.
    pub(crate) fn copy_half(&self, memory: &mut Memory) -> Result<Duration, CliError> {
        match self {
            Self::Host => {
                let bytes = memory.host_bytes_mut().ok_or_else(elsewhere)?;
                let (from, into) = bytes.split_at_mut(bytes.len() / 2);
                let into = &mut into[..from.len()];
                let started = Instant::now();
                into.copy_from_slice(from);
                Ok(started.elapsed())
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => gpu.copy_half(memory),
        }
    }

    /// Copies bytes into the beginning of a memory.
    pub(crate) fn write(&self, memory: &mut Memory, bytes: &[u8]) -> Result<(), CliError> {
        match self {
            Self::Host => {
                let held = memory.host_bytes_mut().ok_or_else(elsewhere)?;
                held.get_mut(..bytes.len()).ok_or_else(elsewhere)?.copy_from_slice(bytes);
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => gpu.upload(memory, 0, bytes)?,
        }
        Ok(())
    }

    /// The bytes of a part of a memory; `scratch` holds them where the processor cannot read them in place.
    pub(crate) fn read<'a>(
        &self,
        memory: &'a Memory,
        range: Range<usize>,
        scratch: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], CliError> {
        match self {
            Self::Host => {
                let _ = scratch;
                memory.host_bytes().and_then(|bytes| bytes.get(range)).ok_or_else(elsewhere)
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => {
                scratch.resize(range.len(), 0);
                gpu.download(memory, range.start, scratch)?;
                Ok(scratch)
            }
        }
    }

    /// Cuts a memory into parts of `size` bytes, the last one shorter.
    pub(crate) fn parts<'a>(
        &self,
        memory: &'a mut Memory,
        size: usize,
    ) -> Result<Vec<Part<'a>>, CliError> {
        let size = size.max(1);
        match self {
            Self::Host => {
                let bytes = memory.host_bytes_mut().ok_or_else(elsewhere)?;
                Ok(bytes.chunks_mut(size).map(Part::Host).collect())
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => {
                let len = memory.len();
                let memory = std::sync::Arc::new(std::sync::Mutex::new(memory));
                let part = |start: usize| Part::Cuda {
                    memory: memory.clone(),
                    range: start..len.min(start.saturating_add(size)),
                };
                Ok((0..len).step_by(size).map(part).collect())
            }
        }
    }

    /// Gives `generate` the bytes of a part to write all of; `scratch` is where it writes them if the processor cannot
    /// write them in place.
    pub(crate) fn generate(
        &self,
        part: Part<'_>,
        scratch: &mut Vec<u8>,
        generate: impl FnOnce(&mut [u8]) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        match (self, part) {
            (_, Part::Host(bytes)) => {
                let _ = scratch;
                generate(bytes)
            }
            #[cfg(feature = "cuda")]
            (Self::Cuda(gpu), Part::Cuda { memory, range }) => {
                scratch.resize(range.len(), 0);
                generate(scratch)?;
                let mut memory = memory.lock().map_err(|_| elsewhere())?;
                gpu.upload(&mut memory, range.start, scratch)
            }
            #[cfg(feature = "cuda")]
            (Self::Host, Part::Cuda { .. }) => Err(elsewhere()),
        }
    }
}

/// The memory around parameters, which holds [`POISON`] for ever.
#[derive(Debug)]
pub(crate) struct Guards(Vec<Memory>);

impl Guards {
    /// Whether nobody has written around the parameters of this layout, which they were made for.
    ///
    /// # Errors
    /// [`CliError::Mismatch`] with the nearest parameter.
    pub(crate) fn check(&self, home: &Home, layout: &RankLayout) -> Result<(), CliError> {
        let mut scratch = Vec::new();
        for (index, guard) in self.0.iter().enumerate() {
            let held = home.read(guard, 0..guard.len(), &mut scratch)?;
            let Some(byte) = held.iter().position(|&byte| byte != POISON) else { continue };
            let name = |index: usize| layout.params().get(index).map(|param| param.name());
            let near = match (name(index), index.checked_sub(1).and_then(name)) {
                (Some(after), Some(before)) => format!("between `{before}` and `{after}`"),
                (Some(after), None) => format!("before `{after}`"),
                (None, Some(before)) => format!("behind `{before}`"),
                (None, None) => "of a rank without parameters".to_owned(),
            };
            let text =
                format!("memory that belongs to no parameter was written: byte {byte} {near}");
            return Err(CliError::Mismatch(text));
        }
        Ok(())
    }
}

/// The GPUs of this machine that a command uses.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Gpus {
    /// The CUDA version of the driver, as CUDA counts: 1000 times the major one plus 10 times the minor one.
    pub(crate) driver: u32,
    pub(crate) gpus: Vec<GpuInfo>,
}

/// One of them.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct GpuInfo {
    pub(crate) ordinal: u32,
    pub(crate) name: String,
    pub(crate) free_bytes: u64,
    pub(crate) total_bytes: u64,
}

impl Gpus {
    /// How many there are.
    ///
    /// # Errors
    /// As [`Home::new`].
    pub(crate) fn count() -> Result<u32, CliError> {
        #[cfg(feature = "cuda")]
        return cuda::count();
        #[cfg(not(feature = "cuda"))]
        Err(crate::transports::without("CUDA", "cuda"))
    }

    /// Looks at those of these ordinals, in any order and as often as they come.
    ///
    /// # Errors
    /// As [`Home::new`].
    pub(crate) fn look(mut ordinals: Vec<u32>) -> Result<Self, CliError> {
        ordinals.sort_unstable();
        ordinals.dedup();
        #[cfg(feature = "cuda")]
        return cuda::look(&ordinals);
        #[cfg(not(feature = "cuda"))]
        Err(crate::transports::without("CUDA", "cuda"))
    }

    /// Free bytes by ordinal.
    pub(crate) fn free(&self) -> BTreeMap<u32, u64> {
        self.gpus.iter().map(|gpu| (gpu.ordinal, gpu.free_bytes)).collect()
    }
}

pub(crate) fn allocation(error: AllocateError) -> CliError {
    CliError::Refit(PoolError::from(error).into())
}

/// What cannot be, as every memory of a rank comes from its own [`Home`].
fn elsewhere() -> CliError {
    CliError::Usage("a parameter is not in the memory of its rank".to_owned())
}

#[cfg(test)]
mod tests {
    use refit::planner::{Dtype, LayoutBuilder, Param};

    use super::*;

    fn layout() -> RankLayout {
        let mut layout = LayoutBuilder::new(0);
        for (name, rows) in [("a", 3), ("b", 256), ("c", 1000)] {
            layout.param(Param::new(name, Dtype::U8, rows, 1)).unwrap();
        }
        layout.build()
    }

    #[test]
    fn parameters_lie_apart_in_one_allocation() {
        let (params, guards) = Home::Host.guarded(&layout()).unwrap();
        let allocation = params[0].1.allocation();
        let mut at = allocation.address();
        for (guard, (_, param)) in guards.0.iter().zip(&params) {
            assert_eq!((guard.address(), param.address() % ALIGN), (at, 0));
            assert!(guard.len() as u64 >= GUARD);
            assert_eq!(param.address(), at + guard.len() as u64);
            assert!(param.host_bytes().unwrap().iter().all(|&byte| byte == POISON));
            at = param.address() + param.len() as u64;
        }
        assert_eq!(guards.0.len(), params.len() + 1);
        assert_eq!(at + GUARD, allocation.address() + allocation.len());
        let separate = Home::Host.separate(&layout()).unwrap();
        assert!(separate[0].1.allocation().address() != separate[1].1.allocation().address());
    }

    #[test]
    fn whoever_writes_beside_a_parameter_is_found() {
        let (_params, mut guards) = Home::Host.guarded(&layout()).unwrap();
        guards.check(&Home::Host, &layout()).unwrap();
        for (guard, near) in [(0, "before `a`"), (1, "between `a` and `b`"), (3, "behind `c`")] {
            for byte in [0, guards.0[guard].len() - 1] {
                guards.0[guard].host_bytes_mut().unwrap()[byte] ^= 0x10;
                let error = guards.check(&Home::Host, &layout()).unwrap_err().to_string();
                assert!(error.ends_with(&format!("byte {byte} {near}")), "{error}");
                guards.0[guard].host_bytes_mut().unwrap()[byte] ^= 0x10;
            }
        }
    }

    #[test]
    fn parts_cover_a_memory_once() {
        let mut memory = HostAllocator.allocate(10).unwrap();
        let parts = Home::Host.parts(&mut memory, 4).unwrap();
        for (part, byte) in parts.into_iter().zip(1..) {
            let fill = |bytes: &mut [u8]| {
                bytes.fill(byte);
                Ok(())
            };
            Home::Host.generate(part, &mut Vec::new(), fill).unwrap();
        }
        assert_eq!(memory.host_bytes().unwrap(), [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]);
        let mut scratch = Vec::new();
        assert_eq!(Home::Host.read(&memory, 3..5, &mut scratch).unwrap(), [1, 2]);
        assert!(Home::Host.read(&memory, 8..11, &mut scratch).is_err());
    }
}
