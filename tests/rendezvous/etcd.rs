//! What etcd does besides: it can be gone, come back, and ask who one is.

use std::time::{Duration, Instant};

use refit_service::rendezvous::{Etcd, EtcdOptions, Key, Life, Rendezvous, RendezvousError};
use rustix::process::Signal;

use super::place::Place;
use super::server::{Certificates, Server};

const SHORT: Duration = Duration::from_secs(1);

/// What a call may take above its timeout.
const SLACK: Duration = Duration::from_secs(2);

fn key(path: &str) -> Key {
    Key::try_from(path.to_owned()).unwrap()
}

/// Every call says in time that nobody is there.
fn all_say_so(store: &Etcd, at: &str) {
    let unreachable = |what: &str, started: Instant, error: RendezvousError| {
        let named = matches!(&error, RendezvousError::Unreachable { at: named, .. } if named == at);
        assert!(named, "{what}: {error}");
        assert!(started.elapsed() < SHORT + SLACK, "{what}: {:?}", started.elapsed());
    };
    let started = Instant::now();
    unreachable("session", started, store.session(Server::TTL).unwrap_err());
    let started = Instant::now();
    unreachable("put", started, store.put(&key("a"), b"x", Life::Kept).unwrap_err());
    let started = Instant::now();
    unreachable("large", started, store.put(&key("a"), &[1; 99_999], Life::Kept).unwrap_err());
    let started = Instant::now();
    unreachable("create", started, store.create(&key("a"), b"x", Life::Kept).unwrap_err());
    let started = Instant::now();
    unreachable("remove", started, store.remove(&key("a")).unwrap_err());
    let started = Instant::now();
    unreachable("list", started, store.list(&key("a")).unwrap_err());
}

#[test]
fn a_server_that_is_gone_is_named() {
    let Some(mut server) = Server::new() else { return };
    let store = Etcd::new(server.options().with_timeout(SHORT)).unwrap();
    let session = store.session(Server::TTL).unwrap();
    let seen = store.list(&key("a")).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            store.changed(&key("a"), seen.revision, Instant::now() + Duration::from_secs(60))
        });
        std::thread::sleep(Duration::from_millis(100));
        server.kill();
        let killed = Instant::now();
        let error = waiting.join().unwrap().unwrap_err();
        assert!(matches!(error, RendezvousError::Unreachable { .. }), "{error}");
        assert!(killed.elapsed() < SHORT * 2 + SLACK, "{:?}", killed.elapsed());
    });
    all_say_so(&store, &server.address());
    let started = Instant::now();
    let error = Etcd::new(server.options().with_timeout(SHORT)).unwrap_err();
    assert!(matches!(error, RendezvousError::Unreachable { .. }), "{error}");
    drop(session);
    assert!(started.elapsed() < (SHORT + SLACK) * 2);
}

#[test]
fn a_server_that_hangs_is_named() {
    let Some(server) = Server::new() else { return };
    let store = Etcd::new(server.options().with_timeout(SHORT)).unwrap();
    store.list(&key("a")).unwrap();
    server.signal(Signal::STOP);
    all_say_so(&store, &server.address());
    server.signal(Signal::CONT);
    let started = Instant::now();
    while store.put(&key("a"), b"x", Life::Kept).is_err() {
        assert!(started.elapsed() < Duration::from_secs(30), "it never comes back");
    }
}

#[test]
fn a_server_that_restarts_is_met_again() {
    let Some(mut server) = Server::new() else { return };
    let store = server.open();
    let session = store.session(Duration::from_secs(10)).unwrap();
    store.put(&key("r/a"), b"1", Life::Session(&session)).unwrap();
    let large = vec![5; 2 << 20];
    store.put(&key("r/large"), &large, Life::Kept).unwrap();
    let seen = store.list(&key("r")).unwrap();
    // Longer than the timeout, with the restart in it: nothing changes there, which is no error.
    let (quiet, calm) = (server.open(), Instant::now() + Duration::from_secs(14));
    let revision = seen.revision;
    let quiet = std::thread::spawn(move || quiet.changed(&key("quiet"), revision, calm));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            store.changed(&key("r"), seen.revision, Instant::now() + Duration::from_secs(60))
        });
        std::thread::sleep(Duration::from_millis(100));
        server.kill();
        std::thread::sleep(Duration::from_millis(300));
        server.restart();
        let started = Instant::now();
        let other = loop {
            match Etcd::new(server.options()) {
                Ok(other) => break other,
                Err(error) => assert!(started.elapsed() < Duration::from_secs(60), "{error}"),
            }
        };
        // Nothing is lost, and nobody has to begin again.
        let found = other.list(&key("r")).unwrap();
        assert_eq!(found.entries, seen.entries);
        other.put(&key("r/b"), b"2", Life::Kept).unwrap();
        let changed = waiting.join().unwrap().unwrap().expect("the change is missed");
        assert_eq!(changed.entries.len(), 3);
    });
    store.put(&key("r/a"), b"3", Life::Session(&session)).unwrap();
    // Still renewed.
    std::thread::sleep(Duration::from_secs(11));
    assert!(quiet.join().unwrap().unwrap().is_none());
    assert!(store.list(&key("r/a")).unwrap().entries.contains_key(&key("r/a")));
}

#[test]
fn no_server_at_all_is_named() {
    let started = Instant::now();
    // Nobody listens on this port of loopback.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("http://127.0.0.1:{port}");
    let error = Etcd::new(EtcdOptions::new([&address]).with_timeout(SHORT)).unwrap_err();
    assert!(matches!(&error, RendezvousError::Unreachable { at, .. } if *at == address), "{error}");
    // Something listens that never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", silent.local_addr().unwrap());
    let error = Etcd::new(EtcdOptions::new([&address]).with_timeout(SHORT)).unwrap_err();
    assert!(matches!(error, RendezvousError::Unreachable { .. }), "{error}");
    assert!(started.elapsed() < (SHORT + SLACK) * 2);
}

#[test]
fn chunks_go_with_their_entry() {
    let Some(server) = Server::new() else { return };
    let store = server.open();
    let keys = || {
        let all = server.control(&["get", "--prefix", "tests/refit/", "--keys-only"]);
        all.lines().filter(|line| !line.is_empty()).count()
    };
    let large = vec![5; 2 << 20];
    store.put(&key("c/x"), &large, Life::Kept).unwrap();
    assert_eq!(keys(), 1 + 4);
    store.put(&key("c/x"), &large, Life::Kept).unwrap();
    assert_eq!(keys(), 1 + 4, "those of the old value are gone");
    assert!(matches!(
        store.create(&key("c/x"), &large, Life::Kept).unwrap(),
        refit_service::rendezvous::Created::Already(_)
    ));
    assert_eq!(keys(), 1 + 4, "and those of one that was not taken");
    // Of an entry whose name begins like another's nothing is touched.
    store.put(&key("c/x/y"), &large, Life::Kept).unwrap();
    store.put(&key("c/x"), b"small", Life::Kept).unwrap();
    assert_eq!(keys(), 2 + 4);
    store.remove(&key("c/x/y")).unwrap();
    assert_eq!(keys(), 1);
    let session = store.session(Server::TTL).unwrap();
    store.put(&key("c/s"), &large, Life::Session(&session)).unwrap();
    drop(session);
    assert_eq!(keys(), 1);
}

/// A chunk that somebody took away, and a value that is none of ours: an error that names the entry.
#[test]
fn half_a_value_is_none() {
    let Some(server) = Server::new() else { return };
    let store = server.open();
    store.put(&key("h/x"), &vec![5; 2 << 20], Life::Kept).unwrap();
    let chunks = server.control(&["get", "--prefix", "tests/refit/c/", "--keys-only"]);
    for chunk in chunks.lines().filter(|line| !line.is_empty()).take(3) {
        server.control(&["del", chunk]);
        let error = store.list(&key("h")).unwrap_err();
        let named = matches!(&error, RendezvousError::Foreign { key: at, .. } if *at == key("h/x"));
        assert!(named, "{error}");
    }
    store.remove(&key("h/x")).unwrap();
    server.control(&["put", "tests/refit/e/h/y", "anything"]);
    let error = store.list(&key("h")).unwrap_err();
    assert!(matches!(error, RendezvousError::Foreign { .. }), "{error}");
    assert!(store.list(&key("i")).unwrap().entries.is_empty(), "others are not touched");
}

/// More entries than one page, and a history that was compacted meanwhile.
#[test]
fn pages_are_of_one_moment() {
    let Some(server) = Server::new() else { return };
    let store = server.open();
    for n in 0..300 {
        store.put(&key(&format!("p/{n}")), &[7; 500], Life::Kept).unwrap();
    }
    let seen = store.list(&key("p")).unwrap();
    assert_eq!(seen.entries.len(), 300);
    server.control(&["compact", &seen.revision.0.to_string()]);
    // From before what the server remembers: it may be otherwise, so it is looked at.
    let since = refit_service::rendezvous::Revision(1);
    let deadline = Instant::now() + Duration::from_secs(30);
    let changed = store.changed(&key("p"), since, deadline).unwrap().expect("nothing");
    assert_eq!(changed.entries, seen.entries);
}

#[test]
fn who_has_no_password_is_refused() {
    let Some(server) = Server::new() else { return };
    server.control(&["user", "add", "root:hush"]);
    server.control(&["user", "grant-role", "root", "root"]);
    server.control(&["auth", "enable"]);
    for options in [server.options(), server.options().with_user("root", "wrong")] {
        let error = Etcd::new(options).unwrap_err();
        assert!(matches!(error, RendezvousError::Refused { .. }), "{error}");
        assert!(!error.to_string().contains("wrong"), "{error}");
    }
    let store = Etcd::new(server.options().with_user("root", "hush")).unwrap();
    assert!(!format!("{store:?}").contains("hush"));
    let session = store.session(Server::TTL).unwrap();
    store.put(&key("u/x"), b"1", Life::Session(&session)).unwrap();
    let seen = store.list(&key("u")).unwrap();
    store.put(&key("u/x"), b"2", Life::Session(&session)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let changed = store.changed(&key("u"), seen.revision, deadline).unwrap().unwrap();
    assert_eq!(changed.entries[&key("u/x")], b"2");
}

/// Over TLS, both sides known to one authority; and what is refused.
#[test]
fn tls_and_its_authority() {
    let Some(server) = Server::with_tls() else { return };
    let tls = server.certificates();
    let identity = |options: EtcdOptions, of: &Certificates| {
        options.with_identity(&*of.client.0, &*of.client.1)
    };
    let options = || server.options().with_authority(&*tls.authority);
    let store = Etcd::new(identity(options(), tls)).unwrap();
    let session = store.session(Server::TTL).unwrap();
    store.put(&key("t/x"), &[7; 100_000], Life::Session(&session)).unwrap();
    let seen = store.list(&key("t")).unwrap();
    assert_eq!(seen.entries[&key("t/x")], [7; 100_000]);
    store.remove(&key("t/x")).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    assert!(store.changed(&key("t"), seen.revision, deadline).unwrap().is_some());

    let stranger = Certificates::new();
    let short = || server.options().with_timeout(SHORT);
    let plain = EtcdOptions::new([server.address().replace("https", "http")]);
    let ours = || short().with_authority(&*tls.authority);
    for (what, options) in [
        ("another authority", identity(short().with_authority(&*stranger.authority), tls)),
        ("no certificate of ours", ours()),
        ("one of another authority", identity(ours(), &stranger)),
        ("another name", identity(ours().with_domain("etcd.example"), tls)),
        ("no TLS", plain.with_timeout(SHORT)),
    ] {
        let started = Instant::now();
        let error = Etcd::new(options).unwrap_err();
        assert!(matches!(error, RendezvousError::Unreachable { .. }), "{what}: {error}");
        assert!(!error.to_string().contains("PRIVATE"), "{what}: {error}");
        assert!(started.elapsed() < (SHORT + SLACK) * 2, "{what}");
    }
    let error = Etcd::new(short().with_authority("no PEM")).unwrap_err();
    assert!(
        matches!(error, RendezvousError::Unreachable { .. } | RendezvousError::Refused { .. }),
        "{error}"
    );
}

/// One cluster may serve many jobs.
#[test]
fn jobs_with_other_roots_do_not_meet() {
    let Some(server) = Server::new() else { return };
    let (ours, theirs) = (server.open(), Etcd::new(server.options().with_root("tests")).unwrap());
    ours.put(&key("j/x"), b"1", Life::Kept).unwrap();
    assert!(theirs.list(&key("j")).unwrap().entries.is_empty());
}
