//! One tarball that runs on a host without internet, Rust or NIXL: the `refit` command, NIXL and what it needs.

mod check;
mod elf;
mod licences;
mod programs;
mod runtime;

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{cargo, failure::Failure, setup};
use runtime::Files;

/// What the command is built with.
pub(crate) const FEATURES: &str = "nixl,cuda";

/// More would not pass through what carries a bundle to a host.
const MOST_BYTES: u64 = 60 << 20;

/// What to bundle.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    /// Where to; `.tar.gz` or `.tar.xz`.
    out: Option<PathBuf>,
    features: String,
    /// Whether tests, golden data and the scripts of `benches/peers` go along.
    tests: bool,
}

impl Options {
    /// Reads the arguments; the error is a hint for the user.
    pub(crate) fn parse(args: Vec<String>) -> Result<Self, String> {
        let mut options = Self { out: None, features: FEATURES.to_owned(), tests: false };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let (name, inline) = match arg.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (arg.clone(), None),
            };
            let mut value = || {
                inline
                    .clone()
                    .or_else(|| args.next())
                    .ok_or_else(|| format!("`{name}` needs a value"))
            };
            match name.as_str() {
                "--out" => options.out = Some(value()?.into()),
                "--features" => options.features = value()?,
                "--tests" if inline.is_none() => options.tests = true,
                _ => {
                    return Err(format!(
                        "`bundle` does not know `{arg}`; see `cargo xtask bundle --help`"
                    ));
                }
            }
        }
        match &options.out {
            Some(out) if compression(out).is_none() => {
                Err(format!("--out {}: it must end in .tar.gz or .tar.xz", out.display()))
            }
            _ => Ok(options),
        }
    }
}

/// tar's letter for how a file of this name is compressed.
fn compression(out: &Path) -> Option<&'static str> {
    let name = out.file_name()?.to_str()?;
    [(".tar.gz", "--gzip"), (".tar.xz", "--xz")]
        .into_iter()
        .find_map(|(end, option)| name.ends_with(end).then_some(option))
}

/// The folder that a bundle unpacks into.
fn name() -> String {
    format!("refit-{}-{}-{}", env!("CARGO_PKG_VERSION"), env::consts::OS, env::consts::ARCH)
}

/// Builds, collects, packs, and tries what came out.
pub(crate) fn run(root: &Path, options: &Options) -> Result<(), Failure> {
    let unavailable = |why: setup::Unavailable| Failure::new(format!("nixl: {why}"));
    setup::run(root).map_err(unavailable)?;
    let nixl = setup::pinned(root, &setup::NIXL).map_err(unavailable)?;
    let cudart = setup::pinned(root, &setup::CUDART).map_err(unavailable)?;

    let work = root.join("target/bundle");
    let tree = work.join(name());
    fresh(&tree)?;

    let mut programs = programs::command(root, &options.features)?;
    if options.tests {
        programs.extend(programs::tests(root, &options.features)?);
    }
    let libraries = runtime::libraries(&nixl, &cudart)?;
    let mut binaries = libraries.clone();
    binaries.extend(programs.clone());
    let versions = runtime::requirements(&binaries)?;

    for (place, from) in &programs {
        strip(from, &tree.join(place))?;
    }
    copy(&libraries, &tree)?;
    let wheels = [("nixl", &*nixl), ("cuda-runtime", &*cudart)];
    let notice = work.join("NOTICE");
    copy(&licences::collect(root, &wheels, &options.features, &notice)?, &tree)?;
    if options.tests {
        copy(&programs::data(root)?, &tree)?;
    }
    script(&tree.join("with-nixl"), include_str!("bundle/with-nixl.sh"))?;
    script(&tree.join("refit"), include_str!("bundle/refit.sh"))?;
    write(&tree.join("README"), &readme(options, &versions))?;

    let out = options.out.clone().unwrap_or_else(|| root.join("target").join(name() + ".tar.gz"));
    pack(&work, &out)?;
    let size = fs::metadata(&out).map_err(|error| io(&out, &error))?.len();
    println!("{}", readme(options, &versions));
    check::contents(&tree)?;
    check::run(root, &out, &work.join("check"), options.features.contains("nixl"))?;
    println!("bundle: {}, {:.1} MB", out.display(), megabytes(size));
    if size > MOST_BYTES {
        return Err(Failure::new(format!(
            "the bundle has {:.1} MB, more than {:.1}; see above what is large",
            megabytes(size),
            megabytes(MOST_BYTES)
        )));
    }
    Ok(())
}

fn readme(options: &Options, versions: &[String]) -> String {
    let tests = if options.tests {
        "  ./with-nixl tests/bin/NAME   a test, its golden data in tests/golden\n  \
         benches/peers                what others take for the same, with torch: python3 benches/peers/gpu.py --help\n"
    } else {
        ""
    };
    format!(
        "{name}, features {features}, with {nixl} and {cudart}\n\n  \
         ./refit ARGS                 the command\n  \
         ./with-nixl COMMAND [ARGS]   any program, with the NIXL of this folder\n{tests}\n\
         The host brings: Linux with glibc, libstdc++, zlib and OpenSSL 3 ({versions}), as Ubuntu 24.04 does;\n\
         for GPUs a driver for CUDA 12 or 13. Licences: licenses/NOTICE.\n",
        name = name(),
        features = options.features,
        nixl = setup::NIXL,
        cudart = setup::CUDART,
        versions = versions.join(", "),
    )
}

fn megabytes(bytes: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "for people")]
    let bytes = bytes as f64;
    bytes / f64::from(1_u32 << 20)
}

fn io(path: &Path, error: &std::io::Error) -> Failure {
    Failure::new(format!("{}: {error}", path.display()))
}

/// An empty folder.
fn fresh(folder: &Path) -> Result<(), Failure> {
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(|error| io(folder, &error))?;
    }
    fs::create_dir_all(folder).map_err(|error| io(folder, &error))
}

fn parent_of(path: &Path) -> Result<(), Failure> {
    let Some(folder) = path.parent() else { return Ok(()) };
    fs::create_dir_all(folder).map_err(|error| io(folder, &error))
}

fn copy(files: &Files, tree: &Path) -> Result<(), Failure> {
    for (place, from) in files {
        let to = tree.join(place);
        parent_of(&to)?;
        fs::copy(from, &to).map_err(|error| io(from, &error))?;
    }
    Ok(())
}

/// Copies a program without what only a debugger reads. binutils came with g++, which setup has checked.
fn strip(from: &Path, to: &Path) -> Result<(), Failure> {
    parent_of(to)?;
    let mut command = Command::new("strip");
    command.arg("--strip-all").arg("-o").arg(to).arg(from);
    cargo::status(command)
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text).map_err(|error| io(path, &error))
}

fn script(path: &Path, text: &str) -> Result<(), Failure> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o755);
    let mut file = options.open(path).map_err(|error| io(path, &error))?;
    file.write_all(text.as_bytes()).map_err(|error| io(path, &error))
}

/// Packs the tree, so that the same files give the same bytes.
fn pack(work: &Path, out: &Path) -> Result<(), Failure> {
    let Some(compression) = compression(out) else {
        return Err(Failure::new(format!("{}: neither .tar.gz nor .tar.xz", out.display())));
    };
    parent_of(out)?;
    let mut command = Command::new("tar");
    command.arg("--directory").arg(work);
    command.args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--mtime=@0"]);
    command.args(["--mode=go=rX,u+rw,a-s", compression, "--create", "--file"]).arg(out).arg(name());
    cargo::status(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, String> {
        Options::parse(line.split_whitespace().map(str::to_owned).collect())
    }

    #[test]
    fn options_are_read() {
        let plain = Options { out: None, features: FEATURES.to_owned(), tests: false };
        assert_eq!(parse(""), Ok(plain));
        let all = Options { out: Some("a.tar.xz".into()), features: "x,y".to_owned(), tests: true };
        assert_eq!(parse("--out a.tar.xz --features x,y --tests").as_ref(), Ok(&all));
        assert_eq!(parse("--tests --features=x,y --out=a.tar.xz").as_ref(), Ok(&all));
        for (line, hint) in [
            ("--out a.zip", ".tar.gz"),
            ("--out", "needs a value"),
            ("--tests=all", "--help"),
            ("x", "--help"),
        ] {
            assert!(parse(line).unwrap_err().contains(hint), "{line}");
        }
    }

    #[test]
    fn every_feature_exists_where_it_is_asked_for() {
        for manifest in
            [include_str!("../../crates/cli/Cargo.toml"), include_str!("../../tests/Cargo.toml")]
        {
            for feature in FEATURES.split(',') {
                assert!(manifest.contains(&format!("\n{feature} = [")), "no feature `{feature}`");
            }
        }
    }

    #[test]
    fn the_launchers_say_everything_relative_to_themselves() {
        let launcher = include_str!("bundle/with-nixl.sh");
        for variable in
            ["REFIT_NIXL_LIBRARY", "NIXL_PLUGIN_DIR", "UCX_MODULE_DIR", "LD_LIBRARY_PATH"]
        {
            assert!(launcher.contains(&format!("export {variable}=\"$here/lib")), "{variable}");
        }
    }
}
