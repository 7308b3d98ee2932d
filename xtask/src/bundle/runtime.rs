//! Which libraries go along: those that refit loads, and everything they need that the host does not have.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
};

use super::elf::Dynamic;
use crate::failure::Failure;

/// Where in NIXL's wheel its own libraries lie, and where those of others.
const NIXL_LIBRARIES: &str = ".nixl_cu12.mesonpy.libs";
const OTHER_LIBRARIES: &str = "nixl_cu12.libs";

/// What is loaded by name at run time, and so no library says that it needs it.
const NIXL_ROOTS: [&str; 4] = ["libnixl.so", "libnixl_capi.so", "libserdes.so", "libstream.so"];
const PLUGIN: &str = "plugins/libplugin_UCX.so";

/// Modules of UCX that stay behind: measuring tools, and one that needs the DOCA SDK on the host.
const MODULES_LEFT: [&str; 3] =
    ["libucx_perftest_cuda", "libucx_perftest_mad", "libuct_ib_mlx5_gdp"];

/// What every Ubuntu 24.04 has, even as the smallest container image: the C and C++ runtimes, zlib and OpenSSL.
const HOST: [&str; 12] = [
    "ld-linux-aarch64.so.1",
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libcrypto.so.3",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libssl.so.3",
    "libstdc++.so.6",
    "libz.so.1",
];

/// What comes with a driver. Only modules of UCX may need these; UCX goes on without a module that does not load.
const DRIVERS: [&str; 3] = ["libcuda.so.1", "libefa.so.1", "libnvidia-ml.so.1"];

/// The newest versions of symbols that the oldest host has: Ubuntu 24.04.
const NEWEST: [(&str, &[u32]); 3] =
    [("GLIBC_", &[2, 39]), ("GLIBCXX_", &[3, 4, 33]), ("CXXABI_", &[1, 3, 15])];

/// Files of a bundle: where each goes, and where it comes from.
pub(crate) type Files = BTreeMap<PathBuf, PathBuf>;

/// The libraries under `lib`: NIXL with its UCX plugin, the modules of UCX, the CUDA runtime, and what they need.
pub(crate) fn libraries(nixl: &Path, cudart: &Path) -> Result<Files, Failure> {
    let (own, other) = (nixl.join(NIXL_LIBRARIES), nixl.join(OTHER_LIBRARIES));
    let mut known = plain_files(&other)?;
    // NIXL's own libraries are there twice; plugins are linked to these.
    known.extend(plain_files(&own)?);
    known.extend(plain_files(&cudart.join("nvidia/cuda_runtime/lib"))?);
    let modules: BTreeMap<String, PathBuf> = plain_files(&other.join("ucx"))?
        .into_iter()
        .filter(|(name, _)| name.contains(".so"))
        .filter(|(name, _)| !MODULES_LEFT.iter().any(|left| is_named(name, left)))
        .collect();
    if modules.is_empty() {
        return Err(Failure::new(format!(
            "{}: no modules of UCX; is it another version?",
            other.display()
        )));
    }

    let mut files = Files::new();
    let mut open = Vec::new();
    for name in NIXL_ROOTS {
        open.push((PathBuf::from("lib").join(name), own.join(name)));
    }
    open.push((PathBuf::from("lib").join(PLUGIN), own.join(PLUGIN)));
    for (name, path) in &modules {
        open.push((PathBuf::from("lib/ucx").join(name), path.clone()));
    }
    while let Some((place, path)) = open.pop() {
        let in_module = place.starts_with("lib/ucx");
        let needed = Dynamic::read(&path).map_err(Failure::new)?.needed;
        if files.insert(place, path.clone()).is_some() {
            continue;
        }
        for name in needed {
            if let Some(from) = known.get(&name) {
                open.push((PathBuf::from("lib").join(name), from.clone()));
            } else if !(from_host(&name)
                || in_module && (modules.contains_key(&name) || DRIVERS.contains(&&*name)))
            {
                return Err(Failure::new(format!(
                    "{} needs {name}, which is neither in the wheels nor on every host; see xtask/src/bundle/runtime.rs",
                    path.display()
                )));
            }
        }
    }
    Ok(files)
}

/// The newest versions that any of these asks of the host.
///
/// # Errors
/// When one asks for more than the oldest host has, or for a library that a host need not have.
pub(crate) fn requirements(files: &Files) -> Result<Vec<String>, Failure> {
    let bundled: BTreeSet<&OsStr> = files.keys().filter_map(|place| place.file_name()).collect();
    let mut newest: BTreeMap<&str, (Vec<u32>, &Path)> = BTreeMap::new();
    for path in files.values() {
        let dynamic = Dynamic::read(path).map_err(Failure::new)?;
        for version in &dynamic.versions {
            let Some((family, number)) = version_of(version) else { continue };
            let entry = newest.entry(family).or_insert_with(|| (Vec::new(), path));
            if number > entry.0 {
                *entry = (number, path);
            }
        }
        let strange = |name: &&String| {
            !from_host(name)
                && !DRIVERS.contains(&name.as_str())
                && !bundled.contains(OsStr::new(name.as_str()))
        };
        if let Some(name) = dynamic.needed.iter().find(strange) {
            return Err(Failure::new(format!("{} needs {name} of the host", path.display())));
        }
    }
    for (family, limit) in NEWEST {
        if let Some((number, path)) = newest.get(family).filter(|(number, _)| &**number > limit) {
            return Err(Failure::new(format!(
                "{} needs {family}{}, but the bundle is for hosts down to {family}{}; build it on an older system",
                path.display(),
                dotted(number),
                dotted(limit)
            )));
        }
    }
    Ok(newest.iter().map(|(family, (number, _))| format!("{family}{}", dotted(number))).collect())
}

/// `GLIBC_2.34` -> `GLIBC_`, 2.34
fn version_of(name: &str) -> Option<(&'static str, Vec<u32>)> {
    NEWEST.iter().find_map(|(family, _)| {
        let numbers = name.strip_prefix(family)?.split('.').map(|part| part.parse().ok());
        Some((*family, numbers.collect::<Option<Vec<u32>>>()?))
    })
}

fn dotted(number: &[u32]) -> String {
    number.iter().map(ToString::to_string).collect::<Vec<_>>().join(".")
}

fn from_host(name: &str) -> bool {
    HOST.contains(&name)
}

/// Whether `name` is the library `stem`, of any version.
fn is_named(name: &str, stem: &str) -> bool {
    name.strip_prefix(stem).is_some_and(|rest| rest.starts_with(".so"))
}

/// The files of a folder by name, without those of its folders.
pub(crate) fn plain_files(folder: &Path) -> Result<BTreeMap<String, PathBuf>, Failure> {
    let problem = |error| Failure::new(format!("{}: {error}", folder.display()));
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(problem)? {
        let path = entry.map_err(problem)?.path();
        if let Some(name) = path.file_name().and_then(OsStr::to_str).filter(|_| path.is_file()) {
            files.insert(name.to_owned(), path);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_as_numbers() {
        assert_eq!(version_of("GLIBC_2.34"), Some(("GLIBC_", vec![2, 34])));
        assert_eq!(version_of("GLIBCXX_3.4.9"), Some(("GLIBCXX_", vec![3, 4, 9])));
        assert_eq!(version_of("GLIBC_PRIVATE"), None);
        assert_eq!(version_of("LIBUCP_1.23"), None);
        assert!(version_of("GLIBC_2.5") < version_of("GLIBC_2.34"));
        assert_eq!(dotted(&[2, 39]), "2.39");
    }

    #[test]
    fn modules_are_told_apart_by_their_whole_name() {
        assert!(is_named("libuct_ib_mlx5_gdp.so.0.0.0", "libuct_ib_mlx5_gdp"));
        assert!(!is_named("libuct_ib_mlx5.so.0", "libuct_ib_mlx5_gdp"));
        assert!(!is_named("libuct_ib_mlx5_gda.so.0.0.0", "libuct_ib_mlx5"));
    }

    #[test]
    fn a_program_of_this_machine_asks_only_of_the_host() {
        let program = std::env::current_exe().unwrap();
        let files = Files::from([(PathBuf::from("bin/x"), program)]);
        let found = requirements(&files).unwrap();
        assert!(found.iter().any(|version| version.starts_with("GLIBC_2.")), "{found:?}");
    }
}
