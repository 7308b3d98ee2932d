//! One suite over every store in which processes can meet.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

#[path = "rendezvous/directory.rs"]
mod directory;
#[cfg(feature = "etcd")]
#[path = "rendezvous/etcd.rs"]
mod etcd;
#[path = "rendezvous/peer.rs"]
mod peer;
#[path = "rendezvous/place.rs"]
mod place;
#[cfg(feature = "etcd")]
#[path = "rendezvous/server.rs"]
mod server;
#[path = "rendezvous/suite.rs"]
mod suite;

use refit_service::rendezvous::{Directory, Key, RendezvousError};

/// The suite over one store. A place that cannot be had here has said so.
macro_rules! suite {
    ($store:ident, $place:path, [$($case:ident),* $(,)?]) => {
        mod $store {
            $(
                #[test]
                fn $case() {
                    if let Some(place) = <$place>::new() {
                        crate::suite::$case(&place);
                    }
                }
            )*

            #[test]
            fn sessions_belong_to_a_store() {
                if let (Some(place), Some(elsewhere)) = (<$place>::new(), <$place>::new()) {
                    crate::suite::sessions_belong_to_a_store(&place, &elsewhere);
                }
            }
        }
    };
}

suite!(
    in_process_store,
    crate::place::Inside,
    [
        a_map,
        values_of_every_size,
        readers_see_the_old_or_the_new,
        of_all_who_create_one_succeeds,
        entries_end_with_their_session,
        changes_wake,
        no_change_is_missed,
        who_writes_and_looks_is_seen_or_sees,
        no_write_is_lost,
    ]
);

suite!(
    directory_store,
    crate::place::Folder,
    [
        a_map,
        values_of_every_size,
        readers_see_the_old_or_the_new,
        of_all_who_create_one_succeeds,
        entries_end_with_their_session,
        the_killed_vanish,
        the_silent_vanish,
        changes_wake,
        no_change_is_missed,
        who_writes_and_looks_is_seen_or_sees,
        no_write_is_lost,
    ]
);

#[cfg(feature = "etcd")]
suite!(
    etcd_store,
    crate::server::Server,
    [
        a_map,
        values_of_every_size,
        readers_see_the_old_or_the_new,
        of_all_who_create_one_succeeds,
        entries_end_with_their_session,
        the_killed_vanish,
        the_silent_vanish,
        changes_wake,
        no_change_is_missed,
        who_writes_and_looks_is_seen_or_sees,
        no_write_is_lost,
    ]
);

/// The role of other processes. By itself it does nothing.
#[test]
fn peer() {
    let Ok(place) = std::env::var(peer::PLACE) else { return };
    match place.split_once(' ').unwrap() {
        ("directory", path) => peer::serve_lines(&Directory::new(path).unwrap()),
        #[cfg(feature = "etcd")]
        ("etcd", address) => peer::serve_lines(&server::open(address)),
        _ => panic!("{place}"),
    }
}

#[test]
fn keys_are_paths_of_plain_parts() {
    let long = "x".repeat(513);
    for bad in
        ["", "/", "a/", "/a", "a//b", ".", "..", "a/../b", "a b", "a\n", "ä", "a:b", "a%2f", &long]
    {
        let error = Key::try_from(bad.to_owned()).unwrap_err();
        assert!(matches!(error, RendezvousError::Key { .. }), "{bad:?}: {error}");
    }
    let empty: [&str; 0] = [];
    assert!(Key::new(empty).is_err() && Key::new(["a", "b/c"]).is_err());
    let key = Key::new(["model-1", "x_2", "3.4"]).unwrap();
    assert_eq!(key.as_str(), "model-1/x_2/3.4");
    assert_eq!(key.join("z").unwrap().parts().last(), Some("z"));
    assert!(key.join("..").is_err());
    assert!(Key::try_from("x".repeat(512)).is_ok());
    let under = |key: &str, prefix: &str| {
        Key::try_from(key.to_owned()).unwrap().is_under(&Key::try_from(prefix.to_owned()).unwrap())
    };
    assert!(under("a/b", "a") && under("a", "a") && !under("ab", "a") && !under("a", "a/b"));
}
