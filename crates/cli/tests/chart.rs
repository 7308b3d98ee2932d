//! Pictures of benches: that those in `docs` show what the files beside them say, and what is said to mistakes.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/bench")
}

fn chart<I: AsRef<OsStr>>(files: impl IntoIterator<Item = I>, out: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_refit"));
    command.arg("chart").args(files).arg("--out").arg(out).output().unwrap()
}

#[test]
fn pictures_show_what_their_files_say() {
    let folder = tempfile::tempdir().unwrap();
    let drawn = folder.path().join("drawn.svg");
    let mut pictures = 0;
    let files = |folder: PathBuf| fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let folders = files(docs()).filter(|path| path.is_dir()).chain([docs()]).collect::<Vec<_>>();
    for path in folders.into_iter().flat_map(files) {
        if path.extension() != Some(OsStr::new("svg")) {
            continue;
        }
        let picture = fs::read_to_string(&path).unwrap();
        let (_, rest) = picture.split_once("Drawn by `refit chart` from ").unwrap();
        let (files, _) = rest.split_once("</desc>").unwrap();
        let output = chart(files.split(", ").map(|file| path.with_file_name(file)), &drawn);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(
            fs::read_to_string(&drawn).unwrap(),
            picture,
            "{} is out of date: cargo xtask chart draws it again",
            path.display()
        );
        pictures += 1;
    }
    assert!(pictures > 0, "no pictures in {}", docs().display());
}

#[test]
fn mistakes_are_one_line_that_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.svg");
    let broken = folder.path().join("broken.json");
    fs::write(&broken, "{\"schema\": 1, \"kind\": \"plan\"}").unwrap();
    let missing = folder.path().join("missing.json");
    for (path, hint) in [(&broken, "of kind `plan`"), (&missing, "cannot read")] {
        let output = chart([path], &out);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(hint) && said.contains(&path.display().to_string()), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!out.exists());
    }
}
