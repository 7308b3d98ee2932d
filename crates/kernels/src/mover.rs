//! The kernel on a device, and tables beside it.

use std::ffi::c_void;
use std::fmt;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUjit_option};
use refit_pool::MemoryKind;
use refit_pool::cuda::{CudaError, Device, Stream};

use crate::error::KernelError;
use crate::launch::launches;
use crate::raw::{Entry, Launch, Placed};
use crate::shelf::{Place, Shelf};
use crate::table::Table;

/// `move.cu`, compiled. The driver makes machine code of it for the device it meets.
pub(crate) const PTX: &str = include_str!("move.ptx");

/// The name in `move.cu`.
const FUNCTION: &std::ffi::CStr = c"refit_move";

/// How many threads carry out a launch, and how they share the work.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Blocks on each multiprocessor.
    pub blocks: u32,
    /// Threads of a block: a multiple of `lanes`, 256 at most.
    pub threads: u32,
    /// Threads that share a tile: a multiple of 32.
    pub lanes: u32,
}

impl Default for Shape {
    fn default() -> Self {
        Self { blocks: 3, threads: 256, lanes: 128 }
    }
}

/// How much of the device a launch may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pace {
    /// All of it.
    #[default]
    Alone,
    /// A part that moves bytes faster than any link brings them, and leaves copies that are under way the rate that they
    /// have alone: at full pace it took up to 8% of that from them.
    BesideCopies,
}

impl Pace {
    /// One in so many multiprocessors. With a quarter of those of an H200 what is read meanwhile loses nothing that could
    /// be measured; a twelfth is no better.
    fn one_in(self) -> u32 {
        match self {
            Self::Alone => 1,
            Self::BesideCopies => 4,
        }
    }
}

/// The kernel, loaded on a device. It keeps the device's context.
pub struct Mover {
    device: Device,
    shape: Shape,
    module: sys::CUmodule,
    function: sys::CUfunction,
    shelf: Arc<Shelf>,
}

// SAFETY: modules and functions are handles that any thread may use.
unsafe impl Send for Mover {}
// SAFETY: the driver locks what its handles name.
unsafe impl Sync for Mover {}

impl Mover {
    /// Loads the kernel: once a device is enough. The driver compiles it, and keeps what it compiled on disk.
    ///
    /// # Errors
    /// [`KernelError::Load`] with what the driver's compiler says, [`KernelError::Cuda`].
    pub fn new(device: &Device) -> Result<Arc<Self>, KernelError> {
        Self::with(device, Shape::default(), PTX)
    }

    /// As [`new`](Self::new), in another shape and from other PTX: for measuring what is best.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[doc(hidden)]
    pub fn with(device: &Device, shape: Shape, ptx: &str) -> Result<Arc<Self>, KernelError> {
        let entered = device.enter()?;
        let module = load(ptx)?;
        let mut function = ptr::null_mut();
        // SAFETY: the module is loaded, the name ends with a zero, and the driver writes one handle.
        let found =
            unsafe { sys::cuModuleGetFunction(&raw mut function, module, FUNCTION.as_ptr()) };
        // From here on dropping it unloads the module.
        let shelf = Shelf::new(device.clone());
        let mover = Self { device: device.clone(), shape, module, function, shelf };
        drop(entered);
        found.result().map_err(|error| CudaError::call("cuModuleGetFunction", error.0))?;
        Ok(Arc::new(mover))
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Brings a table to the device, to be carried out any number of times.
    ///
    /// # Errors
    /// [`KernelError::Allocate`], [`KernelError::Cuda`].
    pub fn upload(&self, table: &Table) -> Result<Resident, KernelError> {
        match self.upload_all(std::slice::from_ref(table))?.pop() {
            Some(resident) => Ok(resident),
            None => unreachable!("as many as were given"),
        }
    }

    /// Brings tables to the device in one copy, in the order given.
    ///
    /// # Errors
    /// As [`upload`](Self::upload); none of them is there then.
    pub fn upload_all(&self, tables: &[Table]) -> Result<Vec<Resident>, KernelError> {
        let mut image = Vec::new();
        let mut starts = Vec::with_capacity(tables.len());
        for table in tables {
            // Entries are of a size that keeps what follows them aligned; what follows the owners is not.
            image.resize(image.len().next_multiple_of(align_of::<Entry>()), 0);
            let entries = image.len();
            image.extend_from_slice(bytes(table.entries()));
            let owners = image.len();
            image.extend_from_slice(bytes(table.owners()));
            starts.push((entries as u64, owners as u64));
        }
        let held = Arc::new(self.shelf.put(&image)?);
        let resident = |(table, (entries, owners)): (&Table, (u64, u64))| Resident {
            device: self.device.clone(),
            place: Placed {
                entries: held.address + entries,
                owners: held.address + owners,
                base: 0,
                // Fewer than 2^31, as `Table` checks.
                tiles: u32::try_from(table.owners().len()).unwrap_or(u32::MAX),
                start: 0,
            },
            bytes: table.bytes(),
            _held: Arc::clone(&held),
        };
        Ok(tables.iter().zip(starts).map(resident).collect())
    }

    /// Queues the moves of all tables: one launch, unless there are more than 64 tables with anything to do. They may
    /// be carried out in any order, and have been when the stream is past them.
    ///
    /// Tiles of the tables are taken in turns, so that all sources are read at once; where tables are equally long, they
    /// begin in the order given.
    ///
    /// # Errors
    /// [`KernelError::WrongDevice`] when a table or the stream is another device's; [`KernelError::Cuda`]. Nothing is
    /// queued then, or, with more than 64 tables, some of them.
    ///
    /// # Safety
    /// Until the work is done, and of every table:
    /// - The addresses that its moves read are mapped on this device, and nobody writes them.
    /// - The addresses that its moves write are mapped on this device, and nobody else reads or writes them, moves of
    ///   any of the tables that read them included.
    /// - It is not dropped.
    pub unsafe fn launch(&self, tables: &[&Resident], stream: &Stream) -> Result<(), KernelError> {
        if let Some(table) = tables.iter().find(|table| table.device != self.device) {
            return Err(self.wrong("a table", table.device.kind()));
        }
        let placed: Vec<Placed> = tables.iter().map(|table| table.place).collect();
        // SAFETY: the caller's promises.
        unsafe { self.launch_placed(&placed, stream, Pace::Alone) }
    }

    /// As [`launch`](Self::launch), of one table whose moves read from `base` on, at this pace.
    ///
    /// # Safety
    /// As [`launch`](Self::launch), of the sources that lie at `base` and their offsets; `base` is a multiple of
    /// [`ALIGN`](crate::raw::ALIGN).
    pub(crate) unsafe fn launch_from(
        &self,
        base: u64,
        table: &Resident,
        stream: &Stream,
        pace: Pace,
    ) -> Result<(), KernelError> {
        if table.device != self.device {
            return Err(self.wrong("a table", table.device.kind()));
        }
        // SAFETY: the caller's promises.
        unsafe { self.launch_placed(&[Placed { base, ..table.place }], stream, pace) }
    }

    /// # Safety
    /// As [`launch`](Self::launch), of tables of this device.
    unsafe fn launch_placed(
        &self,
        tables: &[Placed],
        stream: &Stream,
        pace: Pace,
    ) -> Result<(), KernelError> {
        if *stream.device() != self.device {
            return Err(self.wrong("the stream", stream.device().kind()));
        }
        let launches = launches(tables, self.shape.lanes);
        let _entered = self.device.enter()?;
        for launch in launches {
            // SAFETY: the caller's promises.
            unsafe { self.queue(launch, stream, pace) }?;
        }
        Ok(())
    }

    pub(crate) fn wrong(&self, what: &'static str, found: MemoryKind) -> KernelError {
        KernelError::WrongDevice { what, found, device: self.device.ordinal() }
    }

    /// # Safety
    /// As [`launch`](Self::launch), and the device is current, and the launch is made of tables that are there.
    unsafe fn queue(
        &self,
        mut launch: Launch,
        stream: &Stream,
        pace: Pace,
    ) -> Result<(), CudaError> {
        let Shape { blocks, threads, lanes } = self.shape;
        let all = blocks.saturating_mul(self.device.multiprocessors());
        let most = (all / pace.one_in()).max(1);
        let grid = launch.steps.div_ceil((threads / lanes).max(1)).clamp(1, most);
        let mut parameters = [(&raw mut launch).cast::<c_void>()];
        // SAFETY: the function has one parameter of this type, which the driver copies before it returns; the stream
        // is of this device. What the kernel touches is the caller's promise, its entries are made by `Table`.
        unsafe {
            sys::cuLaunchKernel(
                self.function,
                grid,
                1,
                1,
                threads,
                1,
                1,
                0,
                stream.raw().cast(),
                parameters.as_mut_ptr(),
                ptr::null_mut(),
            )
        }
        .result()
        .map_err(|error| CudaError::call("cuLaunchKernel", error.0))
    }
}

impl fmt::Debug for Mover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mover")
            .field("device", &self.device)
            .field("shape", &self.shape)
            .finish_non_exhaustive()
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        let Ok(_entered) = self.device.enter() else {
            tracing::warn!("a kernel leaked: its device could not be made current");
            return;
        };
        // SAFETY: loaded by `new` and unloaded once. The driver waits for launches that still run.
        match unsafe { sys::cuModuleUnload(self.module) } {
            // At the end of the process the driver may have gone first, with everything.
            sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_DEINITIALIZED => {}
            code => {
                let error = CudaError::call("cuModuleUnload", code);
                tracing::warn!(%error, "a kernel leaked");
            }
        }
    }
}

/// A table on a device. It belongs to no launch, and serves any number of them.
#[derive(Debug)]
pub struct Resident {
    device: Device,
    place: Placed,
    bytes: u64,
    /// What `place` points into.
    _held: Arc<Place>,
}

impl Resident {
    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes written by carrying it out; saturated.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.place.tiles == 0
    }
}

/// Loads PTX into the current context.
fn load(ptx: &str) -> Result<sys::CUmodule, KernelError> {
    const LOG: usize = 8 << 10;
    let mut image = ptx.as_bytes().to_vec();
    image.push(0);
    let mut log = vec![0_u8; LOG];
    let mut module = ptr::null_mut();
    let mut options =
        [CUjit_option::CU_JIT_ERROR_LOG_BUFFER, CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // The size travels in the place of a pointer.
    let mut values = [log.as_mut_ptr().cast::<c_void>(), ptr::without_provenance_mut(LOG)];
    // SAFETY: the text ends with a zero; as many values as options, of the types that these have; the log has its
    // length and outlives the call.
    let loaded = unsafe {
        sys::cuModuleLoadDataEx(
            &raw mut module,
            image.as_ptr().cast(),
            2,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    match loaded.result() {
        Ok(()) => Ok(module),
        Err(error) => {
            let said = log.split(|byte| *byte == 0).next().unwrap_or_default();
            Err(KernelError::Load {
                log: String::from_utf8_lossy(said).trim().to_owned(),
                source: CudaError::call("cuModuleLoadDataEx", error.0),
            })
        }
    }
}

/// What the kernel reads: nothing but integers, with nothing between them.
trait Plain {}

const _: () = assert!(size_of::<Entry>() == 9 * size_of::<u64>() + 14 * size_of::<u32>());

impl Plain for Entry {}
impl Plain for u32 {}

fn bytes<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: integers without padding are bytes, as many as they take.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
