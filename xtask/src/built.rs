//! Programs that cargo built, and where it put them.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::failure::Failure;

/// An executable.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Built {
    /// Whether it is the tests inside of a library: those beside it may have the same name.
    pub(crate) of_library: bool,
    pub(crate) path: PathBuf,
}

/// Runs cargo and lists the executables that it built or found built.
pub(crate) fn executables(root: &Path, mut command: Command) -> Result<Vec<Built>, Failure> {
    command.current_dir(root).args(["--locked", "--message-format", "json-render-diagnostics"]);
    command.stdout(Stdio::piped());
    let output = command
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .map_err(|error| Failure::new(format!("cargo: {error}")))?;
    if !output.status.success() {
        return Err(Failure::child(output.status.code()));
    }
    String::from_utf8_lossy(&output.stdout).lines().filter_map(executable).collect()
}

/// The executable that one of cargo's messages speaks of: JSON on one line, written without spaces.
fn executable(message: &str) -> Option<Result<Built, Failure>> {
    let rest = message.strip_prefix("{\"reason\":\"compiler-artifact\",")?;
    let (_, path) = rest.split_once("\"executable\":\"")?;
    let (path, _) = path.split_once('"')?;
    if path.contains('\\') {
        // An escape: such a path would have to be decoded.
        return Some(Err(Failure::new(format!(
            "{path}: move the workspace to a path without quotes and backslashes"
        ))));
    }
    let of_library = rest.contains("\"kind\":[\"lib\"]");
    Some(Ok(Built { of_library, path: PathBuf::from(path) }))
}

/// `deps/nixl-0123456789abcdef` -> `nixl`
pub(crate) fn plain_name(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    match name.rsplit_once('-') {
        Some((plain, hash)) if hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()) => {
            plain.to_owned()
        }
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_in_cargos_messages() {
        for (kind, of_library) in [("lib", true), ("test", false)] {
            let line = format!(
                r#"{{"reason":"compiler-artifact","target":{{"kind":["{kind}"],"name":"nixl"}},"executable":"/w/deps/nixl-0123456789abcdef","fresh":true}}"#
            );
            let path = PathBuf::from("/w/deps/nixl-0123456789abcdef");
            assert_eq!(executable(&line).unwrap().unwrap(), Built { of_library, path });
        }
        for line in [
            r#"{"reason":"compiler-artifact","executable":null,"fresh":true}"#,
            r#"{"reason":"build-script-executed","executable":"/w/x"}"#,
            "",
        ] {
            assert!(executable(line).is_none(), "{line}");
        }
        assert!(
            executable(r#"{"reason":"compiler-artifact","executable":"/w/a\"b"}"#)
                .unwrap()
                .is_err()
        );
    }

    #[test]
    fn hashes_of_cargo_are_cut_off() {
        assert_eq!(plain_name(Path::new("/w/deps/nixl-0123456789abcdef")), "nixl");
        assert_eq!(plain_name(Path::new("/w/release/examples/rates")), "rates");
        assert_eq!(plain_name(Path::new("/w/a-b")), "a-b");
    }
}
