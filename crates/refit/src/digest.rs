//! Digests of what a refit reads: a source answers for its bytes as a target is to hold them, and the target compares what
//! it has landed. What a wire, a landing or a plan got wrong differs; a source that lies about its own bytes does not.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

mod hash;
mod request;
pub(crate) mod verify;

use refit_planner::RankLayout;
use serde::{Deserialize, Serialize};

use crate::error::RefitError;
use crate::header::Stamp;

pub(crate) use self::hash::{Held, Work, hash_all};
pub(crate) use self::request::{Asked, Piece};
pub use self::request::{DigestRequest, DigestRequestError, MAX_DIGEST_REQUEST_BYTES};

/// Bytes that a source hashes for one request, at most, as a multiple of what it holds: no plan reads more of it.
const MOST_TIMES: u64 = 8;

/// A source rank's answer to a [`DigestRequest`]: of one version, to be compared by [`Landed::verify`].
///
/// [`Landed::verify`]: crate::Landed::verify
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// The source rank.
    pub rank: u32,
    /// Its incarnation.
    pub incarnation: u128,
    /// What its parameters were.
    pub stamp: Stamp,
    /// The [`digest`](DigestRequest::digest) of the request that this answers.
    pub request: [u8; 32],
    /// XXH3-64 of every segment that was asked for, in that order.
    pub values: Vec<u64>,
}

/// Checks that all of a request that asks this rank lies in its parameters, and pairs it with the memory. `find` says
/// where a parameter lies, by its index in the layout.
pub(crate) fn work_of<'a>(
    request: &'a DigestRequest,
    layout: &RankLayout,
    find: impl Fn(usize) -> Result<Held<'a>, RefitError>,
) -> Result<Vec<Work<'a>>, RefitError> {
    let rank = layout.rank();
    let most = layout.bytes().saturating_mul(MOST_TIMES);
    let mut left = most;
    let mut work = Vec::new();
    for Asked { param, pieces } in request.asked(rank) {
        let unknown = || RefitError::UnknownSourceParam { rank, param: param.to_string() };
        let index = layout
            .params()
            .binary_search_by(|held| held.name().as_ref().cmp(param))
            .map_err(|_| unknown())?;
        let (held, bytes) = (find(index)?, layout.params()[index].bytes());
        for piece in pieces {
            let Piece { offset, run, dims, transform } = piece;
            let end = offset.checked_add(dims.source_extent(*run)).filter(|end| *end <= bytes);
            let outside = || RefitError::AskedOutside { rank, param: param.to_string(), bytes };
            end.ok_or_else(outside)?;
            let asked = run.saturating_mul(dims.runs());
            left = left.checked_sub(asked).ok_or(RefitError::AskedTooMuch { rank, most })?;
            work.push(Work {
                held,
                offset: *offset,
                run: *run,
                dims,
                stride: |dim| dim.source_stride,
                transform: *transform,
                value: 0,
            });
        }
    }
    Ok(work)
}
