//! The key that all processes of a job share.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use zeroize::Zeroizing;

/// What a seal is made with. Another use of the same secret must derive with another text.
const DERIVE: &[u8] = b"refit-service seal v1";

/// Fewest bytes of a secret: 256 bits, in whatever way they are written.
const FEWEST: usize = 32;

/// Most bytes of a secret, with what surrounds it.
const MOST: usize = 4096;

/// The variable of the environment that holds the key of a job whose processes are told of no file.
const VARIABLE: &str = "REFIT_JOB_KEY";

/// The key that all processes of a job share, and nobody else has.
///
/// It never appears in text: not in `Debug`, not in an error. There is no way to take one from an argument of a command
/// line, where every user of the host could read it.
#[derive(Clone)]
pub struct JobKey(Hmac<Sha256>);

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SecretError {
    /// The file could not be read.
    #[error("the job's key cannot be read from {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others than its owner may read or write the file.
    #[error(
        "{path}, which holds the job's key, belongs to user {owner} and has mode {mode:o}: it must be this user's and \
         nobody else's (`chmod 600`), or root's and at most readable by a group (`chmod 640`)"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
        /// Who may do what.
        mode: u32,
    },
    /// The environment has no such variable.
    #[error("the environment has no {variable}, which was to hold the job's key")]
    NoVariable {
        /// The variable.
        variable: String,
    },
    /// Too few bytes to be a key, or too many.
    #[error(
        "the job's key has {bytes} bytes, {FEWEST} to {MOST} are taken; `openssl rand -hex 32` makes a good one"
    )]
    Length {
        /// Bytes without the white space around them; of a file that is too long, at least as many.
        bytes: usize,
    },
}

impl JobKey {
    /// The key in this file; without one, the key in the variable `REFIT_JOB_KEY`, and none where there is no such variable.
    ///
    /// # Errors
    /// [`SecretError`].
    pub fn from_file_or_env(path: Option<&Path>) -> Result<Option<Self>, SecretError> {
        match path {
            Some(path) => Self::from_file(path).map(Some),
            None if std::env::var_os(VARIABLE).is_some() => Self::from_env(VARIABLE).map(Some),
            None => Ok(None),
        }
    }

    /// The key in this file: all of it but white space at its ends.
    ///
    /// The file must be this user's and accessible to nobody else, or root's and at most readable by a group, as a
    /// secret that is mounted into a container.
    ///
    /// # Errors
    /// [`SecretError`].
    pub fn from_file(path: &Path) -> Result<Self, SecretError> {
        let error = |source| SecretError::Io { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(error)?;
        // Of what is open, not of the name, which may be another file by now.
        let metadata = file.metadata().map_err(error)?;
        if !metadata.is_file() {
            return Err(error(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file")));
        }
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        let others = if owner == 0 { 0o037 } else { 0o077 };
        let ours = owner == 0 || owner == rustix::process::geteuid().as_raw();
        if !ours || mode & others != 0 {
            return Err(SecretError::Exposed { path: path.to_path_buf(), owner, mode });
        }
        // Never grows, so no copy of the secret is left behind.
        let mut secret = Zeroizing::new(vec![0; MOST + 1]);
        let mut len = 0;
        while len < secret.len() {
            match (&file).read(&mut secret[len..]) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(again) if again.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(error(source)),
            }
        }
        Self::from_secret(&secret[..len])
    }

    /// The key in this variable of the environment, which other processes of the same user can read as well.
    ///
    /// # Errors
    /// [`SecretError`].
    pub fn from_env(variable: &str) -> Result<Self, SecretError> {
        let missing = || SecretError::NoVariable { variable: variable.escape_debug().to_string() };
        // The standard library panics on what cannot be a name.
        if variable.is_empty() || variable.contains(['=', '\0']) {
            return Err(missing());
        }
        let secret = std::env::var_os(variable).ok_or_else(missing)?;
        Self::from_secret(&Zeroizing::new(secret.into_vec()))
    }

    /// The key made from these bytes without the white space at their ends.
    ///
    /// # Errors
    /// [`SecretError::Length`].
    pub fn from_secret(secret: &[u8]) -> Result<Self, SecretError> {
        let secret = secret.trim_ascii();
        if !(FEWEST..=MOST).contains(&secret.len()) {
            return Err(SecretError::Length { bytes: secret.len() });
        }
        let derived = Zeroizing::new(<[u8; 32]>::from(
            keyed(secret).chain_update(DERIVE).finalize().into_bytes(),
        ));
        Ok(Self(keyed(derived.as_slice())))
    }

    /// A MAC that has been given nothing yet.
    pub(super) fn mac(&self) -> Hmac<Sha256> {
        self.0.clone()
    }
}

/// HMAC takes keys of every length.
fn keyed(key: &[u8]) -> Hmac<Sha256> {
    match Hmac::new_from_slice(key) {
        Ok(mac) => mac,
        Err(never) => unreachable!("{never}"),
    }
}

impl std::fmt::Debug for JobKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JobKey(..)")
    }
}
