//! A model in safetensors under Hugging Face names, read a row at a time.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use refit::planner::{Dtype, Tensor};
use safetensors::tensor::Metadata;

use crate::error::CliError;

/// Most bytes of a file's header: the format's own bound.
const MAX_HEADER: u64 = 100_000_000;

/// Every tensor of a folder.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    folder: PathBuf,
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Held>,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    file: usize,
    offset: u64,
    elements: u64,
    dtype: Dtype,
}

impl Checkpoint {
    /// Looks at every `*.safetensors` of a folder. Files are kept open: whoever replaces one by another of its name changes
    /// nothing here.
    pub(crate) fn open(folder: &Path) -> Result<Self, CliError> {
        let read = |source| CliError::Read { path: folder.to_path_buf(), source };
        let mut paths = Vec::new();
        for entry in fs::read_dir(folder).map_err(read)? {
            let path = entry.map_err(read)?.path();
            if path.extension().is_some_and(|it| it == "safetensors") {
                paths.push(path);
            }
        }
        paths.sort();
        let mut checkpoint =
            Self { folder: folder.to_path_buf(), files: Vec::new(), tensors: BTreeMap::new() };
        for path in paths {
            checkpoint.add(path)?;
        }
        if checkpoint.tensors.is_empty() {
            let folder = folder.display();
            return Err(CliError::Usage(format!("{folder} holds no tensors in *.safetensors")));
        }
        Ok(checkpoint)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), CliError> {
        let read = |source| CliError::Read { path: path.clone(), source };
        let wrong = |why: String| CliError::Usage(format!("{}: {why}", path.display()));
        let mut file = File::open(&path).map_err(read)?;
        let bytes = file.metadata().map_err(read)?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(read)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER.min(bytes.saturating_sub(8)) {
            return Err(wrong("is no whole safetensors file: its header does not fit".to_owned()));
        }
        let mut header = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        file.read_exact(&mut header).map_err(read)?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|error| wrong(format!("its header cannot be read: {error}")))?;
        let index = self.files.len();
        for (name, info) in metadata.tensors() {
            let spelled = info.dtype.to_string();
            let dtype = Dtype::from_name(&spelled).ok_or_else(|| {
                wrong(format!("`{name}` has elements of {spelled}, which nothing here reads"))
            })?;
            let elements =
                info.shape.iter().try_fold(1_u64, |all, &extent| all.checked_mul(extent as u64));
            let (from, to) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
            let size = elements.and_then(|elements| elements.checked_mul(dtype.size()));
            let offset = (8 + length).checked_add(from);
            let end = (8 + length).checked_add(to).filter(|end| *end <= bytes);
            let (Some(elements), Some(offset), Some(_), true) =
                (elements, offset, end, size.is_some() && size == to.checked_sub(from))
            else {
                return Err(wrong(format!("`{name}` does not lie whole in the file")));
            };
            let held = Held { file: index, offset, elements, dtype };
            if self.tensors.insert(name.clone(), held).is_some() {
                return Err(wrong(format!("`{name}` is in another file as well")));
            }
        }
        self.files.push((path, file));
        Ok(())
    }

    /// Makes sure that a tensor is there as it is expected.
    pub(crate) fn check(&self, tensor: &Tensor, dtype: Dtype) -> Result<(), CliError> {
        let (name, folder) = (&tensor.name, self.folder.display());
        let refuse = |why: String| Err(CliError::Usage(format!("{folder}: `{name}` {why}")));
        let Some(held) = self.tensors.get(name.as_ref()) else {
            return refuse("is not there; is --config that of this checkpoint?".to_owned());
        };
        let elements = tensor.rows.checked_mul(tensor.cols);
        if elements != Some(held.elements) {
            let Tensor { rows, cols, .. } = tensor;
            return refuse(format!("has {} elements instead of {rows} x {cols}", held.elements));
        }
        if held.dtype != dtype {
            return refuse(format!("is in {}, and the model holds it in {dtype}", held.dtype));
        }
        Ok(())
    }

    /// Reads elements of one row, from a column on.
    pub(crate) fn read(
        &self,
        tensor: &Tensor,
        (row, col): (u64, u64),
        into: &mut [u8],
    ) -> Result<(), CliError> {
        let Some(held) = self.tensors.get(tensor.name.as_ref()) else {
            return self.check(tensor, Dtype::U8);
        };
        let (path, file) = &self.files[held.file];
        // Fits: all elements lie in the file, which was checked, and so do those of this row.
        let at = held.offset + (row * tensor.cols + col) * held.dtype.size();
        file.read_exact_at(into, at).map_err(|source| CliError::Read { path: path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use refit::planner::{Band, LayoutBuilder, Param};
    use safetensors::tensor::{Dtype as Stored, TensorView, serialize_to_file};

    use super::*;

    #[test]
    fn rows_are_read_where_they_lie_and_what_is_not_whole_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("holds no tensors"), "{error}");

        let bytes: Vec<u8> = (0..24).collect();
        let view = TensorView::new(Stored::BF16, vec![3, 4], &bytes).unwrap();
        let path = folder.path().join("model.safetensors");
        serialize_to_file([("a", view)], None, &path).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let mut layout = LayoutBuilder::new(0);
        for name in ["a", "b"] {
            let tensor = layout.tensor(name, 3, 4).unwrap();
            let band = Band::new(tensor, 0..3, 0..4);
            layout.param(Param::new(name, Dtype::Bf16, 3, 4).band(band)).unwrap();
        }
        let layout = layout.build();
        let [a, b] = layout.tensors() else { panic!("two tensors") };
        checkpoint.check(a, Dtype::Bf16).unwrap();
        let mut row = [0; 4];
        checkpoint.read(a, (2, 1), &mut row).unwrap();
        assert_eq!(row, [18, 19, 20, 21]);
        for (error, part) in [
            (checkpoint.check(a, Dtype::F32), "is in bf16"),
            (checkpoint.check(b, Dtype::Bf16), "is not there"),
        ] {
            let error = error.unwrap_err().to_string();
            assert!(error.to_lowercase().contains(part), "{error}");
        }

        let whole = fs::read(&path).unwrap();
        for cut in [0, 7, 8, 20, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            Checkpoint::open(folder.path()).unwrap_err();
        }
        let mut huge = whole;
        huge[..8].fill(0xff);
        fs::write(&path, &huge).unwrap();
        Checkpoint::open(folder.path()).unwrap_err();
    }
}
