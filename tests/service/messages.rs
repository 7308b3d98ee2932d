//! What processes tell each other: every kind travels unchanged, and nothing else is one.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use proptest::prelude::*;
use refit::{Digests, PackRequest, Stamp};
use refit_service::message::{
    Announcement, Answer, Decision, Health, Kind, MAX_LEASE_MILLIS, Member, Message, MessageError,
    Offering, Outcome, Prepared, RankState, ReaderLease, Standing, Wish,
};

fn member() -> Member {
    Member { rank: 3, ranks: 8, incarnation: 7 << 90 | 5, relay: false, publication: [9; 32] }
}

fn announcement() -> Announcement {
    let (incarnation, version, epoch) = (7 << 90 | 5, 300, 12);
    Announcement { incarnation, version, epoch, offering: Offering::Open }
}

fn state() -> RankState {
    RankState {
        rank: 1,
        ranks: 2,
        incarnation: 77,
        installed: Some(4),
        prepared: Some(Prepared { round: 9, version: 5 }),
        health: Health::Whole,
    }
}

fn decision() -> Decision {
    let before = Some(Standing { round: 2, version: 4 });
    Decision { round: 9, outcome: Outcome::Commit(5), before }
}

/// One of every kind.
fn examples() -> Vec<(Kind, Vec<u8>)> {
    Kind::ALL
        .into_iter()
        .map(|kind| {
            let bytes = match kind {
                Kind::Member => member().encode(),
                Kind::Announcement => announcement().encode(),
                Kind::ReaderLease => {
                    ReaderLease { incarnation: 1, version: 300, millis: 30_000 }.encode()
                }
                Kind::RankState => state().encode(),
                Kind::Decision => decision().encode(),
                Kind::Wish => {
                    let pack = Some(PackRequest::nothing(3));
                    Wish { incarnation: 4, pack, digests: None }.encode()
                }
                Kind::Answer => {
                    let stamp = Stamp { epoch: 4, version: 300 };
                    let (request, values) = ([8; 32], vec![1, 300, u64::MAX]);
                    Answer(Digests { rank: 2, incarnation: 5, stamp, request, values }).encode()
                }
                other => panic!("no example of a {other}"),
            };
            (kind, bytes)
        })
        .collect()
}

#[test]
fn every_kind_travels_unchanged() {
    for (kind, bytes) in examples() {
        assert!(bytes.len() <= kind.max_bytes(), "{kind}");
        assert_eq!(kind.recode(&bytes).unwrap(), bytes, "{kind}");
    }
    assert_eq!(Member::decode(&member().encode()).unwrap(), member());
    assert_eq!(Announcement::decode(&announcement().encode()).unwrap(), announcement());
    assert_eq!(RankState::decode(&state().encode()).unwrap(), state());
    assert_eq!(Decision::decode(&decision().encode()).unwrap(), decision());
    let wish = Wish { incarnation: 4, pack: None, digests: None };
    assert_eq!(Wish::decode(&wish.encode()).unwrap(), wish);
}

#[test]
fn kinds_are_not_mistaken_for_each_other() {
    let examples = examples();
    for (kind, bytes) in &examples {
        for (other, _) in examples.iter().filter(|(other, _)| other != kind) {
            assert_eq!(other.recode(bytes), Err(MessageError::Magic { kind: *other }));
        }
    }
}

/// A changed message is refused or is another message, whole: never the same one in another spelling.
#[test]
fn every_cut_and_every_flip_is_refused_or_is_another_message() {
    for (kind, bytes) in examples() {
        for len in 0..bytes.len() {
            assert!(kind.recode(&bytes[..len]).is_err(), "{kind} cut at {len}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            if let Ok(again) = kind.recode(&flipped) {
                assert_eq!(again, flipped, "{kind} with bit {bit} flipped");
            }
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(kind.recode(&longer).is_err(), "{kind} with a byte more");
        let huge = vec![0; 129];
        if kind.max_bytes() < huge.len() {
            let refused = kind.recode(&huge).unwrap_err();
            assert!(matches!(refused, MessageError::TooLarge { bytes: 129, .. }), "{refused}");
        }
    }
}

#[test]
fn fields_are_checked() {
    let rank = |error| matches!(error, MessageError::Rank { .. });
    for (rank_, ranks) in [(8, 8), (0, 0), (0, (1 << 16) + 1), (u32::MAX, u32::MAX)] {
        let bytes = Member { rank: rank_, ranks, ..member() }.encode();
        assert!(rank(Member::decode(&bytes).unwrap_err()));
        let bytes = RankState { rank: rank_, ranks, ..state() }.encode();
        assert!(rank(RankState::decode(&bytes).unwrap_err()));
    }
    let field = |error, name| match error {
        MessageError::Field { field, .. } => assert_eq!(field, name),
        other => panic!("{other}"),
    };
    for epoch in [0, 1, 7, u64::MAX] {
        let bytes = Announcement { epoch, ..announcement() }.encode();
        field(Announcement::decode(&bytes).unwrap_err(), "epoch");
    }
    for millis in [0, MAX_LEASE_MILLIS + 1, u32::MAX] {
        let bytes = ReaderLease { incarnation: 1, version: 2, millis }.encode();
        field(ReaderLease::decode(&bytes).unwrap_err(), "life in milliseconds");
    }
    let prepared = Some(Prepared { round: 0, version: 1 });
    let bytes = RankState { prepared, ..state() }.encode();
    field(RankState::decode(&bytes).unwrap_err(), "round");
    for health in [Health::Installing, Health::Invalid] {
        let bytes = RankState { health, ..state() }.encode();
        field(RankState::decode(&bytes).unwrap_err(), "installed version");
    }
    let bytes = Decision { round: 0, before: None, ..decision() }.encode();
    field(Decision::decode(&bytes).unwrap_err(), "round");
    for round in [0, 9, 10] {
        let before = Some(Standing { round, version: 4 });
        let bytes = Decision { before, ..decision() }.encode();
        field(Decision::decode(&bytes).unwrap_err(), "round of the commit before");
    }
    for version in [5, 6] {
        let before = Some(Standing { round: 2, version });
        let bytes = Decision { before, ..decision() }.encode();
        field(Decision::decode(&bytes).unwrap_err(), "version");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, ..ProptestConfig::default() })]

    /// Whatever bytes follow the magic, nothing panics, and what is read is written as it was.
    #[test]
    fn anything_is_refused_or_written_as_it_was(
        kind in prop::sample::select(Kind::ALL.to_vec()),
        body in prop::collection::vec(any::<u8>(), 0..140),
    ) {
        let bytes = [kind.magic().as_slice(), &body].concat();
        if let Ok(again) = kind.recode(&bytes) {
            prop_assert_eq!(again, bytes);
        }
    }
}
