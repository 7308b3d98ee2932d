//! What a sealed rendezvous refuses: P6 and P7 of docs/security.md, as far as the store is concerned.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use refit_service::rendezvous::{
    Created, InProcess, InProcessSession, JobKey, Key, Life, MAX_VALUE_BYTES, Reach, Rendezvous,
    RendezvousError, Revision, SealError, Sealed, SecretError, Snapshot, Writer,
};

fn secret(fill: u8) -> JobKey {
    JobKey::from_secret(&[fill; 32]).unwrap()
}

fn key(path: &str) -> Key {
    Key::new(path.split('/')).unwrap()
}

fn sealed(store: &InProcess, job: &str, incarnation: u128, fill: Option<u8>) -> Sealed<InProcess> {
    let writer = Writer::new(job, "trainer-0", incarnation).unwrap();
    Sealed::new(store.clone(), writer, fill.map(secret)).unwrap()
}

/// What lies in the store as it is.
fn raw(store: &InProcess, at: &Key) -> Vec<u8> {
    store.list(at).unwrap().entries.remove(at).unwrap()
}

fn lay(store: &InProcess, at: &Key, value: &[u8]) {
    store.put(at, value, Life::Kept).unwrap();
}

/// The one entry at a key, or why it is refused.
fn read<R: Rendezvous>(store: &R, at: &Key) -> Result<Vec<u8>, SealError> {
    let Snapshot { mut entries, mut refused, .. } = store.list(at).unwrap();
    match (entries.remove(at), refused.remove(at)) {
        (Some(value), None) => Ok(value),
        (None, Some(error)) => Err(error),
        other => panic!("{at}: {other:?}"),
    }
}

#[test]
fn values_come_back_and_sessions_keep_them() {
    for fill in [None, Some(7)] {
        let store = InProcess::new();
        let (writer, reader) = (sealed(&store, "job", 1, fill), sealed(&store, "job", 2, fill));
        let at = key("m/group/a/member/0");
        let session = writer.session(Duration::from_secs(1)).unwrap();
        for value in [&b""[..], b"one", &[7; 5000]] {
            writer.put(&at, value, Life::Session(&session)).unwrap();
            assert_eq!(read(&reader, &at).unwrap(), value);
            assert_eq!(read(&writer, &at).unwrap(), value);
            assert_ne!(raw(&store, &at), value);
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        let found = reader.changed(&key("m"), Revision(0), deadline).unwrap().unwrap();
        assert_eq!((found.entries.len(), found.refused.len()), (1, 0));
        let decision = key("m/replica/r/decision/1");
        assert_eq!(reader.create(&decision, b"commit", Life::Kept).unwrap(), Created::New);
        let already = writer.create(&decision, b"abort", Life::Kept).unwrap();
        assert_eq!(already, Created::Already(b"commit".to_vec()));
        drop(session);
        assert!(!reader.list(&key("m")).unwrap().entries.contains_key(&at));
        reader.remove(&decision).unwrap();
        assert_eq!(reader.list(&key("m")).unwrap().entries.len(), 0);
    }
}

#[test]
fn p6_what_was_changed_moved_or_sealed_by_others_is_refused_by_name() {
    let store = InProcess::new();
    let (ours, at) = (sealed(&store, "job", 1, Some(7)), key("m/a"));
    let reader = sealed(&store, "job", 9, Some(7));
    ours.put(&at, b"value", Life::Kept).unwrap();
    let right = raw(&store, &at);

    let mut changed = right.clone();
    let middle = changed.len() - 34;
    changed[middle] ^= 1;
    lay(&store, &at, &changed);
    assert_eq!(read(&reader, &at), Err(SealError::Forged));

    let elsewhere = key("m/b");
    lay(&store, &elsewhere, &right);
    assert_eq!(read(&reader, &elsewhere), Err(SealError::Moved { found: "m/a".into() }));

    sealed(&store, "job", 2, Some(8)).put(&at, b"value", Life::Kept).unwrap();
    assert_eq!(read(&reader, &at), Err(SealError::Forged));
    let other = SealError::OtherJob { found: "other".into(), job: "job".into() };
    for fill in [7, 8] {
        sealed(&store, "other", 2, Some(fill)).put(&at, b"value", Life::Kept).unwrap();
        assert_eq!(read(&reader, &at), Err(other.clone()), "key {fill}");
    }
    sealed(&store, "job", 2, None).put(&at, b"value", Life::Kept).unwrap();
    assert_eq!(read(&reader, &at), Err(SealError::Keyless));
    assert_eq!(read(&sealed(&store, "job", 3, None), &at).unwrap(), b"value");
    lay(&store, &at, &right);
    assert_eq!(read(&sealed(&store, "job", 3, None), &at), Err(SealError::Keyed));
    for junk in [&b""[..], b"refit\0s", b"refit\0se", b"refit\0se\x01", &right[..40], &[0; 300]] {
        lay(&store, &at, junk);
        assert!(read(&reader, &at).is_err(), "{junk:?}");
    }
    lay(&store, &at, b"somebody's");
    assert_eq!(read(&reader, &at), Err(SealError::NotSealed { bytes: 10 }));
    let mut newer = right.clone();
    newer[8] = 2;
    lay(&store, &at, &newer);
    assert_eq!(read(&reader, &at), Err(SealError::Format { found: 2, expected: 1 }));

    // What is there and bad cannot be created over, and is not taken for the answer.
    let error = reader.create(&at, b"mine", Life::Kept).unwrap_err();
    assert!(matches!(&error, RendezvousError::Seal { key, .. } if *key == at), "{error}");
}

#[test]
fn damage_and_mixed_up_jobs_are_found_without_a_key() {
    let store = InProcess::new();
    let (ours, at) = (sealed(&store, "job", 1, None), key("m/a"));
    ours.put(&at, b"value", Life::Kept).unwrap();
    let mut damaged = raw(&store, &at);
    let middle = damaged.len() - 34;
    damaged[middle] ^= 1;
    lay(&store, &at, &damaged);
    assert_eq!(read(&ours, &at), Err(SealError::Damaged));
    sealed(&store, "other", 2, None).put(&at, b"value", Life::Kept).unwrap();
    assert!(matches!(read(&ours, &at), Err(SealError::OtherJob { .. })));
}

#[test]
fn p7_old_values_that_are_put_back_are_refused() {
    let store = InProcess::new();
    let at = key("m/group/a/member/0");
    let reader = sealed(&store, "job", 9, Some(7));
    let first = sealed(&store, "job", 1, Some(7));
    first.put(&at, b"one", Life::Kept).unwrap();
    let one = raw(&store, &at);
    assert_eq!(read(&reader, &at).unwrap(), b"one");
    // The same value may be read and laid any number of times.
    lay(&store, &at, &one);
    assert_eq!(read(&reader, &at).unwrap(), b"one");
    first.put(&at, b"two", Life::Kept).unwrap();
    let two = raw(&store, &at);
    assert_eq!(read(&reader, &at).unwrap(), b"two");
    let replayed = |sequence, newest| {
        let (writer, incarnation) = ("trainer-0".into(), 1);
        Err(SealError::Replayed { writer, incarnation, sequence, newest })
    };
    lay(&store, &at, &one);
    assert_eq!(read(&reader, &at), replayed(1, 2));
    // Removing it in between changes nothing.
    store.remove(&at).unwrap();
    lay(&store, &at, &one);
    assert_eq!(read(&reader, &at), replayed(1, 2));

    // The process restarts: what its earlier life wrote last is old as well.
    let second = sealed(&store, "job", 2, Some(7));
    second.put(&at, b"restarted", Life::Kept).unwrap();
    assert_eq!(read(&reader, &at).unwrap(), b"restarted");
    lay(&store, &at, &two);
    assert_eq!(read(&reader, &at), replayed(2, 2));
    let error = reader.create(&at, b"mine", Life::Kept).unwrap_err();
    assert!(matches!(error, RendezvousError::Seal { source: SealError::Replayed { .. }, .. }));
    // What was never read before cannot be known to be old.
    assert_eq!(read(&sealed(&store, "job", 10, Some(7)), &at).unwrap(), b"two");

    // Two processes that take one incarnation are in each other's way, and it is said.
    let twin = sealed(&store, "job", 2, Some(7));
    twin.put(&at, b"twin", Life::Kept).unwrap();
    assert!(matches!(read(&reader, &at), Err(SealError::Replayed { incarnation: 2, .. })));
}

/// A decision is created by any rank of a replica, and again for the next attempt.
#[test]
fn several_processes_may_write_one_key_in_turns() {
    let store = InProcess::new();
    let at = key("m/replica/r/decision/1");
    let reader = sealed(&store, "job", 9, Some(7));
    let writers = [1, 2, 3].map(|incarnation| sealed(&store, "job", incarnation, Some(7)));
    for turn in 0..12_u8 {
        let writer = &writers[usize::from(turn) % 3];
        assert_eq!(writer.create(&at, &[turn], Life::Kept).unwrap(), Created::New);
        assert_eq!(read(&reader, &at).unwrap(), [turn]);
        writer.remove(&at).unwrap();
    }
}

#[test]
fn one_bad_entry_does_not_stop_the_others() {
    let store = InProcess::new();
    let ours = sealed(&store, "job", 1, Some(7));
    for rank in 0..4 {
        ours.put(&key(&format!("m/member/{rank}")), b"here", Life::Kept).unwrap();
    }
    lay(&store, &key("m/member/2"), b"nonsense");
    let found = ours.list(&key("m")).unwrap();
    assert_eq!(found.entries.len(), 3);
    let refused: Vec<&Key> = found.refused.keys().collect();
    assert_eq!(refused, [&key("m/member/2")]);
}

/// Threads that write and read one key: values are numbered as they are written, and what a slow reader brings home late
/// is not taken for something put back.
#[test]
fn nothing_honest_is_taken_for_a_replay() {
    let store = InProcess::new();
    let at = key("m/a");
    let (writer, reader) = (sealed(&store, "job", 1, Some(7)), sealed(&store, "job", 2, Some(7)));
    writer.put(&at, b"0", Life::Kept).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut reads = 0_u64;
                    while !done.load(Ordering::Relaxed) {
                        read(&reader, &at).unwrap();
                        reads += 1;
                    }
                    reads
                })
            })
            .collect();
        let writers: Vec<_> = (0..4)
            .map(|thread| {
                let (writer, at) = (&writer, &at);
                scope.spawn(move || {
                    for value in 0..2_000_u64 {
                        let value = (value * 4 + thread).to_le_bytes();
                        writer.put(at, &value, Life::Kept).unwrap();
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
        assert!(readers.into_iter().map(|reader| reader.join().unwrap()).sum::<u64>() > 0);
    });
}

/// A store that says that others reach it.
#[derive(Debug)]
struct Remote(InProcess);

impl Rendezvous for Remote {
    type Session = InProcessSession;

    fn store(&self) -> &'static str {
        "remote"
    }

    fn session(&self, ttl: Duration) -> Result<InProcessSession, RendezvousError> {
        self.0.session(ttl)
    }

    fn put(
        &self,
        at: &Key,
        value: &[u8],
        life: Life<'_, InProcessSession>,
    ) -> Result<(), RendezvousError> {
        self.0.put(at, value, life)
    }

    fn create(
        &self,
        at: &Key,
        value: &[u8],
        life: Life<'_, InProcessSession>,
    ) -> Result<Created, RendezvousError> {
        self.0.create(at, value, life)
    }

    fn remove(&self, at: &Key) -> Result<(), RendezvousError> {
        self.0.remove(at)
    }

    fn list(&self, prefix: &Key) -> Result<Snapshot, RendezvousError> {
        self.0.list(prefix)
    }

    fn changed(
        &self,
        prefix: &Key,
        since: Revision,
        deadline: Instant,
    ) -> Result<Option<Snapshot>, RendezvousError> {
        self.0.changed(prefix, since, deadline)
    }
}

#[test]
fn a_store_beyond_this_host_needs_a_key() {
    assert_eq!(
        Remote(InProcess::new()).reach(),
        Reach::Network,
        "what does not say is taken for it"
    );
    let writer = Writer::new("job", "trainer-0", 1).unwrap();
    let refused = Sealed::new(Remote(InProcess::new()), writer.clone(), None).unwrap_err();
    assert!(matches!(refused, RendezvousError::KeyRequired { store: "remote" }));
    let sealed = Sealed::new(Remote(InProcess::new()), writer, Some(secret(7))).unwrap();
    sealed.put(&key("a"), b"b", Life::Kept).unwrap();
    assert_eq!(read(&sealed, &key("a")).unwrap(), b"b");
}

#[test]
fn p7_names_that_could_be_taken_for_others_are_refused() {
    let long = "a".repeat(256);
    for name in ["", "a\0", "a b", "a/b", "caf\u{e9}", "a\u{202e}b", long.as_str()] {
        for (job, writer) in [(name, "w"), ("j", name)] {
            let error = Writer::new(job, writer, 1).unwrap_err();
            assert!(matches!(error, RendezvousError::Name { .. }), "{name:?}");
            let text = error.to_string();
            assert!(
                !text.contains('\0') && !text.contains('\u{202e}') && text.len() < 300,
                "{text}"
            );
        }
    }
}

#[test]
fn values_have_room_for_their_seal() {
    let store = InProcess::new();
    let ours = sealed(&store, "job", 1, None);
    let error = ours.put(&key("a"), &vec![0; MAX_VALUE_BYTES], Life::Kept).unwrap_err();
    assert!(matches!(error, RendezvousError::TooLarge { bytes: MAX_VALUE_BYTES, .. }));
}

/// A file with these bytes and this mode.
fn file(folder: &tempfile::TempDir, bytes: &[u8], mode: u32) -> PathBuf {
    let path = folder.path().join(format!("key-{mode:o}-{}", bytes.len()));
    std::fs::write(&path, bytes).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    path
}

#[test]
fn keys_come_from_files_that_others_cannot_read() {
    let folder = tempfile::tempdir().unwrap();
    let text = "0123456789abcdef".repeat(4);
    let loaded = JobKey::from_file(&file(&folder, format!("{text}\n").as_bytes(), 0o600)).unwrap();
    // White space around it is not part of it.
    let store = InProcess::new();
    let writer = |incarnation| Writer::new("job", "w", incarnation).unwrap();
    let ours = Sealed::new(store.clone(), writer(1), Some(loaded)).unwrap();
    let given = JobKey::from_secret(format!("  {text}\r\n").as_bytes()).unwrap();
    let theirs = Sealed::new(store, writer(2), Some(given)).unwrap();
    ours.put(&key("a"), b"b", Life::Kept).unwrap();
    assert_eq!(read(&theirs, &key("a")).unwrap(), b"b");

    for mode in [0o604, 0o602, 0o601, 0o620, 0o610, 0o644, 0o666, 0o777] {
        let error = JobKey::from_file(&file(&folder, text.as_bytes(), mode)).unwrap_err();
        assert!(
            matches!(error, SecretError::Exposed { mode: found, .. } if found == mode),
            "{mode:o}"
        );
        assert!(error.to_string().contains("chmod 600") && !error.to_string().contains(&text));
    }
    for len in [0, 31, 4097, 9000] {
        let error = JobKey::from_file(&file(&folder, &vec![b'k'; len], 0o600)).unwrap_err();
        assert!(
            matches!(error, SecretError::Length { bytes } if bytes == len.min(4097)),
            "{error}"
        );
    }
    assert!(matches!(JobKey::from_file(folder.path()), Err(SecretError::Io { .. })));
    assert!(matches!(JobKey::from_file(&folder.path().join("none")), Err(SecretError::Io { .. })));
    // The file behind a link counts, as secrets are mounted.
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(file(&folder, text.as_bytes(), 0o666), &link).unwrap();
    assert!(matches!(JobKey::from_file(&link), Err(SecretError::Exposed { .. })));
}

#[test]
fn keys_come_from_the_environment() {
    for variable in ["REFIT_NO_SUCH_VARIABLE", "", "a=b", "a\0b"] {
        assert!(matches!(JobKey::from_env(variable), Err(SecretError::NoVariable { .. })));
    }
    // A variable that is there, and too short for a key.
    assert!(matches!(JobKey::from_env("CARGO_PKG_VERSION"), Err(SecretError::Length { bytes: 5 })));
    // A file wins, and nothing is a key but what is said to be one.
    let none = Path::new("/nonexistent/key");
    assert!(matches!(JobKey::from_file_or_env(Some(none)), Err(SecretError::Io { .. })));
    assert!(JobKey::from_file_or_env(None).unwrap().is_none());
}

#[test]
fn no_text_shows_a_key() {
    let text = "do not show this to anybody at all";
    let key_of_it = JobKey::from_secret(text.as_bytes()).unwrap();
    let writer = Writer::new("job", "w", 1).unwrap();
    let sealed = Sealed::new(InProcess::new(), writer, Some(key_of_it.clone())).unwrap();
    for shown in [format!("{key_of_it:?}"), format!("{sealed:?}"), format!("{sealed:#?}")] {
        assert!(shown.contains("JobKey(..)") && !shown.contains("show this"), "{shown}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever others do to the entries, what is read is what was written there last, or refused by name.
    #[test]
    fn p6_nothing_is_read_that_was_not_written(
        steps in prop::collection::vec((0..5_u8, 0..3_u8, any::<prop::sample::Index>(), 0..8_u8), 1..40),
    ) {
        let store = InProcess::new();
        let at = |place: u8| key(&format!("m/{place}"));
        let mut writers: Vec<_> = (0..3).map(|writer| sealed(&store, "job", writer, Some(7))).collect();
        let reader = sealed(&store, "job", 99, Some(7));
        // By place: everything written, oldest first, and how far the reader has come.
        let mut written: [Vec<Vec<u8>>; 3] = Default::default();
        let mut raws: Vec<Vec<u8>> = Vec::new();
        let (mut newest, mut lives) = ([0_usize; 3], 3);
        for (step, (what, place, index, bit)) in steps.into_iter().enumerate() {
            match what {
                0 | 1 => {
                    let value = vec![u8::try_from(step).unwrap(); 1 + step % 3];
                    let writer = index.index(writers.len());
                    writers[writer].put(&at(place), &value, Life::Kept).unwrap();
                    written[usize::from(place)].push(value);
                    raws.push(raw(&store, &at(place)));
                }
                // Puts something that was written, somewhere.
                2 if !raws.is_empty() => lay(&store, &at(place), &raws[index.index(raws.len())]),
                3 if !raws.is_empty() => {
                    let mut changed = raws[index.index(raws.len())].clone();
                    let byte = index.index(changed.len());
                    changed[byte] ^= 1 << bit;
                    lay(&store, &at(place), &changed);
                }
                // As many lives as are remembered of one key.
                4 if lives < 8 => {
                    lives += 1;
                    writers[index.index(3)] = sealed(&store, "job", 100 + step as u128, Some(7));
                }
                _ => {}
            }
            for place in 0..3_u8 {
                let found = reader.list(&at(place)).unwrap();
                let Some(value) = found.entries.get(&at(place)) else { continue };
                let place = usize::from(place);
                let position = written[place].iter().position(|known| known == value);
                let position = position.expect("a value that nobody wrote here");
                prop_assert!(position >= newest[place], "an older value than was read before");
                newest[place] = position;
            }
        }
    }
}
