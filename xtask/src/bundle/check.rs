//! Tries a bundle as a host without anything would see it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::{fresh, io, licences::add_tree, megabytes, name, runtime::Files};
use crate::{cargo, failure::Failure};

/// A case with gathered row-parallel tensors: strided reads, staging and landing.
const CASE: &str = "tests/golden/models/qwen3_tp4_to_tp2";

/// How many files are listed by name.
const LARGEST: usize = 12;

/// Prints the sizes of what is in a bundle, before it is packed.
pub(crate) fn contents(tree: &Path) -> Result<(), Failure> {
    let mut files = Files::new();
    add_tree(&mut files, Path::new(""), tree)?;
    let mut sizes: Vec<(u64, PathBuf)> = Vec::new();
    for (place, path) in files {
        sizes.push((fs::metadata(&path).map_err(|error| io(&path, &error))?.len(), place));
    }
    sizes.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    let total = |sizes: &[(u64, PathBuf)]| megabytes(sizes.iter().map(|(size, _)| size).sum());
    println!("contents, MB before packing:");
    let (largest, rest) = sizes.split_at(sizes.len().min(LARGEST));
    for (size, place) in largest {
        println!("{:>8.1}  {}", megabytes(*size), place.display());
    }
    println!("{:>8.1}  {} others", total(rest), rest.len());
    println!("{:>8.1}  in all", total(&sizes));
    Ok(())
}

/// Unpacks into `folder` and runs the command with an empty environment: its version, and a golden case.
pub(crate) fn run(root: &Path, bundle: &Path, folder: &Path, nixl: bool) -> Result<(), Failure> {
    fresh(folder)?;
    let mut tar = Command::new("tar");
    tar.arg("--directory").arg(folder).arg("--extract").arg("--file").arg(bundle);
    cargo::status(tar)?;

    let refit = folder.join(name()).join("refit");
    let transport = if nixl { "nixl" } else { "local" };
    let case = root.join(CASE);
    let case =
        case.to_str().ok_or_else(|| Failure::new(format!("{}: not UTF-8", case.display())))?;
    for args in [&["--version"][..], &["verify", "--transport", transport, case]] {
        let mut command = Command::new(&refit);
        // As `env -i PATH=/usr/bin:/bin` would: nothing of this machine's setup helps.
        command.env_clear().env("PATH", "/usr/bin:/bin").current_dir(folder).args(args);
        println!("check: env -i PATH=/usr/bin:/bin ./refit {}", args.join(" "));
        cargo::status(command)?;
    }
    fs::remove_dir_all(folder).map_err(|error| io(folder, &error))
}
