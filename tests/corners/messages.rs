use std::cell::Cell;

use refit_service::message::{
    Announcement, Decision, Health, Kind, MAX_LEASE_MILLIS, MAX_RANKS, Member, Message, Offering,
    Outcome, Prepared, RankState, ReaderLease, Standing,
};

use super::each;

fn narrow(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Numbers of this many fields at their corners become a message, whose bytes are read as one of its kind: what is
/// accepted satisfies `holds`, and the bytes are its only spelling.
fn check<const N: usize, M: Message + PartialEq + std::fmt::Debug>(
    right: [u64; N],
    make: impl Fn([u64; N]) -> M,
    holds: impl Fn([u64; N]) -> bool,
) {
    let (accepted, refused) = (Cell::new(0), Cell::new(0));
    each(N, |replaced| {
        let mut numbers = right;
        replaced.iter().for_each(|&(at, value)| numbers[at] = value);
        let sent = make(numbers);
        let bytes = sent.encode();
        let read = M::decode(&bytes);
        assert_eq!(read.is_ok(), holds(numbers), "{sent:?}: {read:?}");
        if let Ok(read) = read {
            assert_eq!(read, sent);
            assert_eq!(M::KIND.recode(&bytes).unwrap(), bytes);
        }
        let count = if holds(numbers) { &accepted } else { &refused };
        count.set(count.get() + 1);
    });
    println!("{}: {} accepted, {} refused", M::KIND, accepted.get(), refused.get());
    assert!(accepted.get() > 0 && refused.get() > 0);
}

#[test]
fn p05_messages_at_the_corners() {
    let is_rank =
        |rank: u64, ranks: u64| narrow(rank) < narrow(ranks) && narrow(ranks) <= MAX_RANKS;
    check(
        [1, 2],
        |[rank, ranks]| {
            let (rank, ranks) = (narrow(rank), narrow(ranks));
            Member { rank, ranks, incarnation: u128::MAX, relay: false, publication: [7; 32] }
        },
        |[rank, ranks]| is_rank(rank, ranks),
    );
    check(
        [3, 4],
        |[version, epoch]| Announcement {
            incarnation: 1,
            version,
            epoch,
            offering: Offering::Open,
        },
        |[_, epoch]| epoch != 0 && epoch % 2 == 0,
    );
    check(
        [3, 1000],
        |[version, millis]| ReaderLease { incarnation: 1, version, millis: narrow(millis) },
        |[_, millis]| narrow(millis) != 0 && narrow(millis) <= MAX_LEASE_MILLIS,
    );
    check(
        [1, 2, 3, 4, 5],
        |[rank, ranks, installed, round, version]| RankState {
            rank: narrow(rank),
            ranks: narrow(ranks),
            incarnation: 1,
            installed: Some(installed),
            prepared: Some(Prepared { round, version }),
            health: Health::Whole,
        },
        |[rank, ranks, _, round, _]| is_rank(rank, ranks) && round != 0,
    );
    check(
        [3, 4, 2, 3],
        |[round, version, before, of_before]| Decision {
            round,
            outcome: Outcome::Commit(version),
            before: Some(Standing { round: before, version: of_before }),
        },
        |[round, version, before, of_before]| {
            round != 0 && before != 0 && before < round && of_before < version
        },
    );
}

/// Wishes and answers carry requests and digests, whose numbers are tried by themselves; here as bytes of any message.
#[test]
fn p05_bytes_of_messages_at_the_corners() {
    let member = Member { rank: 1, ranks: 2, incarnation: 3, relay: true, publication: [0; 32] };
    let body = &member.encode()[8..];
    for kind in Kind::ALL {
        each(body.len(), |replaced| {
            let mut bytes = body.to_vec();
            // From the back, so that places stay where they are.
            let mut replaced = replaced.to_vec();
            replaced.sort_unstable_by(|a, b| b.cmp(a));
            for (at, value) in replaced {
                let number = postcard::to_allocvec(&value).unwrap();
                drop(bytes.splice(at..=at, number));
            }
            let bytes = [kind.magic().as_slice(), &bytes].concat();
            if let Ok(again) = kind.recode(&bytes) {
                assert_eq!(again, bytes, "there is one way to write a {kind}");
            }
        });
    }
}
