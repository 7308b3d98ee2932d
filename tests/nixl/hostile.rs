//! P6 and P7 over real NIXL: what is not as an agent wrote it never reaches NIXL's loader, which crashes on some of it,
//! and no name is ever taken for another.

use std::time::{Duration, Instant};

use refit::planner::LayoutBuilder;
use refit::{Place, Publication, PublishedHeader, PublishedRegion};
use refit_pool::{Allocator, HostAllocator};
use refit_service::rendezvous::{InProcess, JobKey, Key, Life, Rendezvous, Sealed, Writer};
use refit_tests::fuzz::mutate::{Random, mutate};
use refit_transport::conformance::Harness;
use refit_transport::nixl::NixlTransport;
use refit_transport::{Cause, Transport, TransportError};

use crate::isolated::isolated;
use crate::{EMULATED, Nixl, ONE_SIDED};

/// As many as the raw loader was given, which took a third of them and crashed on eleven.
const MUTATIONS: usize = 1_300;

fn refused_before_nixl(target: &NixlTransport, name: &str, metadata: &[u8]) {
    match target.connect(name, metadata) {
        Err(TransportError::Connect {
            cause: Cause::Metadata { .. } | Cause::Published { .. } | Cause::TooLarge { .. },
            ..
        }) => {}
        other => panic!("{other:?} of {}", metadata.escape_ascii()),
    }
}

/// Mutations of these bytes, none of them the bytes themselves.
fn mutations(bytes: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    let mut random = Random::new(1_300);
    let other = vec![0x5A; 700];
    std::iter::repeat_with(move || mutate(&mut random, bytes, &other))
        .filter(move |mutation| mutation != bytes)
        .take(MUTATIONS)
}

#[test]
fn p6_mutated_metadata_never_reaches_nixl() {
    isolated("hostile::p6_mutated_metadata_never_reaches_nixl", ONE_SIDED, || {
        let (source, target) = (Nixl.agent("source").unwrap(), Nixl.agent("target").unwrap());
        let memory = HostAllocator.allocate(1 << 16).unwrap();
        let registration = source.register(memory.allocation()).unwrap();
        let metadata = source.metadata().unwrap();
        let mut slowest = Duration::ZERO;
        for mutation in mutations(&metadata) {
            let started = Instant::now();
            refused_before_nixl(&target, source.agent(), &mutation);
            slowest = slowest.max(started.elapsed());
        }
        for len in 0..metadata.len() {
            refused_before_nixl(&target, source.agent(), &metadata[..len]);
        }
        for bit in 0..metadata.len() * 8 {
            let mut flipped = metadata.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            refused_before_nixl(&target, source.agent(), &flipped);
        }
        println!(
            "{MUTATIONS} mutations, {} truncations, {} flips refused; slowest {slowest:?}",
            metadata.len(),
            metadata.len() * 8
        );
        assert!(slowest < Duration::from_millis(100));
        // And the name is not wedged by any of it.
        target.connect(source.agent(), &metadata).unwrap();
        drop(registration);
    });
}

/// The digest in the metadata is not a signature: who can write to the store can make another. Under a job's key nobody
/// can, so what the loader is given is what an agent wrote.
#[test]
fn p6_forged_publications_never_reach_nixl() {
    isolated("hostile::p6_forged_publications_never_reach_nixl", ONE_SIDED, || {
        let (source, target) = (Nixl.agent("source").unwrap(), Nixl.agent("target").unwrap());
        let memory = HostAllocator.allocate(1 << 16).unwrap();
        let registration = source.register(memory.allocation()).unwrap();
        let layout = LayoutBuilder::new(0).build();
        let (name, metadata) = (source.agent().to_owned(), source.metadata().unwrap());
        let address = memory.address();
        let header = PublishedHeader { incarnation: 1, place: Place { address, cuda: None } };
        let region = PublishedRegion { address, len: 1 << 16, cuda: None };
        let publication = Publication::new(name, metadata, layout, header, vec![], vec![region])
            .unwrap()
            .encode();

        let store = InProcess::new();
        let sealed = |incarnation| {
            let writer = Writer::new("job", "rank-0", incarnation).unwrap();
            let key = JobKey::from_secret(&[7; 32]).unwrap();
            Sealed::new(store.clone(), writer, Some(key)).unwrap()
        };
        let (ours, theirs) = (sealed(1), sealed(2));
        let at = Key::new(["m", "group", "a", "member", "0"]).unwrap();
        ours.put(&at, &publication, Life::Kept).unwrap();
        let raw = store.list(&at).unwrap().entries.remove(&at).unwrap();
        let connect = || {
            let entry = theirs.list(&at).unwrap().entries.remove(&at)?;
            let publication = Publication::decode(&entry).unwrap();
            Some(target.connect(publication.agent(), publication.metadata()))
        };
        for mutation in mutations(&raw) {
            store.put(&at, &mutation, Life::Kept).unwrap();
            assert!(connect().is_none(), "{}", mutation.escape_ascii());
        }
        // A publication that is right in itself, with a digest of its own, and no seal or another job's.
        store.put(&at, &publication, Life::Kept).unwrap();
        assert!(connect().is_none());
        store.put(&at, &raw, Life::Kept).unwrap();
        connect().unwrap().unwrap();
        drop(registration);
    });
}

#[test]
fn p7_names_that_nixl_would_cut_are_refused() {
    isolated("hostile::p7_names_that_nixl_would_cut_are_refused", ONE_SIDED, || {
        let (source, target) = (Nixl.agent("source").unwrap(), Nixl.agent("target").unwrap());
        let metadata = source.metadata().unwrap();
        let nul = format!("{}\0", source.agent());
        let long = "a".repeat(256);
        for name in ["", &nul, "a b", "caf\u{e9}", "../a", &long] {
            let error = target.connect(name, &metadata).unwrap_err();
            assert!(
                matches!(error, TransportError::Connect { cause: Cause::Name { .. }, .. }),
                "{name:?}: {error}"
            );
        }
        // Another agent's metadata, and an agent's own.
        let other = Nixl.agent("source").unwrap();
        let error = target.connect(other.agent(), &metadata).unwrap_err();
        assert!(matches!(error, TransportError::Connect { cause: Cause::Published { .. }, .. }));
        let error = target.connect(target.agent(), &target.metadata().unwrap()).unwrap_err();
        assert!(matches!(error, TransportError::Connect { cause: Cause::Itself, .. }));
        target.connect(source.agent(), &metadata).unwrap();
    });
}

fn restarts() {
    let target = Nixl.agent("target").unwrap();
    let memory = HostAllocator.allocate(1 << 16).unwrap();
    let mut earlier: Option<(String, Vec<u8>)> = None;
    let mut slowest = Duration::ZERO;
    for _ in 0..200 {
        let started = Instant::now();
        let source = Nixl.agent("trainer-0").unwrap();
        let registration = source.register(memory.allocation()).unwrap();
        let metadata = source.metadata().unwrap();
        if let Some((name, old)) = &earlier {
            // Neither is taken for the other.
            assert_ne!(name, source.agent());
            refused_before_nixl(&target, source.agent(), old);
            refused_before_nixl(&target, name, &metadata);
        }
        // Reads a byte before it returns.
        let peer = target.connect(source.agent(), &metadata).unwrap();
        slowest = slowest.max(started.elapsed());
        target.disconnect(&peer).unwrap();
        drop(registration);
        earlier = Some((source.agent().to_owned(), metadata));
    }
    println!("200 restarts, the slowest back after {slowest:?}");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
}

#[test]
fn p7_a_restarted_peer_is_another_one_sided() {
    isolated("hostile::p7_a_restarted_peer_is_another_one_sided", ONE_SIDED, restarts);
}

#[test]
fn p7_a_restarted_peer_is_another_emulated() {
    isolated("hostile::p7_a_restarted_peer_is_another_emulated", EMULATED, restarts);
}
