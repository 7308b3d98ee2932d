//! The licences of everything in a bundle.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
};

use super::runtime::{Files, plain_files};
use crate::{cargo, failure::Failure};

/// What the libraries of NIXL's wheel are. The wheel carries NIXL's own licence and a list of the rest.
const NOTICE: &str = "\
This folder holds software of several owners. `refit` itself is Apache-2.0 OR MIT (LICENSE-APACHE, LICENSE-MIT).
The Rust crates that are linked into it stand under `rust`, with their licences.

Under lib, unchanged from the wheels of NIXL and of the CUDA runtime:
  libnixl*, libserdes, libstream, plugins  NIXL          Apache-2.0, MIT (nixl)  github.com/ai-dynamo/nixl
  libuc*, ucx                              UCX           BSD-3-Clause            github.com/openucx/ucx
  libibverbs, libmlx5                      rdma-core     GPL-2.0 OR BSD-2-Clause github.com/linux-rdma/rdma-core
  libnl-3, libnl-route-3                   libnl         LGPL-2.1                github.com/thom311/libnl
  libgrpc*, libgpr, libupb*, libaddress_*  gRPC, upb     Apache-2.0              github.com/grpc/grpc
  libprotobuf, libutf8*                    Protobuf      BSD-3-Clause            github.com/protocolbuffers/protobuf
  libabsl*                                 Abseil        Apache-2.0              github.com/abseil/abseil-cpp
  libre2                                   RE2           BSD-3-Clause            github.com/google/re2
  libetcd-cpp-api-core                     etcd-cpp-api  BSD-3-Clause            github.com/etcd-cpp-apiv3/etcd-cpp-apiv3
  libcudart                                CUDA runtime  NVIDIA's CUDA EULA (cudart), which lists it as redistributable

NIXL's wheel also carries a proprietary licence of NVIDIA's (nixl/licenses) without saying for which of its files.
A bundle is for hosts of your own: ask a lawyer before you hand one on.
";

/// Under `licenses`: ours, those of the wheels, and those of the crates in the binary.
///
/// `notice` is where the overview is written to.
pub(crate) fn collect(
    root: &Path,
    wheels: &[(&str, &Path)],
    features: &str,
    notice: &Path,
) -> Result<Files, Failure> {
    let mut files = Files::new();
    for name in ["LICENSE-APACHE", "LICENSE-MIT"] {
        files.insert(Path::new("licenses").join(name), root.join(name));
    }
    fs::write(notice, NOTICE)
        .map_err(|error| Failure::new(format!("{}: {error}", notice.display())))?;
    files.insert(PathBuf::from("licenses/NOTICE"), notice.to_path_buf());
    for (name, wheel) in wheels {
        let into = Path::new("licenses").join(name);
        let count = files.len();
        add_tree(&mut files, &into, &dist_info(wheel)?.join("licenses"))?;
        if files.len() == count {
            return Err(Failure::new(format!("{}: no licence in it", wheel.display())));
        }
    }
    for crate_name in crates(root, features)? {
        let found = licences_of(&crate_name)?;
        if found.is_empty() {
            // Some crates name their licence in the manifest only.
            eprintln!("bundle: {crate_name} carries no text of its licence");
        }
        for (name, path) in found {
            files.insert(Path::new("licenses/rust").join(&crate_name).join(name), path);
        }
    }
    Ok(files)
}

/// Where pip keeps what it knows about the one package of a folder.
fn dist_info(wheel: &Path) -> Result<PathBuf, Failure> {
    let problem = |error| Failure::new(format!("{}: {error}", wheel.display()));
    for entry in fs::read_dir(wheel).map_err(problem)? {
        let path = entry.map_err(problem)?.path();
        if path.extension().is_some_and(|extension| extension == "dist-info") {
            return Ok(path);
        }
    }
    Err(Failure::new(format!("{}: not a wheel", wheel.display())))
}

/// Every file below a folder.
pub(crate) fn add_tree(files: &mut Files, into: &Path, from: &Path) -> Result<(), Failure> {
    let problem = |error| Failure::new(format!("{}: {error}", from.display()));
    for entry in fs::read_dir(from).map_err(problem)? {
        let entry = entry.map_err(problem)?;
        let (place, path) = (into.join(entry.file_name()), entry.path());
        if path.is_dir() {
            add_tree(files, &place, &path)?;
        } else {
            files.insert(place, path);
        }
    }
    Ok(())
}

/// The crates of others in the binary, as `name-version`.
fn crates(root: &Path, features: &str) -> Result<BTreeSet<String>, Failure> {
    let mut command = cargo::cargo(root);
    command.current_dir(root).args(["tree", "--quiet", "--locked", "--package", "refit-cli"]);
    command.args(["--features", features, "--edges", "normal", "--prefix", "none"]);
    command.args(["--format", "{p}"]);
    let output = command.output().map_err(|error| Failure::new(format!("cargo tree: {error}")))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(Failure::new(format!("cargo tree: {}", said.trim())));
    }
    Ok(names(&String::from_utf8_lossy(&output.stdout)))
}

/// `half v2.7.1 (*)` -> `half-2.7.1`; crates with a path are ours, and procedural macros stay in the compiler.
fn names(tree: &str) -> BTreeSet<String> {
    tree.lines()
        .filter(|line| !line.contains("(proc-macro)") && !line.contains('/'))
        .filter_map(|line| {
            let (name, rest) = line.split_once(" v")?;
            Some(format!("{name}-{}", rest.split(' ').next()?))
        })
        .collect()
}

/// The texts that a crate's author put at its root.
fn licences_of(name: &str) -> Result<Vec<(String, PathBuf)>, Failure> {
    const STARTS: [&str; 5] = ["license", "licence", "copying", "notice", "unlicense"];
    let home = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| {
        let home = env::var_os("HOME").map(PathBuf::from)?;
        Some(home.join(".cargo"))
    });
    let sources = home.map(|home| home.join("registry/src")).unwrap_or_default();
    for index in fs::read_dir(&sources).into_iter().flatten().flatten() {
        let folder = index.path().join(name);
        if folder.is_dir() {
            let files = plain_files(&folder)?.into_iter();
            return Ok(files
                .filter(|(file, _)| {
                    let lower = file.to_lowercase();
                    STARTS.iter().any(|start| lower.starts_with(start))
                })
                .collect());
        }
    }
    Err(Failure::new(format!(
        "{}: no sources of {name}, whose licence a bundle carries",
        sources.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_of_others_are_named_once() {
        let tree = "refit-cli v0.1.0 (/w/crates/cli)\nhalf v2.7.1\nserde_derive v1.0.0 (proc-macro)\n\
                    half v2.7.1 (*)\nsyn v2.0.1 (*)\n\n";
        let found: Vec<_> = names(tree).into_iter().collect();
        assert_eq!(found, ["half-2.7.1", "syn-2.0.1"]);
    }
}
