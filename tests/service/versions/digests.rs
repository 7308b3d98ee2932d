//! P13: what has landed is compared with what its source says of it, through the store.

use refit::{DigestRequest, Digests, Expected, Publication, RefitError, Source};
use refit_service::puller::Cause;
use refit_service::reader::{Checks, ReaderOptions, Wanted};
use refit_service::source::{GroupRank, LiveSource, SourceOptions, SourceRank};
use refit_tests::ranks;

use super::fleet::{Fleet, Local, commit, is_whole, millis, rows, soon};

fn checked(checks: Checks) -> ReaderOptions {
    ReaderOptions::default().with_checks(checks)
}

#[test]
fn p13_a_reader_waits_for_word_and_then_has_it_with_every_commit() {
    let fleet = Fleet::new();
    let mut trainer = fleet.group("trainer", 2, SourceOptions::default());
    commit(&mut trainer, 1);
    let mut reader = fleet.reader("engine", checked(Checks::Always));
    let mut direct = fleet.direct(0, 1);
    // Nobody answers what was asked after the commit, unless the trainer is told to.
    let late = reader.refresh(&mut direct, &Wanted::at_least(1), millis(100)).unwrap_err();
    assert_eq!(late.attempts[0].failure.cause, Cause::Late, "{late}");
    assert_eq!(direct.version(), None);
    trainer.iter_mut().for_each(|source| source.answer().unwrap());
    reader.refresh(&mut direct, &Wanted::at_least(1), soon()).unwrap();
    for version in 2..20 {
        commit(&mut trainer, version);
        let refreshed = reader.refresh(&mut direct, &Wanted::at_least(version), soon()).unwrap();
        assert_eq!(refreshed.version, version);
        assert!(is_whole(&direct, version));
    }
    assert_eq!(reader.stats().retries.total(), 1);
    // Others take what they get.
    let mut other = fleet.reader("other", checked(Checks::IfAnswered));
    other.refresh(&mut fleet.direct(0, 1), &Wanted::at_least(19), soon()).unwrap();
}

/// A source whose bytes are not what it says: as one is whose bytes are changed on their way.
#[derive(Debug)]
struct Changed(Source<Local>);

impl SourceRank for Changed {
    fn publication(&self) -> Result<Publication, RefitError> {
        self.0.publication()
    }

    fn digests(&self, request: &DigestRequest) -> Result<Digests, RefitError> {
        let mut digests = self.0.digests(request)?;
        digests.values[0] ^= 1;
        Ok(digests)
    }

    fn begin(&mut self) -> Result<(), RefitError> {
        SourceRank::begin(&mut self.0)
    }

    fn commit(&mut self, version: u64) -> Result<Expected, RefitError> {
        SourceRank::commit(&mut self.0, version)
    }
}

#[test]
fn p13_what_differs_is_discarded_and_read_elsewhere() {
    let fleet = Fleet::new();
    let mut reader = fleet.reader("engine", checked(Checks::Always));
    let mut direct = fleet.direct(0, 1);
    // So that the request is known when they commit.
    let mut good = fleet.group("good", 1, SourceOptions::default());
    commit(&mut good, 1);
    reader.refresh(&mut direct, &Wanted::at_least(1), millis(50)).unwrap_err();
    let source = Changed(ranks::source(&fleet.agent("bad"), &rows(0, 1)));
    let place = GroupRank { group: "bad".to_owned(), rank: 0, ranks: 1 };
    let options = SourceOptions::default();
    let mut bad = LiveSource::join(fleet.seat(), place, source, options, soon()).unwrap();
    bad.begin_update(soon()).unwrap().commit(2).unwrap();
    let damaged = reader.refresh(&mut direct, &Wanted::at_least(2), millis(50)).unwrap_err();
    assert!(
        damaged.attempts.iter().all(|attempt| attempt.failure.cause == Cause::Damaged),
        "{damaged}"
    );
    assert!(!damaged.attempts.is_empty());
    assert!(direct.params().is_none(), "a mix is called whole");
    commit(&mut good, 2);
    let refreshed = reader.refresh(&mut direct, &Wanted::at_least(2), soon()).unwrap();
    assert_eq!(refreshed.group, "good");
    assert!(is_whole(&direct, 2));
}
