//! What a directory does besides.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use refit_service::rendezvous::{Directory, Key, Life, Rendezvous, RendezvousError};
use rustix::process::Signal;

use super::peer::Peer;

fn key(path: &str) -> Key {
    Key::try_from(path.to_owned()).unwrap()
}

fn count(folder: &Path) -> usize {
    fs::read_dir(folder).unwrap().count()
}

/// A process that slept through so many changes that all files it knew are gone neither writes nor reads beside the rest.
#[test]
fn who_lags_behind_finds_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let store = Directory::new(folder.path()).unwrap();
    let mut peer = Peer::process(&format!("directory {}", folder.path().display()));
    peer.ask("put a/x 0");
    peer.signal(Signal::STOP);
    for n in 0..700_u32 {
        store.put(&key("b/x"), &n.to_le_bytes(), Life::Kept).unwrap();
    }
    store.put(&key("b/y"), b"theirs", Life::Kept).unwrap();
    peer.signal(Signal::CONT);
    assert_eq!(peer.ask("create b/y mine"), "theirs");
    assert_eq!(peer.ask("meet a/y b/x"), "met");
    let seen = store.list(&key("a")).unwrap();
    assert_eq!(seen.entries.len(), 2);
    assert_eq!(store.list(&key("b/x")).unwrap().entries[&key("b/x")], 699_u32.to_le_bytes());
}

/// However much is written, what lies there is bounded, and larger values go with the states that name them.
#[test]
fn what_is_old_is_deleted() {
    let folder = tempfile::tempdir().unwrap();
    let store = Directory::new(folder.path()).unwrap();
    // A process that died while it wrote leaves this.
    let leftover = folder.path().join("drafts/leftover");
    fs::write(&leftover, b"x").unwrap();
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
    fs::File::options().write(true).open(&leftover).unwrap().set_modified(long_ago).unwrap();
    let value = vec![1; 1000];
    for _ in 0..1200 {
        store.put(&key("x"), &value, Life::Kept).unwrap();
    }
    let states = count(&folder.path().join("states"));
    assert!((256..=330).contains(&states), "{states} states");
    let values = count(&folder.path().join("values"));
    assert!((1..=330).contains(&values), "{values} values");
    assert_eq!(count(&folder.path().join("drafts")), 0);
    let again = Directory::new(folder.path()).unwrap();
    assert_eq!(again.list(&key("x")).unwrap().entries[&key("x")], value);
}

/// Processes that all begin at once agree on where.
#[test]
fn all_begin_in_one_store() {
    for _ in 0..20 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let start = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            for n in 0..8 {
                let (path, start) = (&path, &start);
                scope.spawn(move || {
                    start.wait();
                    let store = Directory::new(path).unwrap();
                    store.put(&key(&format!("b/{n}")), b"x", Life::Kept).unwrap();
                });
            }
        });
        let store = Directory::new(&path).unwrap();
        assert_eq!(store.list(&key("b")).unwrap().entries.len(), 8);
    }
}

#[test]
fn what_is_damaged_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let store = Directory::new(folder.path()).unwrap();
    store.put(&key("x"), &[1; 1000], Life::Kept).unwrap();
    let value = fs::read_dir(folder.path().join("values")).unwrap().next().unwrap().unwrap().path();
    fs::write(&value, b"short").unwrap();
    let error = store.list(&key("x")).unwrap_err();
    assert!(matches!(&error, RendezvousError::Damaged { path, .. } if *path == value), "{error}");
    drop(store);

    let state = folder.path().join("states/1");
    let whole = fs::read(&state).unwrap();
    for bad in
        [vec![], whole[..whole.len() - 1].to_vec(), [&whole[..40], &[0xff], &whole[41..]].concat()]
    {
        fs::write(&state, bad).unwrap();
        let error = Directory::new(folder.path()).unwrap_err();
        assert!(
            matches!(&error, RendezvousError::Damaged { path, .. } if *path == state),
            "{error}"
        );
    }
}

#[test]
fn what_is_no_directory_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, b"x").unwrap();
    let started = Instant::now();
    for path in [file.clone(), file.join("below")] {
        let error = Directory::new(&path).unwrap_err();
        assert!(matches!(error, RendezvousError::Io { .. }), "{error}");
    }
    // Taken away from under a store: an error, and no wait.
    let store = Directory::new(folder.path().join("store")).unwrap();
    fs::remove_dir_all(folder.path().join("store")).unwrap();
    let error = store.put(&key("x"), b"x", Life::Kept).unwrap_err();
    assert!(matches!(error, RendezvousError::Io { .. }), "{error}");
    assert!(matches!(store.list(&key("x")), Err(RendezvousError::Io { .. })));
    assert!(started.elapsed() < Duration::from_secs(5));
}

/// Only this user comes in, where this makes the directory.
#[test]
fn others_are_kept_out() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let _store = Directory::new(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
}
