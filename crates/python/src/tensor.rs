//! Tensors of torch, numpy and whatever speaks DLPack, adopted where they lie and kept alive.

use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping};
use refit::planner::{Dtype, Param, RankLayout};
use refit::pool::{Memory, MemoryKind};

use crate::data;
use crate::dlpack;
use crate::failure::{Failure, Kind};
use crate::home::Home;

/// A tensor that was looked at.
#[derive(Debug)]
pub(crate) struct Seen {
    /// What keeps its memory allocated.
    pub(crate) owner: Py<PyAny>,
    pub(crate) address: usize,
    pub(crate) bytes: u64,
    pub(crate) kind: MemoryKind,
    /// The dtype's name, and which one of ours that is.
    pub(crate) dtype: (String, Option<Dtype>),
    pub(crate) item: u64,
    pub(crate) writable: bool,
}

/// Tensors by name, in the order of a layout, and where they are.
#[derive(Debug)]
pub(crate) struct Tensors {
    seen: Vec<(String, Seen)>,
    kind: MemoryKind,
}

impl Tensors {
    /// Looks at the tensors that a layout names. None may be missing, and none left over.
    pub(crate) fn look(
        layout: &RankLayout,
        tensors: &Bound<'_, PyMapping>,
        written: bool,
    ) -> PyResult<Self> {
        let mut given = BTreeMap::new();
        for item in tensors.items()? {
            let (name, tensor): (String, Bound<'_, PyAny>) = item.extract()?;
            given.insert(name, tensor);
        }
        let rank = layout.rank();
        let mut seen: Vec<(String, Seen)> = Vec::with_capacity(given.len());
        for param in layout.params() {
            let name = param.name().to_string();
            let Some(tensor) = given.remove(&name) else {
                let text = format!("rank {rank}: no tensor was given for `{name}` of the layout");
                return Err(Failure::new(Kind::Tensor, text).about(name).rank(rank).into());
            };
            let found = look(&name, &tensor)?;
            found.fits(param, rank, written)?;
            seen.push((name, found));
        }
        if let Some(name) = given.into_keys().next() {
            let text = format!(
                "rank {rank}: a tensor was given for `{name}`, which the layout does not have"
            );
            return Err(Failure::new(Kind::Tensor, text).about(name).rank(rank).into());
        }
        let kind = one_kind(&seen)?;
        apart(&seen)?;
        Ok(Self { seen, kind })
    }

    /// Where all of them are.
    pub(crate) fn kind(&self) -> MemoryKind {
        self.kind
    }

    /// Adopts all of them, by name.
    pub(crate) fn adopt(self, home: &Home) -> Result<Vec<(String, Memory)>, Failure> {
        let adopt = |(name, seen): (String, Seen)| {
            let memory = adopt(seen, home).map_err(|failure| failure.within_tensor(&name))?;
            Ok((name, memory))
        };
        self.seen.into_iter().map(adopt).collect()
    }
}

impl Seen {
    fn fits(&self, param: &Param, rank: u32, written: bool) -> Result<(), Failure> {
        let name = param.name();
        let wrong = |why: String| {
            let text = format!("rank {rank}: `{name}` {why}");
            Err(Failure::new(Kind::Tensor, text).about(name.as_ref()).rank(rank))
        };
        let (found, dtype) = &self.dtype;
        let (wanted, size) = (param.dtype(), param.dtype().size());
        // Unsigned numbers may be anybody's raw data: numpy has no bfloat16.
        let raw = found.starts_with("uint") && self.item == size;
        if *dtype != Some(wanted) && !raw {
            return wrong(format!("has dtype {found}, its layout says {wanted}"));
        }
        if self.bytes != param.bytes() {
            let (bytes, layout) = (self.bytes, param.bytes());
            return wrong(format!(
                "has {bytes} bytes, its layout says {layout}; is it the tensor the layout was made from?"
            ));
        }
        if written && !self.writable {
            return wrong("is read-only, and is to be written".to_owned());
        }
        Ok(())
    }
}

/// Where all of these are.
fn one_kind(seen: &[(String, Seen)]) -> Result<MemoryKind, Failure> {
    let mut kinds = seen.iter().filter(|(_, it)| it.bytes > 0).map(|(name, it)| (name, it.kind));
    let Some((first, kind)) = kinds.next() else { return Ok(MemoryKind::Host) };
    match kinds.find(|(_, other)| *other != kind) {
        None => Ok(kind),
        Some((name, other)) => {
            let text = format!(
                "`{first}` is in {kind} and `{name}` in {other}: all tensors of a rank are in one place"
            );
            Err(Failure::new(Kind::Tensor, text).about(first.as_str()).about(name.as_str()))
        }
    }
}

/// Refuses tensors that share bytes: each would be written, or read, as if it were alone.
fn apart(seen: &[(String, Seen)]) -> Result<(), Failure> {
    let mut ranges: Vec<(u64, u64, &str)> = seen
        .iter()
        .filter(|(_, it)| it.bytes > 0)
        .map(|(name, it)| {
            let start = it.address as u64;
            (start, start.saturating_add(it.bytes), name.as_str())
        })
        .collect();
    ranges.sort_unstable();
    match ranges.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        None => Ok(()),
        Some(pair) => {
            let (one, other) = (pair[0].2, pair[1].2);
            let text = format!(
                "`{one}` and `{other}` share memory: a tied parameter has one name in a layout"
            );
            Err(Failure::new(Kind::Tensor, text).about(one).about(other))
        }
    }
}

/// What a tensor says about itself.
fn look(name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<Seen> {
    if tensor.hasattr("data_ptr")? && tensor.hasattr("is_contiguous")? {
        return of_torch(name, tensor);
    }
    if let Some(interface) = tensor.getattr_opt("__array_interface__")? {
        return of_numpy(name, tensor, interface.cast::<PyDict>()?);
    }
    if tensor.hasattr("__dlpack__")? {
        return dlpack::look(name, tensor);
    }
    let class = tensor.get_type().name()?;
    let text = format!(
        "`{name}` is a {class}: give a torch tensor, a numpy array, or what has `__dlpack__`"
    );
    Err(Failure::new(Kind::Tensor, text).about(name).into())
}

pub(crate) fn scattered(name: &str) -> Failure {
    let text = format!(
        "`{name}` is not contiguous: its elements have to lie behind each other, row by row (a view of another tensor \
         does not do; nor would a copy of it, which nobody else uses)"
    );
    Failure::new(Kind::Tensor, text).about(name)
}

fn of_torch(name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<Seen> {
    if tensor.hasattr("placements")? {
        let text = format!(
            "`{name}` is a DTensor: give its `to_local()`, and describe it by `layouts.shards`; `refit_rl.torch` does both"
        );
        return Err(Failure::new(Kind::Tensor, text).about(name).into());
    }
    if !tensor.call_method0("is_contiguous")?.is_truthy()? {
        return Err(scattered(name).into());
    }
    let device = tensor.getattr("device")?;
    let kind = match device.getattr("type")?.extract::<String>()?.as_str() {
        "cpu" => MemoryKind::Host,
        "cuda" => MemoryKind::Cuda(device.getattr("index")?.extract::<Option<u32>>()?.unwrap_or(0)),
        other => {
            let text = format!("`{name}` is on device `{other}`: only cpu and cuda are known");
            return Err(Failure::new(Kind::Tensor, text).about(name).into());
        }
    };
    let dtype = tensor.getattr("dtype")?;
    let item: u64 = tensor.call_method0("element_size")?.extract()?;
    let elements: u64 = tensor.call_method0("numel")?.extract()?;
    Ok(Seen {
        owner: tensor.clone().unbind(),
        address: tensor.call_method0("data_ptr")?.extract()?,
        bytes: elements.saturating_mul(item),
        kind,
        dtype: (data::dtype_name(&dtype)?, data::dtype(&dtype)?),
        item,
        writable: true,
    })
}

fn of_numpy(
    name: &str,
    tensor: &Bound<'_, PyAny>,
    interface: &Bound<'_, PyDict>,
) -> PyResult<Seen> {
    let missing = || Failure::new(Kind::Tensor, format!("`{name}` has no address")).about(name);
    // Given for what is not contiguous only.
    if let Some(strides) = interface.get_item("strides")?
        && !strides.is_none()
    {
        return Err(scattered(name).into());
    }
    let data = interface.get_item("data")?.ok_or_else(missing)?;
    let (address, read_only): (usize, bool) = data.extract().map_err(|_| missing())?;
    let dtype = tensor.getattr("dtype")?;
    Ok(Seen {
        owner: tensor.clone().unbind(),
        address,
        bytes: tensor.getattr("nbytes")?.extract()?,
        kind: MemoryKind::Host,
        dtype: (data::dtype_name(&dtype)?, data::dtype(&dtype)?),
        item: dtype.getattr("itemsize")?.extract()?,
        writable: !read_only,
    })
}

fn adopt(seen: Seen, home: &Home) -> Result<Memory, Failure> {
    let Seen { owner, address, bytes, kind, .. } = seen;
    let len = usize::try_from(bytes).unwrap_or(usize::MAX);
    let start = NonNull::new(ptr::with_exposed_provenance_mut::<c_void>(address));
    let (start, len) = match start {
        Some(start) if len > 0 => (start.cast::<u8>(), len),
        None if len > 0 => {
            return Err(Failure::new(Kind::Tensor, "has no memory; was it moved to `meta`?"));
        }
        _ => return Ok(Memory::empty(kind)),
    };
    let owner: Arc<dyn Any + Send + Sync> = Arc::new(owner);
    match home {
        // SAFETY: the framework said that these are the bytes of a contiguous tensor, and keeps them while an object of
        // that tensor lives, which `owner` is. Nobody else of this process reads or writes them but when the caller of
        // `begin_update`, `commit` and `refresh` may: that is what these methods ask for. No two tensors of one rank share
        // a byte: `apart` has looked.
        Home::Host => Ok(unsafe { Memory::adopt(start, len, kind, owner) }),
        #[cfg(feature = "cuda")]
        Home::Cuda(device) => {
            // SAFETY: as above; and torch keeps the block of `cudaMalloc` while a tensor in it lives.
            let memory = unsafe { refit::pool::cuda::adopt(device, address as u64, len, owner) };
            Ok(memory?)
        }
    }
}
