//! Publications, requests and the directory they meet in: what comes from outside is checked, whole or refused.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::fs;
use std::time::{Duration, Instant};

use refit::planner::{
    Band, Capabilities, Dtype, LayoutBuilder, LowerOptions, Param, PlanOptions, RankLayout,
    SourceLayout, lower, plan,
};
use refit::{
    Directory, DirectoryError, HEADER_BYTES, MAX_REQUEST_BYTES, PackRequest, Place, Publication,
    PublicationError, PublishedHeader, PublishedRegion, RefitError, RequestError,
};

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
    let regions = [regions, vec![header_region()]].concat();
    Publication::new("agent-7".to_owned(), vec![1, 2, 3], layout(7), header(), places, regions)
}

fn header() -> PublishedHeader {
    PublishedHeader { incarnation: 5 << 90, place: place(1 << 40) }
}

fn header_region() -> PublishedRegion {
    region(1 << 40, HEADER_BYTES as u64)
}

fn publication(rank: u32) -> Publication {
    let places = vec![place(4096), place(8192)];
    Publication::new(
        "agent".to_owned(),
        vec![9; 40],
        layout(rank),
        header(),
        places,
        vec![region(4096, 8192), header_region()],
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
fn the_header_lies_in_a_registered_region_beside_the_parameters() {
    let with = |address, cuda, regions| {
        let header = PublishedHeader { incarnation: 1, place: Place { address, cuda } };
        let places = vec![place(0), place(24)];
        Publication::new("agent".to_owned(), vec![], layout(7), header, places, regions)
    };
    // Parameters end at byte 64.
    for address in [64, 100] {
        assert!(with(address, None, vec![region(0, 164)]).is_ok(), "{address}");
    }
    let elsewhere = PublishedRegion { cuda: Some(0), ..region(0, 64) };
    assert!(with(0, Some(0), vec![region(0, 64), elsewhere]).is_ok());
    for (address, cuda) in
        [(63, None), (0, None), (101, None), (u64::MAX - 3, None), (64, Some(0)), (164, None)]
    {
        let error = with(address, cuda, vec![region(0, 164)]).unwrap_err();
        assert!(matches!(error, PublicationError::Header { rank: 7 }), "{address}: {error}");
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
    assert_eq!(received.header(), header());
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

/// What a target that reads columns asks of a source that holds rows.
fn request(target: u32) -> PackRequest {
    let held = publish_wide(0);
    let mut wanted = LayoutBuilder::new(target);
    let tensor = wanted.tensor("w", 4_000, 8).unwrap();
    let band = Band::new(tensor, 0..4_000, 0..4);
    wanted.param(Param::new("w", Dtype::Bf16, 4_000, 4).band(band)).unwrap();
    let wanted = wanted.build();
    let plain = Capabilities::plain(2_000, 5_000);
    let source = SourceLayout::new([held.layout()]).unwrap();
    let plan = plan(&source, &wanted, &PlanOptions::default()).unwrap();
    let program = lower(&plan, &plain, &LowerOptions::default()).unwrap();
    PackRequest::new(&wanted, &program, &[held], |_| plain).unwrap()
}

#[test]
fn a_request_travels_unchanged() {
    let sent = request(3);
    assert!(!sent.is_empty() && sent.asks(0) && !sent.asks(1));
    let received = PackRequest::decode(&sent.encode()).unwrap();
    assert_eq!((received.target(), received.ranks()), (3, &[0][..]));
    assert_eq!(received.slices(), sent.slices());
    assert_eq!(
        (received.slices()[0].rows.clone(), received.slices()[0].cols.clone()),
        (0..4_000, 0..4)
    );
    assert_eq!((received.digest(), &received), (sent.digest(), &sent));
    assert_ne!(sent, request(4));
    assert_eq!(request(3).encode(), sent.encode(), "the same, whoever makes it");
    let nothing = PackRequest::decode(&PackRequest::nothing(9).encode()).unwrap();
    assert!(nothing.is_empty() && nothing.slices().is_empty() && nothing.target() == 9);
}

#[test]
fn every_cut_and_every_flip_of_a_request_is_refused() {
    let sent = request(3).encode();
    for end in 0..sent.len() {
        assert!(PackRequest::decode(&sent[..end]).is_err(), "cut off after {end} bytes");
    }
    for bit in 0..sent.len() * 8 {
        let mut damaged = sent.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(PackRequest::decode(&damaged).is_err(), "bit {bit} flipped");
    }
    assert_eq!(PackRequest::decode(b"refit").unwrap_err(), RequestError::Magic);
    let long = vec![0; MAX_REQUEST_BYTES + 1];
    assert!(matches!(PackRequest::decode(&long), Err(RequestError::TooLarge { .. })));
}

#[test]
fn sources_wait_for_what_targets_ask_and_no_longer_than_they_want() {
    let folder = tempfile::tempdir().unwrap();
    let directory = Directory::new(folder.path()).unwrap();
    directory.ask(&PackRequest::nothing(0)).unwrap();
    let error = directory.wait_for_requests([0, 1], Duration::from_millis(30)).unwrap_err();
    assert!(
        matches!(&error, DirectoryError::NotAsked { missing, .. } if *missing == [1]),
        "{error}"
    );
    directory.ask(&request(1)).unwrap();
    let found = directory.wait_for_requests([1, 0], Duration::from_secs(30)).unwrap();
    assert_eq!(found, [PackRequest::nothing(0), request(1)]);

    fs::rename(folder.path().join("pack-1.refit"), folder.path().join("pack-2.refit")).unwrap();
    let error = directory.request(2).unwrap_err();
    assert!(matches!(error, DirectoryError::WrongTarget { expected: 2, found: 1, .. }), "{error}");
    fs::write(folder.path().join("pack-1.refit"), &request(1).encode()[..45]).unwrap();
    let error = directory.request(1).unwrap_err();
    assert!(error.to_string().contains("pack-1.refit"), "{error}");
    let damaged = matches!(error, DirectoryError::Request { source: RequestError::Damaged, .. });
    assert!(damaged, "{error}");
    directory.withdraw_request(1).unwrap();
    directory.withdraw_request(1).unwrap();
    assert!(directory.request(1).unwrap().is_none());
}

/// A source that does not pack is read as it is: waiting for it ends.
#[test]
fn targets_wait_for_packing_and_no_longer_than_they_want() {
    let folder = tempfile::tempdir().unwrap();
    let directory = Directory::new(folder.path()).unwrap();
    let patience = Duration::from_millis(30);
    let error = directory.wait_until_packed([0], &request(1), patience).unwrap_err();
    let missing = matches!(error, RefitError::Directory(DirectoryError::Deadline { .. }));
    assert!(missing, "{error}");
    // Its columns are scattered, and it was asked.
    let held = publish_wide(0);
    directory.publish(&held).unwrap();
    assert!(!request(1).is_answered_by(&held).unwrap());
    let started = Instant::now();
    let found = directory.wait_until_packed([0], &request(1), patience).unwrap();
    assert!(started.elapsed() >= patience);
    assert_eq!(found[0].digest(), held.digest());
    // One that was not asked, or a target that asks for nothing, is not waited for.
    let nothing = PackRequest::nothing(1);
    let found = directory.wait_until_packed([0], &nothing, Duration::from_secs(60)).unwrap();
    assert_eq!(found[0].digest(), held.digest());
}

/// A rank that holds the tensor of [`request`] whole.
fn publish_wide(rank: u32) -> Publication {
    let mut layout = LayoutBuilder::new(rank);
    let tensor = layout.tensor("w", 4_000, 8).unwrap();
    layout
        .param(Param::new("w", Dtype::Bf16, 4_000, 8).band(Band::new(tensor, 0..4_000, 0..8)))
        .unwrap();
    let layout = layout.build();
    let regions = vec![region(0, layout.bytes()), header_region()];
    Publication::new("agent".to_owned(), vec![], layout, header(), vec![place(0)], regions).unwrap()
}
