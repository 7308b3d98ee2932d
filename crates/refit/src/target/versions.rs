//! Which version the bytes are that a refit reads: the headers of its sources, before and after.

use refit_planner::Program;
use refit_transport::{Transport, TransportLease};

use super::{Inner, InvalidTarget, Landed, Prepared, Refit};
use crate::bind;
use crate::digest::{DigestRequest, Digests, verify};
use crate::error::RefitError;
use crate::header::{self, Expected, HEADER_BYTES, Header, Read, Stamp};
use crate::publication::Publication;
use crate::target::Failed;

/// What is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Headers, to know what there is to read.
    Before,
    /// Data, wave after wave.
    Data,
    /// Headers, after the last of the data has arrived: reads that are under way together come in any order.
    After,
}

/// A source rank, and what its header has to say when its data has been read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watched {
    rank: u32,
    incarnation: u128,
    /// Nothing until that is known, by an announcement or from the header itself.
    stamp: Option<Stamp>,
}

impl Watched {
    /// All ranks that a program reads from, ascending.
    pub(super) fn all(program: &Program, publications: &[Publication]) -> Vec<Self> {
        let of_rank = |rank| publications.iter().find(|publication| publication.rank() == rank);
        let watched = |publication: &Publication| Self {
            rank: publication.rank(),
            incarnation: publication.header().incarnation,
            stamp: None,
        };
        bind::ranks(program).filter_map(of_rank).map(watched).collect()
    }

    /// Whether the header of this incarnation was found.
    fn same(&self, found: u128) -> Result<(), RefitError> {
        let Self { rank, incarnation: expected, .. } = *self;
        if found == expected {
            return Ok(());
        }
        let (expected, found) = (expected.into(), found.into());
        Err(RefitError::StaleIncarnation { rank, expected, found })
    }

    /// Looks at a header, and notes what it says if that was not known.
    fn look(&mut self, bytes: &[u8; HEADER_BYTES]) -> Result<(), RefitError> {
        let Self { rank, stamp: expected, .. } = *self;
        let torn = |found| Err(RefitError::Torn { rank, expected, found });
        let Header { incarnation, stamp } = match Header::decode(bytes) {
            Read::Whole(header) => header,
            Read::Mixed(header) => return torn(header.stamp),
            Read::Other => return Err(RefitError::NoHeader { rank }),
        };
        self.same(incarnation)?;
        if !stamp.is_stable() || expected.is_some_and(|expected| expected != stamp) {
            return torn(stamp);
        }
        self.stamp = Some(stamp);
        Ok(())
    }
}

/// Whether all ranks hold one version, as far as that is known.
fn one_version(watched: &[Watched]) -> Result<(), RefitError> {
    let mut known =
        watched.iter().filter_map(|watched| Some((watched.rank, watched.stamp?.version)));
    let Some((other, other_version)) = known.next() else { return Ok(()) };
    match known.find(|(_, version)| *version != other_version) {
        Some((rank, version)) => {
            Err(RefitError::MixedVersions { rank, version, other, other_version })
        }
        None => Ok(()),
    }
}

impl<T: Transport> Prepared<T> {
    /// What the sources would have to hash, for [`Landed::verify`] to compare. It stays the same for as long as nothing is
    /// planned anew.
    #[must_use]
    pub fn digest_request(&self) -> DigestRequest {
        DigestRequest::new(&self.refit.inner.planned[0].plan)
    }

    /// Reads nothing but what was announced: the refit fails if a source, when its data has been read, is not of this
    /// incarnation, or not at this epoch and version. Headers are then read once, after the data; otherwise before it
    /// as well, to know what they have to say.
    ///
    /// Ranks that are not read from may be among them.
    ///
    /// # Errors
    /// [`RefitError::NotExpected`] for a rank that is read from and not in there, or twice;
    /// [`RefitError::StaleIncarnation`] when what was announced is not what has published;
    /// [`RefitError::MixedVersions`] when it is not one version. The refit comes back as it was.
    pub fn expecting(mut self, expected: &[Expected]) -> Result<Self, Failed<Box<Self>>> {
        match self.refit.watched.iter().map(|watched| expect(*watched, expected)).collect() {
            Ok(watched) => {
                let watched: Vec<Watched> = watched;
                if let Err(error) = one_version(&watched) {
                    return Err(Failed { error, state: Box::new(self) });
                }
                self.refit.watched = watched;
                self.refit.phase = Phase::Data;
                Ok(self)
            }
            Err(error) => Err(Failed { error, state: Box::new(self) }),
        }
    }
}

fn expect(watched: Watched, expected: &[Expected]) -> Result<Watched, RefitError> {
    let rank = watched.rank;
    let mut said = expected.iter().filter(|expected| expected.rank == rank);
    let (Some(first), None) = (said.next(), said.next()) else {
        let times = expected.iter().filter(|expected| expected.rank == rank).count();
        return Err(RefitError::NotExpected { rank, times });
    };
    watched.same(first.incarnation)?;
    Ok(Watched { stamp: Some(first.stamp()), ..watched })
}

impl<T: Transport> Landed<T> {
    /// Compares all that has landed with what the sources say of it: one [`Digests`] for every rank that was read from,
    /// of the version that was read.
    ///
    /// # Errors
    /// [`RefitError::Corrupt`] names the first segment that differs, or that is not zero where it has to be;
    /// [`RefitError::NoDigests`], [`RefitError::OtherDigests`], [`RefitError::StaleIncarnation`] and
    /// [`RefitError::Torn`] mean that the answers are not to this question. All of them leave live parameters that
    /// nobody has vouched for.
    pub fn verify(self, answers: &[Digests]) -> Result<Self, Failed<InvalidTarget<T>>> {
        let Refit { inner, watched, .. } = &self.refit;
        let landed: Vec<verify::Landed> = watched
            .iter()
            .map(|&Watched { rank, incarnation, stamp }| verify::Landed {
                rank,
                incarnation,
                stamp,
            })
            .collect();
        let Inner { planned, live, device, reach, .. } = &**inner;
        match verify::verify(&planned[0].plan, &landed, answers, live, device.as_ref(), reach) {
            Ok(()) => Ok(self),
            Err(error) => Err(Failed { error, state: InvalidTarget(self.refit.inner) }),
        }
    }
}

impl<T: Transport> Refit<T> {
    /// Looks at the headers that have arrived.
    pub(super) fn look(&mut self, lease: &TransportLease<T>) -> Result<(), RefitError> {
        let Self { inner, watched, program, report, .. } = self;
        let Inner { device, reach, .. } = &**inner;
        let (mut at, _) = bind::headers(program);
        for watched in watched.iter_mut() {
            let arena = lease.arenas().first().ok_or(RefitError::NoStaging)?;
            let mut bytes = [0; HEADER_BYTES];
            // A program's staging was allocated, so its size is one of memory.
            let offset = usize::try_from(at).unwrap_or(usize::MAX);
            reach.read(arena, offset, &mut bytes, device.as_ref(), header::NAME)?;
            watched.look(&bytes)?;
            at += HEADER_BYTES as u64;
        }
        one_version(watched)?;
        report.version =
            watched.first().and_then(|watched| watched.stamp).map(|stamp| stamp.version);
        Ok(())
    }
}
