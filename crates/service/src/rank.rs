//! Ranks of [`refit`], as the protocol sees them: a source that is read, and targets that read in place or beside.

mod counted;
mod direct;
mod engine;
mod error;
mod failover;
mod lane;
mod pulls;
mod shadow;

use refit::transport::Transport;
use refit::{DigestRequest, Digests, Expected, PackedSource, Publication, RefitError, Source};

use crate::source::SourceRank;

pub use self::counted::Counted;
pub use self::direct::Direct;
pub use self::engine::{Engine, EngineError, Unattended};
pub use self::error::RankError;
pub use self::shadow::Shadow;

/// Of both kinds of source alike.
macro_rules! source_rank {
    ($($rank:ident),*) => { $(
        impl<T: Transport> SourceRank for $rank<T> {
            fn publication(&self) -> Result<Publication, RefitError> {
                Self::publication(self)
            }

            fn digests(&self, request: &DigestRequest) -> Result<Digests, RefitError> {
                Self::digests(self, request)
            }

            fn begin(&mut self) -> Result<(), RefitError> {
                // Without a commit the header stays as it is now.
                self.begin_update().map(drop)
            }

            fn commit(&mut self, version: u64) -> Result<Expected, RefitError> {
                self.begin_update()?.commit(version)
            }
        }
    )* };
}

source_rank!(Source, PackedSource);
