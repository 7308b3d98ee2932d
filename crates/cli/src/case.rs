//! Golden cases: a whole tiny model as real trainer ranks held it and as real engine ranks wanted it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use refit::planner::{Dtype, RankLayout};
use refit::translate::TensorSpec;
use refit::translate::bands::{BandsError, Side};
use refit::translate::megatron::SourceRank;
use refit::translate::roles::Placement;
use refit::translate::vllm::{EngineModel, TargetRank};
use safetensors::SafeTensors;
use serde::Deserialize;

/// Bytes of a `case.json` or `config.json`; real ones have a few thousand.
const MAX_TEXT_BYTES: u64 = 16 << 20;

/// Why a case cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaseError {
    /// A file or folder that cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A folder without a case.
    #[error("{path}: neither a case (a folder with case.json) nor a folder of cases")]
    NoCase {
        /// The folder.
        path: PathBuf,
    },
    /// A text that is larger than any of its kind.
    #[error("{path}: {bytes} bytes, {MAX_TEXT_BYTES} are the most; is it the right file?")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// A file of a case that lies elsewhere.
    #[error("{path}: a case's files lie in its own folder; name them relative to it")]
    Outside {
        /// The file.
        path: PathBuf,
    },
    /// A file that is not the JSON it should be.
    #[error("{path}: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A case of another format.
    #[error("{path}: schema {found}, this reader knows 1")]
    Schema {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u32,
    },
    /// A file that is not safetensors, or only the beginning of one.
    #[error("{path}: {source}; is it complete?")]
    Tensors {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: safetensors::SafeTensorError,
    },
    /// A file that does not describe the layouts of one side.
    #[error("{path}: {source}")]
    Bands {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: BandsError,
    },
    /// A file that describes the other side.
    #[error(
        "{path}: describes a {found} side where a {wanted} side is wanted; give it on the other side"
    )]
    Side {
        /// The file.
        path: PathBuf,
        /// The side it describes.
        found: Side,
        /// The side that was wanted.
        wanted: Side,
    },
    /// A rank that another file describes too.
    #[error("{path}: rank {rank} is described in another file too; leave it out of one of them")]
    Rank {
        /// The file.
        path: PathBuf,
        /// The rank.
        rank: u32,
    },
    /// A tensor of an element type that no plan knows.
    #[error("{path}: `{tensor}` has element type {dtype}, which is not supported")]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: String,
    },
}

/// A case, its tensors not read yet.
#[derive(Debug)]
pub struct Case {
    folder: PathBuf,
    /// The text of `config.json`.
    pub config: String,
    /// Sizes and files of the trainer.
    pub source: Source,
    /// Sizes and files of the engine.
    pub target: Target,
}

/// The trainer of a case. Where bands describe it, its ranks and their files are enough.
#[derive(Debug, Deserialize)]
pub struct Source {
    /// The layer spec: `te` or `local`.
    #[serde(default)]
    pub spec: String,
    /// Tensor-parallel size.
    #[serde(default)]
    pub tp: u32,
    /// Pipeline stages.
    #[serde(default)]
    pub pp: u32,
    /// Expert-parallel size.
    #[serde(default = "one")]
    pub ep: u32,
    /// Expert-tensor-parallel size.
    #[serde(default = "one")]
    pub etp: u32,
    /// Its ranks.
    pub ranks: Vec<SourceFile>,
}

/// A trainer rank of a case.
#[derive(Debug, Deserialize)]
pub struct SourceFile {
    /// Unique among trainer ranks.
    pub rank: u32,
    /// Tensor-parallel rank.
    #[serde(default)]
    pub tp: u32,
    /// Pipeline stage.
    #[serde(default)]
    pub pp: u32,
    /// Expert-parallel rank.
    #[serde(default)]
    pub ep: u32,
    /// Expert-tensor-parallel rank.
    #[serde(default)]
    pub etp: u32,
    /// Global index of each local layer.
    #[serde(default)]
    pub layers: Vec<u32>,
    /// The same of each model chunk, in place of `layers` where a rank has several.
    #[serde(default)]
    pub chunks: Vec<Vec<u32>>,
    /// Number of each local layer that predicts a token further ahead.
    #[serde(default)]
    pub mtp: Vec<u32>,
    /// Its tensors, relative to the case.
    pub file: String,
}

/// The engine of a case. Where bands describe it, its ranks and their files are enough.
#[derive(Debug, Deserialize)]
pub struct Target {
    /// Tensor-parallel size.
    #[serde(default)]
    pub tp: u32,
    /// Data-parallel size.
    #[serde(default = "one")]
    pub dp: u32,
    /// Whether experts are spread whole.
    #[serde(default)]
    pub expert_parallel: bool,
    /// Whether they are dealt out one by one instead of in order.
    #[serde(default)]
    pub round_robin: bool,
    /// Whether MoE layers are sequence-parallel.
    #[serde(default)]
    pub sequence_parallel_moe: bool,
    /// Whether the tensors are those of the draft model.
    #[serde(default)]
    pub draft: bool,
    /// Its ranks.
    pub ranks: Vec<TargetFile>,
}

/// An engine rank of a case.
#[derive(Debug, Deserialize)]
pub struct TargetFile {
    /// Unique among engine ranks.
    pub rank: u32,
    /// Tensor-parallel rank.
    #[serde(default)]
    pub tp: u32,
    /// Data-parallel rank.
    #[serde(default)]
    pub dp: u32,
    /// Its tensors, relative to the case.
    pub file: String,
}

fn one() -> u32 {
    1
}

impl Source {
    /// Where a rank of this trainer stands.
    #[must_use]
    pub fn place(&self, file: &SourceFile) -> SourceRank {
        let rank = SourceRank::new(file.rank, file.layers.clone())
            .with_tp(file.tp, self.tp)
            .with_pp(file.pp, self.pp)
            .with_ep(file.ep, self.ep)
            .with_etp(file.etp, self.etp)
            .with_mtp(file.mtp.clone());
        if file.chunks.is_empty() { rank } else { rank.with_chunks(file.chunks.clone()) }
    }
}

impl Target {
    /// Where a rank of this engine stands.
    #[must_use]
    pub fn place(&self, file: &TargetFile) -> TargetRank {
        let mut rank = TargetRank::new(file.rank, file.tp, self.tp).with_dp(file.dp, self.dp);
        if self.expert_parallel {
            let placement =
                if self.round_robin { Placement::RoundRobin } else { Placement::Linear };
            rank = rank.with_expert_parallel(placement);
        }
        if self.draft {
            rank = rank.with_model(EngineModel::Draft);
        }
        if self.sequence_parallel_moe { rank.with_sequence_parallel_moe() } else { rank }
    }
}

/// The tensors of one rank.
#[derive(Debug)]
pub struct Tensors {
    /// Names, element types and shapes, sorted by name.
    pub specs: Vec<TensorSpec>,
    /// Bytes, by name.
    pub bytes: BTreeMap<String, Vec<u8>>,
}

impl Case {
    /// Reads `case.json` and `config.json` of a folder.
    ///
    /// # Errors
    /// [`CaseError::Io`], [`CaseError::TooLarge`], and those of [`Case::from_json`].
    pub fn open(folder: &Path) -> Result<Self, CaseError> {
        let text = read_text(&folder.join("case.json"))?;
        Self::from_json(folder, &text, read_text(&folder.join("config.json"))?)
    }

    /// A case in a folder, whose `case.json` has this text and whose `config.json` has that.
    ///
    /// # Errors
    /// [`CaseError::Json`], [`CaseError::Schema`].
    pub fn from_json(folder: &Path, text: &str, config: String) -> Result<Self, CaseError> {
        #[derive(Deserialize)]
        struct Version {
            schema: u32,
        }
        #[derive(Deserialize)]
        struct Body {
            source: Source,
            target: Target,
        }
        let path = folder.join("case.json");
        let malformed = |source| CaseError::Json { path: path.clone(), source };
        // The version first: the rest of another version may look different.
        let Version { schema } = serde_json::from_str(text).map_err(malformed)?;
        if schema != 1 {
            return Err(CaseError::Schema { path, found: schema });
        }
        let Body { source, target } = serde_json::from_str(text).map_err(malformed)?;
        Ok(Self { folder: folder.to_path_buf(), config, source, target })
    }

    /// The folder's name.
    #[must_use]
    pub fn name(&self) -> String {
        name(&self.folder)
    }

    /// The layouts that the case brings for one of its sides in `source/bands.json` or `target/bands.json`, by rank.
    ///
    /// # Errors
    /// [`CaseError::Io`], [`CaseError::Bands`], [`CaseError::Side`].
    pub fn bands(&self, side: Side) -> Result<Option<BTreeMap<u32, RankLayout>>, CaseError> {
        let path = self.folder.join(side.to_string()).join("bands.json");
        if !path.exists() {
            return Ok(None);
        }
        let layouts = crate::bands::layouts(&[path], side)?;
        Ok(Some(layouts.into_iter().map(|layout| (layout.rank(), layout)).collect()))
    }

    /// Reads a rank's file.
    ///
    /// # Errors
    /// [`CaseError::Outside`], [`CaseError::Io`], and those of [`Tensors::from_bytes`].
    pub fn tensors(&self, file: &str) -> Result<Tensors, CaseError> {
        let path = self.folder.join(file);
        // A case may come from anybody; it has no business elsewhere.
        if !Path::new(file).components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(CaseError::Outside { path });
        }
        let raw = fs::read(&path).map_err(|source| CaseError::Io { path: path.clone(), source })?;
        Tensors::from_bytes(&path, &raw)
    }
}

impl Tensors {
    /// The tensors of a safetensors file; `path` names it in errors.
    ///
    /// # Errors
    /// [`CaseError::Tensors`], [`CaseError::Dtype`].
    pub fn from_bytes(path: &Path, raw: &[u8]) -> Result<Self, CaseError> {
        let path = path.to_path_buf();
        let tensors = SafeTensors::deserialize(raw)
            .map_err(|source| CaseError::Tensors { path: path.clone(), source })?;
        let (mut specs, mut bytes) = (Vec::new(), BTreeMap::new());
        for (name, view) in tensors.iter() {
            let dtype = view.dtype().to_string();
            let Some(dtype) = Dtype::from_name(&dtype) else {
                return Err(CaseError::Dtype { path, tensor: name.into(), dtype });
            };
            let shape: Vec<u64> = view.shape().iter().map(|&extent| extent as u64).collect();
            specs.push(TensorSpec::new(name, dtype, shape));
            bytes.insert(name.into(), view.data().to_vec());
        }
        specs.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { specs, bytes })
    }
}

/// The cases that a path stands for: itself, or every case in it or in its `models`, sorted by name.
///
/// # Errors
/// [`CaseError::Io`], and [`CaseError::NoCase`] when there is none.
pub fn find(path: &Path) -> Result<Vec<PathBuf>, CaseError> {
    let is_case = |folder: &Path| folder.join("case.json").is_file();
    if is_case(path) {
        return Ok(vec![path.to_path_buf()]);
    }
    let models = path.join("models");
    let folder = if models.is_dir() { models } else { path.to_path_buf() };
    let io = |source| CaseError::Io { path: folder.clone(), source };
    let mut cases = Vec::new();
    for entry in fs::read_dir(&folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if is_case(&path) {
            cases.push(path);
        }
    }
    cases.sort();
    if cases.is_empty() { Err(CaseError::NoCase { path: path.to_path_buf() }) } else { Ok(cases) }
}

/// What a person calls a case.
pub(crate) fn name(folder: &Path) -> String {
    folder
        .file_name()
        .map_or_else(|| folder.display().to_string(), |name| name.to_string_lossy().into_owned())
}

fn read_text(path: &Path) -> Result<String, CaseError> {
    let io = |source| CaseError::Io { path: path.to_path_buf(), source };
    let bytes = fs::metadata(path).map_err(io)?.len();
    if bytes > MAX_TEXT_BYTES {
        return Err(CaseError::TooLarge { path: path.to_path_buf(), bytes });
    }
    fs::read_to_string(path).map_err(io)
}
