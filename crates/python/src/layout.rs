//! One rank's layout, and the functions that make it.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyMapping, PyTuple, PyType};
use refit::planner::RankLayout;
use refit::translate::bands::{self, Side};
use refit::translate::megatron::{self as trainer, Pipeline, SourceRank};
use refit::translate::roles::{ExpertNames, Placement};
use refit::translate::shards::{self, Shard};
use refit::translate::vllm::{self as engine, EngineModel, TargetRank};
use refit::translate::{ModelConfig, PostAction, TargetLayout, TensorSpec, TranslateError};

use crate::data::{self, one_of};
use crate::failure::{Failure, Kind};

/// One rank's parameters as boxes of the checkpoint's tensors.
#[derive(Clone, Debug)]
#[pyclass(module = "refit_rl._core", frozen)]
pub(crate) struct Layout(Arc<Inner>);

#[derive(Debug, PartialEq, Eq)]
struct Inner {
    side: Side,
    layout: RankLayout,
    post_actions: Vec<PostAction>,
}

impl Layout {
    fn new(side: Side, layout: RankLayout, post_actions: Vec<PostAction>) -> Self {
        Self(Arc::new(Inner { side, layout, post_actions }))
    }

    pub(crate) fn layout(&self) -> &RankLayout {
        &self.0.layout
    }

    pub(crate) fn actions(&self) -> &[PostAction] {
        &self.0.post_actions
    }

    pub(crate) fn side_is(&self, side: Side, class: &str) -> Result<(), Failure> {
        if self.0.side == side {
            return Ok(());
        }
        let text =
            format!("a {class} takes the layout of a {side} rank, this is a {}'s", self.0.side);
        Err(Failure::new(Kind::Config, text))
    }
}

#[pymethods]
impl Layout {
    #[getter]
    fn side(&self) -> String {
        self.0.side.to_string()
    }

    #[getter]
    fn rank(&self) -> u32 {
        self.0.layout.rank()
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.0.layout.bytes()
    }

    #[getter]
    fn names(&self) -> Vec<&str> {
        self.0.layout.params().iter().map(|param| param.name().as_ref()).collect()
    }

    #[getter]
    fn post_actions<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        actions_out(py, &self.0.post_actions)
    }

    fn spec(&self, name: &str) -> PyResult<(&'static str, u64, u64)> {
        let param = self.0.layout.param(name);
        let param = param.ok_or_else(|| PyKeyError::new_err(name.to_owned()))?;
        Ok((param.dtype().name(), param.rows(), param.cols()))
    }

    fn to_json(&self) -> String {
        bands::write(self.0.side, "", std::slice::from_ref(&self.0.layout))
    }

    fn __len__(&self) -> usize {
        self.0.layout.params().len()
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.0 == other.0
    }

    fn __repr__(&self) -> String {
        let Inner { side, layout, .. } = &*self.0;
        let (rank, params, bytes) = (layout.rank(), layout.params().len(), layout.bytes());
        format!("<Layout of {side} rank {rank}: {params} parameters, {bytes} bytes>")
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let again = py.get_type::<Self>().getattr("_restore")?;
        let state = (self.to_json(), actions_out(py, &self.0.post_actions)?);
        (again, state).into_pyobject(py)
    }

    /// What was pickled.
    #[classmethod]
    fn _restore(_: &Bound<'_, PyType>, json: &str, actions: &Bound<'_, PyList>) -> PyResult<Self> {
        let read = bands::read(json).map_err(Failure::from)?;
        let side = read.side;
        let mut ranks = read.ranks.into_iter();
        let (Some(layout), None) = (ranks.next(), ranks.next()) else {
            return Err(Failure::new(Kind::Layout, "a pickled layout has one rank").into());
        };
        let actions = actions.iter().map(|it| action_in(&it)).collect::<PyResult<_>>()?;
        Ok(Self::new(side, layout, actions))
    }
}

const ABSORB_MLA: &str = "absorb_mla";
const COPY_SINKS: &str = "copy_sinks";
const DROP_CACHES: &str = "drop_caches";

/// Post actions as dicts.
pub(crate) fn actions_out<'py>(
    py: Python<'py>,
    actions: &[PostAction],
) -> PyResult<Bound<'py, PyList>> {
    let out = PyList::empty(py);
    for action in actions {
        let kind = match action {
            PostAction::AbsorbMla { .. } => ABSORB_MLA,
            PostAction::CopySinks { .. } => COPY_SINKS,
            PostAction::DropCaches => DROP_CACHES,
            _ => {
                let text = format!("this package does not know the post action: {action}");
                return Err(Failure::new(Kind::Refit, text).into());
            }
        };
        let dict = PyDict::new(py);
        dict.set_item("kind", kind)?;
        let params: Vec<&str> = action.params().iter().map(AsRef::as_ref).collect();
        dict.set_item("params", params)?;
        out.append(dict)?;
    }
    Ok(out)
}

fn action_in(action: &Bound<'_, PyAny>) -> PyResult<PostAction> {
    let kind: String = action.get_item("kind")?.extract()?;
    let params: Vec<String> = action.get_item("params")?.extract()?;
    let params = params.into_iter().map(Into::into).collect();
    Ok(match kind.as_str() {
        ABSORB_MLA => PostAction::AbsorbMla { params },
        COPY_SINKS => PostAction::CopySinks { params },
        DROP_CACHES => PostAction::DropCaches,
        _ => {
            let text = format!("there is no post action `{kind}`");
            return Err(Failure::new(Kind::Config, text).into());
        }
    })
}

#[pyfunction]
#[pyo3(name = "megatron", signature = (
    config, tensors, *, rank, tp_rank = 0, tp_size = 1, pp_rank = 0, pp_size = 1, ep_rank = 0, ep_size = 1, etp_rank = 0,
    etp_size = 1, chunks = None, vpp_size = 1, mtp = Vec::new(), facts = None
))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments")]
pub(crate) fn of_megatron(
    py: Python<'_>,
    config: &Bound<'_, PyAny>,
    tensors: &Bound<'_, PyMapping>,
    rank: u32,
    tp_rank: u32,
    tp_size: u32,
    pp_rank: u32,
    pp_size: u32,
    ep_rank: u32,
    ep_size: u32,
    etp_rank: u32,
    etp_size: u32,
    chunks: Option<Vec<Vec<u32>>>,
    vpp_size: u32,
    mtp: Vec<u32>,
    facts: Option<&Bound<'_, PyAny>>,
) -> PyResult<Layout> {
    let config = data::config(config)?;
    let held = data::specs(tensors)?;
    if let Some(facts) = facts {
        data::trainer_facts(facts)?.check().map_err(Failure::from)?;
    }
    let chunks = match chunks {
        Some(chunks) => chunks,
        None => stage(&config, pp_rank, pp_size, vpp_size).map_err(Failure::from)?,
    };
    let at = SourceRank::new(rank, Vec::new())
        .with_tp(tp_rank, tp_size)
        .with_pp(pp_rank, pp_size)
        .with_ep(ep_rank, ep_size)
        .with_etp(etp_rank, etp_size)
        .with_chunks(chunks)
        .with_mtp(mtp);
    let layout = py.detach(|| trainer::layout(&config, &at, &held)).map_err(Failure::from)?;
    Ok(Layout::new(Side::Source, layout, Vec::new()))
}

/// The layers of one stage, split evenly.
fn stage(
    config: &ModelConfig,
    pp_rank: u32,
    pp_size: u32,
    vpp_size: u32,
) -> Result<Vec<Vec<u32>>, TranslateError> {
    let stages = Pipeline::new(pp_size).with_chunks(vpp_size).stages(config.num_layers)?;
    let stage = usize::try_from(pp_rank).ok().and_then(|at| stages.into_iter().nth(at));
    stage.ok_or(TranslateError::Rank { group: "megatron pp_size", rank: pp_rank, size: pp_size })
}

#[pyfunction]
#[pyo3(name = "vllm", signature = (
    config, tensors, *, rank, tp_rank = 0, tp_size = 1, dp_rank = 0, dp_size = 1, pcp_rank = 0, pcp_size = 1,
    expert_parallel = None, sequence_parallel_moe = false, expert_names = "auto", model = "main", facts = None
))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments")]
pub(crate) fn of_vllm(
    py: Python<'_>,
    config: &Bound<'_, PyAny>,
    tensors: &Bound<'_, PyMapping>,
    rank: u32,
    tp_rank: u32,
    tp_size: u32,
    dp_rank: u32,
    dp_size: u32,
    pcp_rank: u32,
    pcp_size: u32,
    expert_parallel: Option<&str>,
    sequence_parallel_moe: bool,
    expert_names: &str,
    model: &str,
    facts: Option<&Bound<'_, PyAny>>,
) -> PyResult<Layout> {
    let config = data::config(config)?;
    let held = data::specs(tensors)?;
    if let Some(facts) = facts {
        data::engine_facts(facts)?.check().map_err(Failure::from)?;
    }
    let names = one_of(
        "expert_names",
        expert_names,
        &[("auto", None), ("flat", Some(ExpertNames::Flat)), ("routed", Some(ExpertNames::Routed))],
    )?;
    let model =
        one_of("model", model, &[("main", EngineModel::Main), ("draft", EngineModel::Draft)])?;
    let mut at = TargetRank::new(rank, tp_rank, tp_size)
        .with_dp(dp_rank, dp_size)
        .with_pcp(pcp_rank, pcp_size)
        .with_expert_names(names.unwrap_or_else(|| names_of(&held)))
        .with_model(model);
    if let Some(placement) = expert_parallel {
        at = at.with_expert_parallel(one_of(
            "expert_parallel",
            placement,
            &[("linear", Placement::Linear), ("round_robin", Placement::RoundRobin)],
        )?);
    }
    if sequence_parallel_moe {
        at = at.with_sequence_parallel_moe();
    }
    let laid_out = py.detach(|| engine::layout(&config, &at, &held)).map_err(Failure::from)?;
    let TargetLayout { layout, post_actions, .. } = laid_out;
    Ok(Layout::new(Side::Target, layout, post_actions))
}

/// What the engine calls its experts, by what it holds. Shared experts have the same name in every release.
fn names_of(held: &[TensorSpec]) -> ExpertNames {
    let called = |names: ExpertNames| {
        let part = format!(".{}", names.prefix());
        held.iter().any(|spec| spec.name.contains(&part))
    };
    // Every routed name contains the flat one.
    let flat = called(ExpertNames::Flat) && !called(ExpertNames::Routed);
    if flat { ExpertNames::Flat } else { ExpertNames::Routed }
}

/// Whether an engine with these facts is taken.
#[pyfunction]
pub(crate) fn check_engine(facts: &Bound<'_, PyAny>) -> PyResult<()> {
    Ok(data::engine_facts(facts)?.check().map_err(Failure::from)?)
}

/// Whether a layer's live tensors are known to be as they were loaded.
#[pyfunction]
pub(crate) fn keeps(layer: &Bound<'_, PyAny>, device: &str) -> PyResult<bool> {
    Ok(data::layer_facts(layer)?.keeps(data::device(device)?))
}

#[pyfunction]
#[pyo3(name = "bands", signature = (document, *, rank = None))]
pub(crate) fn of_bands(
    py: Python<'_>,
    document: &Bound<'_, PyAny>,
    rank: Option<u32>,
) -> PyResult<Layout> {
    let text = match document.cast::<PyMapping>() {
        Ok(parsed) => data::json(parsed.as_any())?,
        Err(_) => match document.extract::<String>() {
            // A document is an object; no file's name begins like one.
            Ok(text) if text.trim_start().starts_with('{') => text,
            _ => data::read(&document.extract::<PathBuf>()?)?,
        },
    };
    let read = py.detach(|| bands::read(&text)).map_err(Failure::from)?;
    let there: Vec<u32> = read.ranks.iter().map(RankLayout::rank).collect();
    let found = match rank {
        Some(rank) => read.ranks.into_iter().find(|layout| layout.rank() == rank),
        None if there.len() == 1 => read.ranks.into_iter().next(),
        None => None,
    };
    let layout = found.ok_or_else(|| {
        let text = format!("the document has ranks {there:?}; say by `rank` which one it is");
        Failure::new(Kind::Config, text).ranks(rank)
    })?;
    Ok(Layout::new(read.side, layout, Vec::new()))
}

#[pyfunction]
#[pyo3(name = "shards", signature = (tensors, *, rank, side = "source"))]
pub(crate) fn of_shards(
    py: Python<'_>,
    tensors: &Bound<'_, PyMapping>,
    rank: u32,
    side: &str,
) -> PyResult<Layout> {
    let side = one_of("side", side, &[("source", Side::Source), ("target", Side::Target)])?;
    let mut held = Vec::new();
    for item in tensors.items()? {
        let (name, value): (String, Bound<'_, PyAny>) = item.extract()?;
        held.push(shard(&name, &value)?);
    }
    let layout = py.detach(|| shards::layout(rank, &held)).map_err(Failure::from)?;
    Ok(Layout::new(side, layout, Vec::new()))
}

const SHARD: [&str; 4] = ["global_shape", "dtype", "offsets", "local_shape"];

fn shard(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Shard> {
    let malformed = || {
        let text = format!("`{name}` is no shard: give {} as a tuple or a dict", SHARD.join(", "));
        Failure::new(Kind::Layout, text).about(name)
    };
    let parts: Vec<Bound<'_, PyAny>> = match value.cast::<PyTuple>() {
        Ok(tuple) => tuple.iter().collect(),
        Err(_) => SHARD
            .iter()
            .map(|key| value.get_item(key))
            .collect::<PyResult<_>>()
            .map_err(|_| malformed())?,
    };
    let [global_shape, dtype, offsets, local_shape] = parts.as_slice() else {
        return Err(malformed().into());
    };
    Ok(Shard {
        name: name.into(),
        global_shape: data::extents(name, "global shape", global_shape)?,
        dtype: data::known_dtype(name, dtype)?,
        offsets: data::extents(name, "offsets", offsets)?,
        local_shape: data::extents(name, "local shape", local_shape)?,
    })
}
