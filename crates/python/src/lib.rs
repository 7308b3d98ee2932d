//! The compiled part of the Python package `refit-rl`: a skin over [`refit`], [`refit_service`] and `refit_translate`.
//!
//! Architecture invariants:
//!
//! - It converts and never computes: no rule about layouts, bytes or versions is here.
//! - No address goes in or out as a number. Tensors are Python objects that are kept alive; libtorch is not linked.
//! - Whatever waits has released the GIL, and no lock is waited for while it is held.
//! - Every error is one of `refit_rl.errors`.

#![cfg_attr(docsrs, feature(doc_cfg))]

mod agent;
mod data;
mod desk;
mod dlpack;
mod engine;
mod entry;
mod failure;
mod home;
mod layout;
mod report;
mod source;
mod target;
mod tensor;

use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// Loads NIXL and gives back the file it was loaded from.
#[pyfunction]
fn nixl_library(py: Python<'_>) -> PyResult<String> {
    let places = agent::nixl_places(py)?;
    Ok(py.detach(|| agent::load_nixl(&places))?)
}

/// What this build can do.
fn features() -> Vec<&'static str> {
    let all = [
        ("nixl", cfg!(feature = "nixl")),
        ("etcd", cfg!(feature = "etcd")),
        ("cuda", cfg!(feature = "cuda")),
    ];
    all.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
}

/// `refit_rl._core`.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("FEATURES", PyTuple::new(py, features())?)?;
    module.add_class::<layout::Layout>()?;
    module.add_class::<source::Source>()?;
    module.add_class::<target::Target>()?;
    module.add_function(wrap_pyfunction!(layout::of_megatron, module)?)?;
    module.add_function(wrap_pyfunction!(layout::of_vllm, module)?)?;
    module.add_function(wrap_pyfunction!(layout::of_bands, module)?)?;
    module.add_function(wrap_pyfunction!(layout::of_shards, module)?)?;
    module.add_function(wrap_pyfunction!(layout::check_engine, module)?)?;
    module.add_function(wrap_pyfunction!(layout::keeps, module)?)?;
    module.add_function(wrap_pyfunction!(nixl_library, module)?)?;
    Ok(())
}
