//! Compiles the kernel to PTX, which is kept in the repository: users need neither a toolkit nor NVRTC.
//!
//! The first lines of the PTX say what it was made of and how, and have digests of the source and of all that follows:
//! `cargo xtask tidy` compares those, and needs no compiler for it.

use std::{env, fmt::Write, fs, path::Path, process::Command};

use crate::{failure::Failure, setup};

/// What is compiled.
pub(crate) const SOURCE: &str = "crates/kernels/src/move.cu";

/// What comes out.
pub(crate) const PTX: &str = "crates/kernels/src/move.ptx";

/// The oldest devices that are served; and arithmetic as it is written, which is what the kernel promises.
const OPTIONS: [&str; 3] = ["--gpu-architecture=compute_80", "--std=c++14", "--fmad=false"];

/// Compiles standard input; arguments are the library, the name of the source and options. Status 2 is the source's fault.
const COMPILE: &str = "
import ctypes, sys

library, name, options = sys.argv[1], sys.argv[2].encode(), [o.encode() for o in sys.argv[3:]]
nvrtc = ctypes.CDLL(library)
program, size = ctypes.c_void_p(), ctypes.c_size_t()

def call(function, *arguments):
    code = getattr(nvrtc, function)(*arguments)
    if code != 0:
        sys.exit(f'{function} answered {code}')

def text(what):
    call(f'nvrtcGet{what}Size', program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    call(f'nvrtcGet{what}', program, buffer)
    return buffer.value

call('nvrtcCreateProgram', ctypes.byref(program), sys.stdin.buffer.read(), name, 0, None, None)
code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
sys.stderr.buffer.write(text('ProgramLog'))
if code != 0:
    sys.exit(2)
sys.stdout.buffer.write(text('PTX'))
";

/// Compiles the kernel; with `check`, only says whether that would change anything.
pub(crate) fn run(root: &Path, check: bool) -> Result<(), Failure> {
    let read = |file: &str| {
        fs::read_to_string(root.join(file))
            .map_err(|error| Failure::new(format!("{file}: {error}")))
    };
    let source = read(SOURCE)?;
    let made = with_head(&source, &compile(root, &source)?);
    if read(PTX).is_ok_and(|kept| kept == made) {
        println!("ptx: {PTX} is what {} makes of {SOURCE}", setup::NVRTC);
        return Ok(());
    }
    if check {
        return Err(Failure::new(format!(
            "ptx: {PTX} is not what {} makes of {SOURCE}; run `cargo xtask ptx` and commit what it writes",
            setup::NVRTC
        )));
    }
    fs::write(root.join(PTX), made).map_err(|error| Failure::new(format!("{PTX}: {error}")))?;
    println!("ptx: {PTX} is written");
    Ok(())
}

/// As `run` with `check`, where the compiler can be had.
pub(crate) fn check_where_possible(root: &Path) -> Result<(), Failure> {
    if setup::NVRTC.is_for(env::consts::ARCH) {
        return run(root, true);
    }
    println!(
        "ptx: not compiled, since there is no {} for {}; tidy has compared the digests",
        setup::NVRTC,
        env::consts::ARCH
    );
    Ok(())
}

/// Why the PTX is not what was made of the source, if that shows without compiling.
pub(crate) fn mismatch(source: &str, ptx: &str) -> Option<&'static str> {
    let length = head(source, "").len();
    let (Some(found), Some(body)) = (ptx.get(..length), ptx.get(length..)) else {
        return Some("has no head as `cargo xtask ptx` writes it");
    };
    let expected = head(source, body);
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let (found, expected) = (lines(found), lines(&expected));
    let differs = found.iter().zip(&expected).position(|(found, expected)| found != expected);
    match differs {
        None if found.len() == expected.len() => None,
        Some(2) => Some("was made of another move.cu"),
        Some(3) => Some("was changed after it was made"),
        _ => Some("was made by another compiler or with other options"),
    }
}

fn with_head(source: &str, body: &str) -> String {
    let mut ptx = head(source, body);
    ptx.push_str(body);
    ptx
}

/// Its length does not depend on the contents.
fn head(source: &str, body: &str) -> String {
    format!(
        "// Made of move.cu by `cargo xtask ptx`; not to be edited.\n// compiler {} {}\n// source {:016x}\n// body {:016x}\n",
        setup::NVRTC,
        OPTIONS.join(" "),
        digest(source),
        digest(body)
    )
}

/// FNV-1a: it tells apart what was changed by accident.
fn digest(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The PTX as NVRTC writes it, without white space at the ends of lines.
fn compile(root: &Path, source: &str) -> Result<String, Failure> {
    use std::{io::Write as _, process::Stdio};

    let library = setup::fetch(root, &setup::NVRTC)
        .map_err(|why| Failure::new(format!("ptx: NVRTC is not available: {}", why.reason())))?;
    let failed = |error| Failure::new(format!("python3: {error}"));
    let mut child = Command::new("python3")
        .args(["-c", COMPILE])
        .arg(library)
        .arg("move.cu")
        .args(OPTIONS)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    // The script reads everything before it writes anything.
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(source.as_bytes()).map_err(failed)?;
    }
    let output = child.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        return Err(Failure::new(format!("ptx: {SOURCE} was not compiled, see above")));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut ptx = String::with_capacity(text.len());
    for line in text.trim_end().lines() {
        let _ = writeln!(ptx, "{}", line.trim_end());
    }
    Ok(ptx)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_belongs_together_is_told_from_what_does_not() {
        let ptx = with_head("source\n", "body\n");
        assert_eq!(mismatch("source\n", &ptx), None);
        assert_eq!(mismatch("source \n", &ptx), Some("was made of another move.cu"));
        let body = Some("was changed after it was made");
        assert_eq!(mismatch("source\n", &format!("{ptx}//\n")), body);
        assert_eq!(mismatch("source\n", &ptx.replace("body\n", "bod\n")), body);
        let options = Some("was made by another compiler or with other options");
        assert_eq!(mismatch("source\n", &ptx.replace("compute_80", "compute_90")), options);
        for ptx in ["", "body\n", "é"] {
            assert_eq!(
                mismatch("source\n", ptx),
                Some("has no head as `cargo xtask ptx` writes it")
            );
        }
    }

    #[test]
    fn digests_are_those_of_the_standard_test_vectors() {
        assert_eq!(digest(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(digest("a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(digest("foobar"), 0x8594_4171_f739_67e8);
    }
}
