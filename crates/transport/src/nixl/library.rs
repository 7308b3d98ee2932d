//! The guard: proof that NIXL's C API is there before anything calls it.

use std::collections::BTreeSet;
use std::error::Error as _;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use parking_lot::Mutex;

/// Proof that the NIXL C API is loaded and has every function this crate calls.
#[derive(Clone, Copy, Debug)]
pub struct NixlLibrary(());

/// What `nixl-sys` asks the loader for.
const SONAME: &str = "libnixl_capi.so";
/// Our variable: the library, or the folder it lies in.
const VARIABLE: &str = "REFIT_NIXL_LIBRARY";
/// glibc and musl agree on it, on every architecture NIXL is built for.
const RTLD_NOLOAD: i32 = 4;

/// Every function of the C API that this crate reaches through `nixl-sys`. Its stubs abort at the first call of one
/// that is missing, so all are looked up first.
const REQUIRED: &[&str] = &[
    "nixl_capi_agent_make_connection",
    "nixl_capi_create_backend",
    "nixl_capi_create_configured_agent",
    "nixl_capi_create_opt_args",
    "nixl_capi_create_params",
    "nixl_capi_create_reg_dlist",
    "nixl_capi_create_xfer_dlist",
    "nixl_capi_create_xfer_req",
    "nixl_capi_deregister_mem",
    "nixl_capi_destroy_agent",
    "nixl_capi_destroy_backend",
    "nixl_capi_destroy_opt_args",
    "nixl_capi_destroy_params",
    "nixl_capi_destroy_reg_dlist",
    "nixl_capi_destroy_xfer_dlist",
    "nixl_capi_destroy_xfer_req",
    "nixl_capi_get_local_md",
    "nixl_capi_get_xfer_status",
    "nixl_capi_invalidate_remote_md",
    "nixl_capi_load_remote_md",
    "nixl_capi_params_add",
    "nixl_capi_post_xfer_req",
    "nixl_capi_reg_dlist_add_desc",
    "nixl_capi_reg_dlist_clear",
    "nixl_capi_register_mem",
    "nixl_capi_release_xfer_req",
    "nixl_capi_xfer_dlist_add_desc",
    "nixl_capi_xfer_dlist_clear",
];

impl NixlLibrary {
    /// Loads the library, once per process.
    ///
    /// It is looked for in this order, and the first place that has it wins: beside a `libnixl.so` that the process
    /// has mapped already, so that an engine's own NIXL and ours are one; where `REFIT_NIXL_LIBRARY` points, and if
    /// something is there it has to work; at the paths of `candidates` (files or folders, such as the hidden
    /// `.nixl_cu12.mesonpy.libs` of the pip wheel); wherever the loader finds `libnixl_capi.so`. After a success,
    /// later calls return it; after a failure they look again.
    ///
    /// Call this before anything else in the process touches `nixl_sys`: its stubs decide at their first use, for
    /// good, whether there is a library.
    ///
    /// # Errors
    /// [`NixlUnavailable`] says every place that was tried and what was wrong there. The process is untouched.
    pub fn load(candidates: &[&Path]) -> Result<Self, NixlUnavailable> {
        static LOADED: Mutex<Option<NixlLibrary>> = Mutex::new(None);
        let mut loaded = LOADED.lock();
        if let Some(library) = *loaded {
            return Ok(library);
        }
        let library = search(candidates)?;
        *loaded = Some(library);
        Ok(library)
    }

    /// The file that it was loaded from, where the process maps it from one.
    #[must_use]
    pub fn path(self) -> Option<PathBuf> {
        loaded()
    }
}

/// The file that the C API was loaded from, where there is one.
pub(super) fn loaded() -> Option<PathBuf> {
    mapped().into_iter().next()
}

/// NIXL cannot be used: every place that was tried, and what was wrong there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NixlUnavailable {
    attempts: Vec<Attempt>,
}

impl NixlUnavailable {
    /// The places, in the order they were tried.
    #[must_use]
    pub fn attempts(&self) -> &[Attempt] {
        &self.attempts
    }
}

impl std::error::Error for NixlUnavailable {}

impl fmt::Display for NixlUnavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "NIXL is not available; set {VARIABLE} to {SONAME} or its folder (pip install nixl has it). Tried"
        )?;
        for (index, attempt) in self.attempts.iter().enumerate() {
            let separator = if index == 0 { ":" } else { ";" };
            write!(
                f,
                "{separator} {} ({}): {}",
                attempt.path.display(),
                attempt.origin,
                attempt.problem
            )?;
        }
        Ok(())
    }
}

/// One place that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Attempt {
    /// What was opened.
    pub path: PathBuf,
    /// Why it was tried.
    pub origin: Origin,
    /// Why it did not do.
    pub problem: Problem,
}

/// Why a place was tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// It lies beside a NIXL that the process has mapped.
    Mapped,
    /// `REFIT_NIXL_LIBRARY` points there.
    Variable,
    /// The caller named it.
    Candidate,
    /// The loader's own search.
    Loader,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mapped => "beside a mapped libnixl.so",
            Self::Variable => VARIABLE,
            Self::Candidate => "given by the caller",
            Self::Loader => "the loader's search",
        })
    }
}

/// Why a place did not do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// It could not be loaded.
    Open(String),
    /// It is not NIXL's C API, or one too old.
    MissingSymbol(&'static str),
    /// It loads, but not under the name by which `nixl-sys` looks for it.
    WrongSoname,
    /// `nixl-sys` was used before the library was loaded and decided that there is none.
    AskedTooEarly,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(why) => f.write_str(why),
            Self::MissingSymbol(symbol) => {
                write!(f, "has no function {symbol}: not NIXL's C API, or older than 1.0.1")
            }
            Self::WrongSoname => write!(f, "its soname is not {SONAME}"),
            Self::AskedTooEarly => {
                f.write_str("nixl_sys was used before NixlLibrary::load and is stuck without it")
            }
        }
    }
}

fn search(candidates: &[&Path]) -> Result<NixlLibrary, NixlUnavailable> {
    let mut attempts = Vec::new();
    for (origin, path) in places(candidates, std::env::var_os(VARIABLE)) {
        match try_load(&path) {
            Ok(library) => {
                tracing::debug!(path = %path.display(), %origin, "NIXL loaded");
                return Ok(library);
            }
            Err(problem) => {
                // Whoever set it wants that library, not whichever comes next.
                let stop = origin == Origin::Variable && path.exists();
                attempts.push(Attempt { path, origin, problem });
                if stop {
                    return Err(NixlUnavailable { attempts });
                }
            }
        }
    }
    // A `nixl-sys` linked to NIXL needs no library of ours. Asked last: in a stub build the question is final.
    #[cfg(not(feature = "nixl-dlopen"))]
    if !nixl_sys::is_stub() {
        return Ok(NixlLibrary(()));
    }
    Err(NixlUnavailable { attempts })
}

fn places(candidates: &[&Path], variable: Option<OsString>) -> Vec<(Origin, PathBuf)> {
    let mut places: Vec<(Origin, PathBuf)> =
        mapped().into_iter().map(|path| (Origin::Mapped, path)).collect();
    // An empty path would open the program itself.
    let named = variable
        .filter(|path| !path.is_empty())
        .map(|path| (Origin::Variable, PathBuf::from(path)));
    let given = candidates.iter().filter(|path| !path.as_os_str().is_empty());
    places.extend(
        named.into_iter().chain(given.map(|path| (Origin::Candidate, path.to_path_buf()))).map(
            |(origin, path)| {
                let path = if path.is_dir() { path.join(SONAME) } else { path };
                // Without a slash the loader would search for it.
                (origin, std::path::absolute(&path).unwrap_or(path))
            },
        ),
    );
    places.push((Origin::Loader, PathBuf::from(SONAME)));
    places
}

/// Where the C API lies beside a NIXL that this process has mapped.
fn mapped() -> Vec<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    beside_mapped(&maps)
        .into_iter()
        .map(|folder| folder.join(SONAME))
        .filter(|path| path.exists())
        .collect()
}

fn beside_mapped(maps: &str) -> BTreeSet<PathBuf> {
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    let ours = paths
        .filter(|path| path.file_name().is_some_and(|name| name == "libnixl.so" || name == SONAME));
    ours.filter_map(|path| path.parent().map(Path::to_path_buf)).collect()
}

fn try_load(path: &Path) -> Result<NixlLibrary, Problem> {
    // SAFETY: opening runs the initialisers of a library that the user, the caller or the host's loader chose to
    // have in this process; the crate's documentation says where it looks.
    let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| {
        Problem::Open(error.source().map_or_else(|| error.to_string(), ToString::to_string))
    })?;
    for &symbol in REQUIRED {
        // SAFETY: the symbol is only looked up, never called or read through this type.
        if unsafe { library.get::<*const ()>(symbol.as_bytes()) }.is_err() {
            return Err(Problem::MissingSymbol(symbol));
        }
    }
    // `nixl-sys` will open it by soname. This asks whether that will find it, without spending its one question.
    // SAFETY: `RTLD_NOLOAD` loads nothing, so no initialiser runs.
    unsafe { Library::open(Some(SONAME), RTLD_NOW | RTLD_NOLOAD) }
        .map_err(|_| Problem::WrongSoname)?;
    // Stays loaded: `nixl-sys` keeps pointers into it, and so do threads it starts.
    std::mem::forget(library);
    if nixl_sys::is_stub() { Err(Problem::AskedTooEarly) } else { Ok(NixlLibrary(())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_copies_are_found_in_any_folder() {
        let maps = "7f00-7f01 r--p 00000000 00:00 7 /opt/my wheel/.nixl_cu12.mesonpy.libs/libnixl.so\n\
                    7f01-7f02 r-xp 00001000 00:00 7 /opt/my wheel/.nixl_cu12.mesonpy.libs/libnixl.so\n\
                    7f02-7f03 r--p 00000000 00:00 8 /opt/other/libnixl_common.so\n\
                    7f03-7f04 rw-p 00000000 00:00 0\n\
                    7f04-7f05 rw-p 00000000 00:00 0 [heap]\n";
        let folders: Vec<PathBuf> = beside_mapped(maps).into_iter().collect();
        assert_eq!(folders, [PathBuf::from("/opt/my wheel/.nixl_cu12.mesonpy.libs")]);
    }

    #[test]
    fn places_come_in_the_documented_order_and_never_open_the_program() {
        let candidates = [Path::new(""), Path::new("relative.so"), Path::new("/")];
        let places = places(&candidates, Some("/v.so".into()));
        let origins: Vec<Origin> = places.iter().map(|place| place.0).collect();
        assert_eq!(
            origins,
            [Origin::Variable, Origin::Candidate, Origin::Candidate, Origin::Loader]
        );
        assert!(places[1].1.is_absolute());
        assert_eq!(places[2].1, Path::new("/libnixl_capi.so"));
        assert_eq!(super::places(&[], Some("".into())).len(), 1);
    }
}
