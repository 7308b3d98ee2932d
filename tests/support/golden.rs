//! Golden data: tensors that real trainer ranks held and real engine ranks wanted.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use refit::planner::Dtype;
use refit_translate::TensorSpec;
use safetensors::SafeTensors;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::oracle::Buffers;

/// Why golden data cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum GoldenError {
    /// A file or folder that cannot be read.
    #[error("{}: {source}; is REFIT_GOLDEN right?", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file that is not the JSON it should be.
    #[error("{}, line {line}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A case of another format.
    #[error("{}: schema {found}, this reader knows 1", path.display())]
    Schema {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u32,
    },
    /// A file that is not safetensors.
    #[error("{}: {source}", path.display())]
    Tensors {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: safetensors::SafeTensorError,
    },
    /// A tensor of an element type that the planner does not have.
    #[error("{}: `{tensor}` has element type {dtype}", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its element type.
        dtype: String,
    },
}

/// `$REFIT_GOLDEN`, or the folder in the repository.
#[must_use]
pub fn root() -> PathBuf {
    std::env::var_os("REFIT_GOLDEN")
        .filter(|path| !path.is_empty())
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"), PathBuf::from)
}

/// One target rank of one parameter; all numbers count elements.
#[derive(Debug, Deserialize)]
pub struct RoleLine {
    /// The extents of the logical tensors, by the role's own names.
    pub cfg: BTreeMap<String, u64>,
    /// Tensor-parallel size of the trainer.
    pub src_tp: u32,
    /// Tensor-parallel size of the engine.
    pub dst_tp: u32,
    /// The target rank.
    pub dst_rank: u32,
    /// Shapes on the source ranks.
    pub src_shapes: Vec<Vec<u64>>,
    /// Shape on the target rank.
    pub dst_shape: Vec<u64>,
    /// `(source tensor, source element, target element, length)`, by target, merged.
    pub runs: Vec<(u32, u64, u64, u64)>,
    /// Values on the source ranks.
    pub src: Option<Vec<Vec<i32>>>,
    /// Values on the target rank.
    pub dst: Option<Vec<i32>>,
}

/// The lines of one role.
///
/// # Errors
/// [`GoldenError::Io`] and [`GoldenError::Json`].
pub fn role(root: &Path, name: &str) -> Result<Vec<RoleLine>, GoldenError> {
    let path = root.join("roles").join(format!("{name}.jsonl"));
    let text = read_text(&path)?;
    (1..).zip(text.lines()).map(|(line, text)| json(&path, line, text)).collect()
}

/// The names of all roles, sorted.
///
/// # Errors
/// [`GoldenError::Io`].
pub fn roles(root: &Path) -> Result<Vec<String>, GoldenError> {
    let names = entries(&root.join("roles"))?;
    Ok(names.iter().filter_map(|name| name.strip_suffix(".jsonl")).map(Into::into).collect())
}

/// The names of all model cases, sorted.
///
/// # Errors
/// [`GoldenError::Io`].
pub fn cases(root: &Path) -> Result<Vec<String>, GoldenError> {
    entries(&root.join("models"))
}

/// A whole tiny model on both sides, its tensors not read yet.
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

/// The trainer of a case.
#[derive(Debug, Deserialize)]
pub struct Source {
    /// The layer spec: `te` or `local`.
    pub spec: String,
    /// Tensor-parallel size.
    pub tp: u32,
    /// Pipeline stages.
    pub pp: u32,
    /// Its ranks.
    pub ranks: Vec<SourceFile>,
}

/// A trainer rank of a case.
#[derive(Debug, Deserialize)]
pub struct SourceFile {
    /// Unique among trainer ranks.
    pub rank: u32,
    /// Tensor-parallel rank.
    pub tp: u32,
    /// Pipeline stage.
    pub pp: u32,
    /// Global index of each local layer.
    pub layers: Vec<u32>,
    /// Its tensors, relative to the case.
    pub file: String,
}

/// The engine of a case.
#[derive(Debug, Deserialize)]
pub struct Target {
    /// Tensor-parallel size.
    pub tp: u32,
    /// Its ranks.
    pub ranks: Vec<TargetFile>,
}

/// An engine rank of a case.
#[derive(Debug, Deserialize)]
pub struct TargetFile {
    /// Unique among engine ranks.
    pub rank: u32,
    /// Tensor-parallel rank.
    pub tp: u32,
    /// Its tensors, relative to the case.
    pub file: String,
}

/// The tensors of one rank.
#[derive(Debug)]
pub struct Tensors {
    /// Names, element types and shapes, sorted by name.
    pub specs: Vec<TensorSpec>,
    /// Bytes, by name.
    pub bytes: Buffers,
}

impl Case {
    /// Reads `models/<name>/case.json` and `config.json`.
    ///
    /// # Errors
    /// [`GoldenError::Io`], [`GoldenError::Json`], [`GoldenError::Schema`].
    pub fn open(root: &Path, name: &str) -> Result<Self, GoldenError> {
        #[derive(Deserialize)]
        struct File {
            schema: u32,
            source: Source,
            target: Target,
        }
        let folder = root.join("models").join(name);
        let path = folder.join("case.json");
        let File { schema, source, target } = json(&path, 1, &read_text(&path)?)?;
        if schema != 1 {
            return Err(GoldenError::Schema { path, found: schema });
        }
        let config = read_text(&folder.join("config.json"))?;
        Ok(Self { folder, config, source, target })
    }

    /// Reads a rank's file.
    ///
    /// # Errors
    /// [`GoldenError::Io`], [`GoldenError::Tensors`], [`GoldenError::Dtype`].
    pub fn tensors(&self, file: &str) -> Result<Tensors, GoldenError> {
        let path = self.folder.join(file);
        let raw =
            fs::read(&path).map_err(|source| GoldenError::Io { path: path.clone(), source })?;
        let tensors = SafeTensors::deserialize(&raw)
            .map_err(|source| GoldenError::Tensors { path: path.clone(), source })?;
        let (mut specs, mut bytes) = (Vec::new(), Buffers::new());
        for (name, view) in tensors.iter() {
            let dtype = view.dtype().to_string();
            let Some(dtype) = Dtype::from_name(&dtype) else {
                return Err(GoldenError::Dtype { path, tensor: name.into(), dtype });
            };
            let shape: Vec<u64> = view.shape().iter().map(|&extent| extent as u64).collect();
            specs.push(TensorSpec::new(name, dtype, shape));
            bytes.insert(name.into(), view.data().to_vec());
        }
        specs.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Tensors { specs, bytes })
    }
}

fn read_text(path: &Path) -> Result<String, GoldenError> {
    fs::read_to_string(path).map_err(|source| GoldenError::Io { path: path.into(), source })
}

fn json<T: DeserializeOwned>(path: &Path, line: usize, text: &str) -> Result<T, GoldenError> {
    serde_json::from_str(text).map_err(|source| GoldenError::Json {
        path: path.into(),
        line,
        source,
    })
}

fn entries(folder: &Path) -> Result<Vec<String>, GoldenError> {
    let io = |source| GoldenError::Io { path: folder.into(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        names.push(entry.map_err(io)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
