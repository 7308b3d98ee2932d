//! Golden data: tensors that real trainer ranks held and real engine ranks wanted.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

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

/// How the files of roles end.
const PLAIN: &str = ".jsonl";
/// How they end where they are compressed.
const PACKED: &str = ".jsonl.gz";

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
    /// The extents of the logical tensors and other facts, by the role's own names.
    pub cfg: BTreeMap<String, Value>,
    /// Tensor-parallel size of the trainer, or a text that says more.
    pub src_tp: Value,
    /// Tensor-parallel size of the engine, or a text that says more.
    pub dst_tp: Value,
    /// The target rank.
    pub dst_rank: u32,
    /// Shapes of the source tensors.
    pub src_shapes: Vec<Vec<u64>>,
    /// Shape on the target rank.
    pub dst_shape: Vec<u64>,
    /// `(source tensor, source element, target element, length)`, by target, merged.
    pub runs: Vec<(u32, u64, u64, u64)>,
    /// Values of the source tensors.
    pub src: Option<Vec<Vec<i32>>>,
    /// Values on the target rank.
    pub dst: Option<Vec<i32>>,
}

impl RoleLine {
    /// An extent.
    #[must_use]
    pub fn size(&self, key: &str) -> u64 {
        self.cfg[key].as_u64().unwrap_or_else(|| panic!("`{key}` in {:?}", self.cfg))
    }

    /// A parallel size.
    #[must_use]
    pub fn count(&self, key: &str) -> u32 {
        u32::try_from(self.size(key)).unwrap_or_else(|_| panic!("`{key}` in {:?}", self.cfg))
    }

    /// A fact in words.
    #[must_use]
    pub fn word(&self, key: &str) -> &str {
        self.cfg[key].as_str().unwrap_or_else(|| panic!("`{key}` in {:?}", self.cfg))
    }

    /// The trainer's tensor-parallel size.
    #[must_use]
    pub fn source_tp(&self) -> u32 {
        tp(&self.src_tp)
    }

    /// The engine's tensor-parallel size, or where it is written `ep2` or `tp2`, that number of ranks.
    #[must_use]
    pub fn target_tp(&self) -> u32 {
        tp(&self.dst_tp)
    }
}

fn tp(size: &Value) -> u32 {
    let text = size.to_string();
    let digits = text.trim_matches(|c: char| !c.is_ascii_digit());
    digits.parse().unwrap_or_else(|_| panic!("{text} is no size"))
}

/// The lines of one role, of `<name>.jsonl` or, where that is not there, `<name>.jsonl.gz`.
///
/// # Errors
/// [`GoldenError::Io`] and [`GoldenError::Json`].
pub fn role(root: &Path, name: &str) -> Result<Vec<RoleLine>, GoldenError> {
    let plain = root.join("roles").join(format!("{name}{PLAIN}"));
    let packed = root.join("roles").join(format!("{name}{PACKED}"));
    let (path, text) = if plain.exists() {
        let text = fs::read_to_string(&plain);
        (plain, text)
    } else {
        let text = unpack(&packed);
        (packed, text)
    };
    let text = text.map_err(|source| GoldenError::Io { path: path.clone(), source })?;
    (1..).zip(text.lines()).map(|(line, text)| json(&path, line, text)).collect()
}

/// The names of all roles, sorted.
///
/// # Errors
/// [`GoldenError::Io`].
pub fn roles(root: &Path) -> Result<Vec<String>, GoldenError> {
    let names = entries(&root.join("roles"))?;
    let role = |name: &String| {
        name.strip_suffix(PLAIN).or_else(|| name.strip_suffix(PACKED)).map(Into::into)
    };
    let mut roles: Vec<String> = names.iter().filter_map(role).collect();
    roles.dedup();
    Ok(roles)
}

/// The folders of all model cases, sorted.
///
/// # Errors
/// [`CaseError::Io`], and [`CaseError::NoCase`] when there is none.
pub fn cases(root: &Path) -> Result<Vec<PathBuf>, CaseError> {
    refit_cli::case::find(root)
}

fn unpack(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    GzDecoder::new(File::open(path)?).read_to_string(&mut text)?;
    Ok(text)
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
