//! Tensors of any framework, as DLPack describes them.
//!
//! The capsule is not consumed: it stays the owner, and frees the tensor when it goes.

use std::ffi::c_void;

use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use refit::planner::Dtype;
use refit::pool::MemoryKind;

use crate::failure::{Failure, Kind};
use crate::tensor::{Seen, scattered};

/// `DLTensor`, which `DLManagedTensor` begins with. The layout of all versions before 1.0, which is what a producer hands
/// out that is asked for no version.
#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

const CPU: i32 = 1;
const CUDA: i32 = 2;
const CUDA_HOST: i32 = 3;

pub(crate) fn look(name: &str, tensor: &Bound<'_, PyAny>) -> PyResult<Seen> {
    let wrong = |why: &str| {
        Failure::new(Kind::Tensor, format!("`{name}` cannot be used by DLPack: {why}")).about(name)
    };
    // Without a version to ask for, read-only arrays are refused by their framework.
    let given = tensor
        .call_method0("__dlpack__")
        .map_err(|error| wrong("its framework refuses").caused_by(error))?;
    let capsule = given.cast::<PyCapsule>().map_err(|_| wrong("it gives no capsule"))?;
    let pointer = capsule
        .pointer_checked(Some(c"dltensor"))
        .map_err(|error| wrong("its capsule is another's").caused_by(error))?;
    // SAFETY: a capsule of this name holds a `DLManagedTensor`, which begins with this, and lives as long as the capsule.
    let raw = unsafe { pointer.cast::<Tensor>().as_ref() };
    let dims =
        usize::try_from(raw.ndim).map_err(|_| wrong("it has a negative number of dimensions"))?;
    let extents = |start: *const i64| {
        if dims == 0 || start.is_null() {
            return &[][..];
        }
        // SAFETY: by DLPack's contract, as many numbers as there are dimensions, which live as long as the capsule.
        unsafe { std::slice::from_raw_parts(start, dims) }
    };
    let (shape, strides) = (extents(raw.shape), extents(raw.strides));
    if shape.len() != dims {
        return Err(wrong("it has no shape").into());
    }
    if !strides.is_empty() && !is_contiguous(shape, strides) {
        return Err(scattered(name).into());
    }
    let kind = match raw.device_type {
        CPU | CUDA_HOST => MemoryKind::Host,
        CUDA => MemoryKind::Cuda(u32::try_from(raw.device_id).unwrap_or(0)),
        other => return Err(wrong(&format!("its device is of type {other}")).into()),
    };
    if raw.lanes != 1 || !raw.bits.is_multiple_of(8) {
        return Err(wrong("its elements are not whole bytes").into());
    }
    let item = u64::from(raw.bits / 8);
    let elements = shape
        .iter()
        .try_fold(1_u64, |product, &extent| product.checked_mul(u64::try_from(extent).ok()?));
    let bytes = elements.and_then(|elements| elements.checked_mul(item));
    let bytes = bytes.ok_or_else(|| wrong("its shape is none"))?;
    let offset = usize::try_from(raw.byte_offset).unwrap_or(usize::MAX);
    let address = raw.data.expose_provenance().checked_add(offset);
    Ok(Seen {
        owner: given.clone().unbind(),
        address: address.ok_or_else(|| wrong("its offset is none"))?,
        bytes,
        kind,
        dtype: dtype(raw.code, raw.bits),
        item,
        writable: true,
    })
}

/// Row by row, whatever the stride of a dimension of one element.
fn is_contiguous(shape: &[i64], strides: &[i64]) -> bool {
    let mut expected = 1_i64;
    shape.iter().zip(strides).rev().all(|(&extent, &stride)| {
        let fits = extent == 1 || stride == expected;
        expected = expected.saturating_mul(extent.max(1));
        fits
    }) || shape.contains(&0)
}

/// The name, and which dtype that is.
fn dtype(code: u8, bits: u8) -> (String, Option<Dtype>) {
    let kind = match code {
        0 => "int",
        1 => "uint",
        2 => "float",
        4 => "bfloat",
        10 => return ("float8_e4m3fn".to_owned(), Some(Dtype::F8E4m3)),
        12 => return ("float8_e5m2".to_owned(), Some(Dtype::F8E5m2)),
        _ => "unknown",
    };
    let name = format!("{kind}{bits}");
    let dtype = crate::data::dtype_of(&name);
    (name, dtype)
}
