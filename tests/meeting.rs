//! Publications and the directory they meet in: what comes from outside is checked, whole or refused.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::fs;
use std::time::{Duration, Instant};

use refit::planner::{Band, Dtype, LayoutBuilder, Param, RankLayout};
use refit::{Directory, DirectoryError, Place, Publication, PublicationError, PublishedRegion};

fn layout(rank: u32) -> RankLayout {
    let mut layout = LayoutBuilder::new(rank);
    let tensor = layout.tensor("w", 8, 4).unwrap();
    for (name, rows) in [("a", 0..3), ("b", 3..8)] {
        let height = rows.end - rows.start;
        layout
            .param(Param::new(name, Dtype::Bf16, height, 4).band(Band::new(tensor, rows, 0..4)))
            .unwrap();
    }
    layout.build()
}

fn place(address: u64) -> Place {
    Place { address, cuda: None }
}

fn region(address: u64, len: u64) -> PublishedRegion {
    PublishedRegion { address, len, cuda: None }
}

fn publish(
    places: Vec<Place>,
    regions: Vec<PublishedRegion>,
) -> Result<Publication, PublicationError> {
    Publication::new("agent-7".to_owned(), vec![1, 2, 3], layout(7), places, regions)
}

fn publication(rank: u32) -> Publication {
    let places = vec![place(4096), place(8192)];
    Publication::new(
        "agent".to_owned(),
        vec![9; 40],
        layout(rank),
        places,
        vec![region(4096, 8192)],
    )
    .unwrap()
}

#[test]
fn parameters_must_lie_in_registered_regions() {
    assert!(publish(vec![place(0), place(24)], vec![region(0, 64)]).is_ok());
    // Two regions that touch are as good as one.
    assert!(publish(vec![place(0), place(24)], vec![region(0, 30), region(30, 34)]).is_ok());
    for (places, regions) in [
        (vec![place(0), place(25)], vec![region(0, 64)]),
        (vec![place(0), place(24)], vec![region(0, 30), region(31, 33)]),
        (vec![place(u64::MAX - 3), place(24)], vec![region(0, 64)]),
        (vec![place(0), Place { address: 24, cuda: Some(0) }], vec![region(0, 64)]),
    ] {
        let error = publish(places, regions).unwrap_err();
        assert!(matches!(error, PublicationError::Unregistered { rank: 7, .. }), "{error}");
    }
    let error = publish(vec![place(0)], vec![region(0, 64)]).unwrap_err();
    assert!(matches!(error, PublicationError::Places { places: 1, params: 2, .. }), "{error}");
    for regions in [vec![region(0, 64), region(63, 64)], vec![region(u64::MAX, 2)]] {
        let error = publish(vec![place(0), place(24)], regions).unwrap_err();
        assert!(matches!(error, PublicationError::Regions { rank: 7 }), "{error}");
    }
}

#[test]
fn a_publication_travels_unchanged() {
    let sent = publication(2);
    let received = Publication::decode(&sent.encode()).unwrap();
    assert_eq!(received.layout(), sent.layout());
    assert_eq!(
        (received.rank(), received.agent(), received.metadata()),
        (2, "agent", &[9; 40][..])
    );
    assert_eq!(received.place("b"), Some(place(8192)));
    assert_eq!(
        (received.digest(), received.layout_digest()),
        (sent.digest(), sent.layout_digest())
    );
    assert_ne!(sent.digest(), publication(3).digest());
}

#[test]
fn every_cut_and_every_flip_is_refused() {
    let sent = publication(2).encode();
    for end in 0..sent.len() {
        assert!(Publication::decode(&sent[..end]).is_err(), "cut off after {end} bytes");
    }
    for bit in 0..sent.len() * 8 {
        let mut damaged = sent.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Publication::decode(&damaged).is_err(), "bit {bit} flipped");
    }
}

#[test]
fn a_target_waits_for_every_rank() {
    let folder = tempfile::tempdir().unwrap();
    let directory = Directory::new(folder.path().join("made/when/missing")).unwrap();
    directory.publish(&publication(0)).unwrap();
    let started = Instant::now();
    let error = directory.wait([0, 1, 2], Duration::from_millis(50)).unwrap_err();
    assert!(
        matches!(&error, DirectoryError::Deadline { missing, .. } if *missing == [1, 2]),
        "{error}"
    );
    assert!(started.elapsed() >= Duration::from_millis(50));

    let later = directory.clone();
    let publisher = std::thread::spawn(move || {
        for rank in [2, 1] {
            std::thread::sleep(Duration::from_millis(20));
            later.publish(&publication(rank)).unwrap();
        }
    });
    let found = directory.wait([2, 1, 0], Duration::from_secs(30)).unwrap();
    publisher.join().unwrap();
    assert_eq!(found.iter().map(Publication::rank).collect::<Vec<_>>(), [0, 1, 2]);

    directory.withdraw(1).unwrap();
    directory.withdraw(1).unwrap();
    assert!(directory.read(1).unwrap().is_none());
}

#[test]
fn a_bad_file_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let directory = Directory::new(folder.path()).unwrap();
    directory.publish(&publication(0)).unwrap();
    let file = folder.path().join("source-0.refit");
    fs::rename(&file, folder.path().join("source-1.refit")).unwrap();
    let error = directory.read(1).unwrap_err();
    assert!(matches!(error, DirectoryError::WrongRank { expected: 1, found: 0, .. }), "{error}");
    fs::write(&file, &publication(0).encode()[..50]).unwrap();
    let error = directory.read(0).unwrap_err();
    assert!(error.to_string().contains("source-0.refit"), "{error}");
    assert!(
        matches!(error, DirectoryError::Publication { source: PublicationError::Damaged, .. }),
        "{error}"
    );
}

#[test]
fn readers_never_see_half_a_publication() {
    let folder = tempfile::tempdir().unwrap();
    let directory = Directory::new(folder.path()).unwrap();
    directory.publish(&publication(0)).unwrap();
    let writer = directory.clone();
    let publisher =
        std::thread::spawn(move || (0..300).for_each(|_| writer.publish(&publication(0)).unwrap()));
    while !publisher.is_finished() {
        assert!(directory.read(0).unwrap().is_some());
    }
    publisher.join().unwrap();
}
