//! Where a rank's tensors are: on the host, or on a GPU.

use refit::planner::LowerOptions;
use refit::pool::{AllocateError, Allocator, HostAllocator, Memory, MemoryKind};
use refit::transport::Transport;
use refit::{Source, Target};

use crate::failure::Failure;

/// The memory of one rank.
#[derive(Clone, Debug)]
pub(crate) enum Home {
    Host,
    #[cfg(feature = "cuda")]
    Cuda(refit::pool::cuda::Device),
}

impl Allocator for Home {
    fn kind(&self) -> MemoryKind {
        match self {
            Self::Host => HostAllocator.kind(),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => device.kind(),
        }
    }

    fn allocate(&self, bytes: usize) -> Result<Memory, AllocateError> {
        match self {
            Self::Host => HostAllocator.allocate(bytes),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => {
                refit::pool::cuda::CudaAllocator::new(device.clone()).allocate(bytes)
            }
        }
    }
}

impl Home {
    pub(crate) fn new(kind: MemoryKind) -> Result<Self, Failure> {
        match kind {
            MemoryKind::Host => Ok(Self::Host),
            #[cfg(feature = "cuda")]
            MemoryKind::Cuda(ordinal) => {
                use refit::pool::cuda::{Device, Driver};
                Ok(Self::Cuda(Device::primary(Driver::load()?, ordinal)?))
            }
            other => {
                let text = format!("this build cannot use {other}");
                Err(Failure::new(crate::failure::Kind::Tensor, text))
            }
        }
    }

    /// Waits for whatever was launched on the device: a header may say nothing that is not so yet.
    pub(crate) fn synchronize(&self) -> Result<(), Failure> {
        match self {
            Self::Host => Ok(()),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => Ok(device.synchronize()?),
        }
    }

    /// How to lower for parameters in this memory.
    pub(crate) fn lowering(&self) -> LowerOptions {
        match self {
            Self::Host => LowerOptions::default(),
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => LowerOptions::on_device(),
        }
    }

    /// Gives a target what lands bytes in this memory.
    pub(crate) fn equip<T: Transport>(&self, target: Target<T>) -> Result<Target<T>, Failure> {
        match self {
            Self::Host => Ok(target),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => Ok(target.with_device(lander(device)?)),
        }
    }

    /// Gives a source what packs bytes in this memory.
    pub(crate) fn equip_source<T: Transport>(
        &self,
        source: Source<T>,
    ) -> Result<Source<T>, Failure> {
        match self {
            Self::Host => Ok(source),
            #[cfg(feature = "cuda")]
            Self::Cuda(device) => Ok(source.with_device(lander(device)?)),
        }
    }
}

#[cfg(feature = "cuda")]
fn lander(device: &refit::pool::cuda::Device) -> Result<refit::DeviceLander, Failure> {
    use refit::pool::cuda::Stream;
    Ok(refit::DeviceLander::new(std::sync::Arc::new(Stream::new(device)?))?)
}
