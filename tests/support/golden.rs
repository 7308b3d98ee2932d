//! Golden data: tensors that real trainer ranks held and real engine ranks wanted.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

pub use refit_cli::case::{Case, CaseError, Tensors};

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

/// The folders of all model cases, sorted.
///
/// # Errors
/// [`CaseError::Io`], and [`CaseError::NoCase`] when there is none.
pub fn cases(root: &Path) -> Result<Vec<PathBuf>, CaseError> {
    refit_cli::case::find(root)
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
