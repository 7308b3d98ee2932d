//! States as a chain of files, `0`, `1`, `2` …, of which the last is what holds.
//!
//! A write reads the last state, changes it and links the result under the next number. A link is made by one process only,
//! so the chain is one order of all writes, and nobody holds a lock that a stopped process could keep.
//!
//! Old states are deleted, in ascending order. Whoever lags behind must not take a hole for the end, nor fill it: so
//! every look at `n + 1` is followed by one that `n`, the very file, is still there. If it is, `n + 1` was never deleted
//! before, and what was seen there is true.

use std::collections::BTreeSet;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::state::{MAX_STATE_BYTES, State};
use crate::random::random;
use crate::rendezvous::RendezvousError;

/// How many states stay. A process that slept through more of them looks for the end anew.
const KEPT: u64 = 256;

/// How many states there are at most before some go, above those that stay.
const SURPLUS: u64 = 64;

/// What a process that died while it wrote left behind is deleted when it is so much older than the last state, by the
/// clock of the file system, which made both times.
const LEFTOVER_SECONDS: i64 = 600;

/// After so many steps it is shorter to look for the end.
const STEPS: usize = 8;

#[derive(Debug)]
pub(super) struct Chain {
    root: PathBuf,
    patience: Duration,
}

/// A state that was the last when it was looked at.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) number: u64,
    pub(super) state: Arc<State>,
    file: Identity,
}

/// Tells a file from a later one of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    seconds: i64,
    nanos: i64,
    bytes: u64,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            seconds: metadata.mtime(),
            nanos: metadata.mtime_nsec(),
            bytes: metadata.len(),
        }
    }
}

impl Chain {
    /// The chain in `root`, begun if it is not there.
    pub(super) fn open(root: &Path, patience: Duration) -> Result<(Self, Head), RendezvousError> {
        let chain = Self { root: root.to_path_buf(), patience };
        for folder in [root.to_path_buf(), chain.drafts(), chain.folder("values"), chain.sessions()]
        {
            fs::create_dir_all(&folder).map_err(|error| failed("create", &folder, error))?;
        }
        // Whole with its first state, so that a state `0` is never made a second time.
        let states = chain.folder("states");
        if !states.exists() {
            let draft = chain.draft()?;
            let first = draft.join("0");
            let bytes = State::default().encode(&first)?;
            fs::create_dir(&draft)
                .and_then(|()| fs::write(&first, &bytes))
                .map_err(|error| failed("write", &first, error))?;
            if let Err(error) = fs::rename(&draft, &states) {
                let _ = fs::remove_dir_all(&draft);
                if !states.exists() {
                    return Err(failed("create", &states, error));
                }
            }
        }
        let head = chain.search()?;
        Ok((chain, head))
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn drafts(&self) -> PathBuf {
        self.folder("drafts")
    }

    fn draft(&self) -> Result<PathBuf, RendezvousError> {
        let id = random().map_err(|error| failed("read", Path::new("/dev/urandom"), error))?;
        Ok(self.drafts().join(format!("{id:032x}")))
    }

    /// Where heartbeats are.
    pub(super) fn sessions(&self) -> PathBuf {
        self.folder("sessions")
    }

    fn state(&self, number: u64) -> PathBuf {
        self.root.join("states").join(number.to_string())
    }

    fn value(&self, id: u128) -> PathBuf {
        self.root.join("values").join(format!("{id:032x}"))
    }

    /// The last state, found from one that was.
    pub(super) fn last(&self, mut head: Head) -> Result<Head, RendezvousError> {
        for _ in 0..STEPS {
            let next = self.read(head.number.saturating_add(1))?;
            // Looked at only now, or a hole would be taken for the end.
            if !self.is_there(&head)? {
                return self.search();
            }
            match next {
                Some(next) => head = next,
                None => return Ok(head),
            }
        }
        self.search()
    }

    /// The last state, found among all.
    fn search(&self) -> Result<Head, RendezvousError> {
        let started = Instant::now();
        loop {
            let numbers = self.numbers()?;
            // Where two follow each other neither fills a hole, since of those that stay none is deleted.
            let last = numbers.last().filter(|last| {
                **last == 0 || last.checked_sub(1).is_some_and(|before| numbers.contains(&before))
            });
            if let Some(last) = last
                && let Some(mut head) = self.read(*last)?
            {
                loop {
                    let next = self.read(head.number.saturating_add(1))?;
                    if !self.is_there(&head)? {
                        break;
                    }
                    let Some(next) = next else { return Ok(head) };
                    head = next;
                }
            }
            self.check_patience(started, "read")?;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The numbers of all states there are.
    fn numbers(&self) -> Result<BTreeSet<u64>, RendezvousError> {
        let folder = self.folder("states");
        let read = |error| failed("read", &folder, error);
        let mut numbers = BTreeSet::new();
        for entry in fs::read_dir(&folder).map_err(read)? {
            let name = entry.map_err(read)?.file_name();
            numbers.extend(name.to_str().and_then(|name| name.parse::<u64>().ok()));
        }
        Ok(numbers)
    }

    fn is_there(&self, head: &Head) -> Result<bool, RendezvousError> {
        let path = self.state(head.number);
        match fs::metadata(&path) {
            Ok(metadata) => Ok(Identity::of(&metadata) == head.file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed("read", &path, error)),
        }
    }

    fn read(&self, number: u64) -> Result<Option<Head>, RendezvousError> {
        let path = self.state(number);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", &path, error)),
        };
        let read = |error| failed("read", &path, error);
        let metadata = file.metadata().map_err(read)?;
        if metadata.len() > MAX_STATE_BYTES {
            return Err(RendezvousError::Damaged { path, why: "it is too large" });
        }
        let mut bytes = Vec::new();
        (&mut file).take(metadata.len()).read_to_end(&mut bytes).map_err(read)?;
        let state = Arc::new(State::decode(&bytes, &path)?);
        Ok(Some(Head { number, state, file: Identity::of(&metadata) }))
    }

    /// Adds what `edit` makes of the last state and of the number that this will have, or nothing when it makes nothing;
    /// it is asked again whenever another process was first. Gives the state that holds then.
    pub(super) fn write(
        &self,
        mut head: Head,
        action: &'static str,
        mut edit: impl FnMut(&State, u64) -> Result<Option<State>, RendezvousError>,
    ) -> Result<Head, RendezvousError> {
        let started = Instant::now();
        loop {
            head = self.last(head)?;
            let number = head.number.saturating_add(1);
            let Some(state) = edit(&head.state, number)? else { return Ok(head) };
            let path = self.state(number);
            let draft = self.draft()?;
            let bytes = state.encode(&path)?;
            let file = write_new(&draft, &bytes).map_err(|error| failed("write", &draft, error))?;
            let linked = match fs::hard_link(&draft, &path) {
                Ok(()) => true,
                // Where the answer of a file server was lost, the second try finds what the first has made.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    fs::metadata(&draft).is_ok_and(|metadata| metadata.nlink() > 1)
                }
                // Stopped for so long that the draft was taken for a dead process's.
                Err(error) if error.kind() == io::ErrorKind::NotFound && !draft.exists() => false,
                Err(error) => {
                    let _ = fs::remove_file(&draft);
                    return Err(failed("create", &path, error));
                }
            };
            let _ = fs::remove_file(&draft);
            if linked {
                if !self.is_there(&head)? {
                    return Err(RendezvousError::Unknown { store: super::STORE, action });
                }
                if number.is_multiple_of(SURPLUS) {
                    self.forget(number, file);
                }
                return Ok(Head { number, state: Arc::new(state), file });
            }
            self.check_patience(started, action)?;
        }
    }

    fn check_patience(
        &self,
        started: Instant,
        action: &'static str,
    ) -> Result<(), RendezvousError> {
        let waited = started.elapsed();
        if waited > self.patience {
            return Err(RendezvousError::Busy { store: super::STORE, action, waited });
        }
        Ok(())
    }

    /// Deletes what nobody needs any more. What fails here is tried again by whoever writes later.
    fn forget(&self, last: u64, newest: Identity) {
        let Ok(numbers) = self.numbers() else { return };
        for number in numbers.range(..last.saturating_sub(KEPT)) {
            // Values never come back, so nothing later than the next state can want them.
            if let (Ok(Some(old)), Ok(Some(next))) =
                (self.read(*number), self.read(number.saturating_add(1)))
            {
                let wanted: BTreeSet<u128> = next.state.files().collect();
                for id in old.state.files().filter(|id| !wanted.contains(id)) {
                    let _ = fs::remove_file(self.value(id));
                }
            }
            // In ascending order and with no gap: readers rely on it.
            match fs::remove_file(self.state(*number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(state = number, %error, "an old state cannot be deleted");
                    return;
                }
                _ => {}
            }
        }
        for entry in fs::read_dir(self.drafts()).into_iter().flatten().flatten() {
            let old = entry.metadata().is_ok_and(|metadata| {
                newest.seconds.saturating_sub(metadata.mtime()) > LEFTOVER_SECONDS
            });
            if old {
                let _ = fs::remove_file(entry.path()).or_else(|_| fs::remove_dir_all(entry.path()));
            }
        }
    }

    /// Writes a larger value and gives its name. It is a draft until [`keep`](Self::keep).
    pub(super) fn put_value(&self, value: &[u8]) -> Result<DraftValue<'_>, RendezvousError> {
        let draft = self.draft()?;
        write_new(&draft, value).map_err(|error| failed("write", &draft, error))?;
        let id = random().map_err(|error| failed("read", Path::new("/dev/urandom"), error))?;
        let path = self.value(id);
        fs::rename(&draft, &path).map_err(|error| failed("rename to", &path, error))?;
        Ok(DraftValue { chain: self, id, kept: false })
    }

    /// A larger value, or none when a later state has let it go.
    pub(super) fn get_value(
        &self,
        id: u128,
        bytes: u64,
    ) -> Result<Option<Vec<u8>>, RendezvousError> {
        let path = self.value(id);
        match fs::read(&path) {
            Ok(value) if value.len() as u64 == bytes => Ok(Some(value)),
            Ok(_) => Err(RendezvousError::Damaged { path, why: "it has another size than it had" }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed("read", &path, error)),
        }
    }
}

/// The file of a value, which goes unless a state names it.
#[derive(Debug)]
pub(super) struct DraftValue<'a> {
    chain: &'a Chain,
    pub(super) id: u128,
    kept: bool,
}

impl DraftValue<'_> {
    /// A state names it, or may.
    pub(super) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for DraftValue<'_> {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(self.chain.value(self.id));
        }
    }
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<Identity> {
    let mut file = File::create_new(path)?;
    file.write_all(bytes)?;
    Ok(Identity::of(&file.metadata()?))
}

pub(super) fn failed(action: &'static str, path: &Path, source: io::Error) -> RendezvousError {
    RendezvousError::Io { action, path: path.to_path_buf(), source }
}
