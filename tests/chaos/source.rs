//! A source rank: commits version after version, whatever happens to the others.

use std::sync::Arc;
use std::time::Duration;

use refit::Source;
use refit_service::rendezvous::Directory;
use refit_service::source::{GroupRank, LiveSource, SourceError, SourceOptions};
use refit_tests::ranks;
use refit_transport::nixl::NixlTransport;
use serde::{Deserialize, Serialize};

use crate::child::{Orders, after, agent, now_micros, passes, say};
use crate::model::{Cut, Model, Share};
use crate::random::Random;

/// What a source is told at its start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Part {
    pub(crate) folder: String,
    pub(crate) model: Model,
    pub(crate) group: String,
    pub(crate) rank: u32,
    pub(crate) ranks: u32,
    pub(crate) pace: Pace,
    /// The longest it waits for a reader, in milliseconds. With 0 it writes while it is read.
    pub(crate) most_lease: u64,
}

/// When a source commits.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Pace {
    /// With every tick of the shared clock, of so many microseconds; the version is the tick, so that ranks and groups agree
    /// without a word.
    Ticks(u64),
    /// At random, on average every so many microseconds, from this seed.
    Random(u64, u64),
}

type Live = LiveSource<Directory, Source<NixlTransport>>;

pub(crate) fn run(part: &Part) {
    let orders = Orders::listen();
    let store = Arc::new(Directory::new(&part.folder).unwrap());
    let model_name = format!("model-{}", part.model.salt);
    let share = part.model.share(Cut::Rows(part.rank, part.ranks));
    let transport = agent("source");
    let (params, _) = ranks::memory(&share.layout());
    let source =
        Source::new(transport.clone(), &ranks::pool(&transport), share.layout(), params).unwrap();
    let place = GroupRank { group: part.group.clone(), rank: part.rank, ranks: part.ranks };
    let options = SourceOptions::default().with_most_lease(Duration::from_millis(part.most_lease));
    let seat = orders.seat(&store, &model_name);
    let mut live = LiveSource::join(seat, place, source, options, after(Duration::from_secs(10)))
        .unwrap_or_else(|error| panic!("{error}"));
    say("ready");
    let mut random = Random::new(match part.pace {
        Pace::Random(_, seed) => seed,
        Pace::Ticks(_) => 0,
    });
    let mut version = 0;
    while !orders.ended() {
        version = match part.pace {
            Pace::Ticks(tick) => {
                let now = now_micros();
                std::thread::sleep(Duration::from_micros(tick - now % tick));
                now / tick + 1
            }
            Pace::Random(mean, _) => {
                std::thread::sleep(Duration::from_micros(random.below(2 * mean)));
                version + 1
            }
        };
        match commit(&mut live, &share, version) {
            // Readers are left: it tries again.
            Ok(()) | Err(SourceError::Busy { .. } | SourceError::NotNewer { .. }) => {}
            Err(SourceError::Rendezvous(error)) if passes(&error) => {
                // As one that was stopped for too long: it is as good as dead until it joins again.
                say("session");
                match live.rejoin(orders.seat(&store, &model_name), after(Duration::from_secs(5))) {
                    Ok(()) => {}
                    Err(SourceError::Rendezvous(error)) if passes(&error) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
    match live.leave(after(Duration::from_secs(1))) {
        Ok(left) => drop(left),
        Err(error) => say(&format!("left {error}")),
    }
}

fn commit(live: &mut Live, share: &Share, version: u64) -> Result<(), SourceError> {
    let mut updating = live.begin_update(after(Duration::from_millis(500)))?;
    let mut changing = updating.source_mut().begin_update()?;
    for (name, memory) in changing.params_mut() {
        share.fill(name, version, memory);
    }
    updating.commit(version)
}
