//! A target that serves what it holds: one more replica for those that come after it.

use std::sync::Arc;

use refit_planner::{ElementMap, LayoutBuilder, Plan, RankLayout, Transform};
use refit_pool::Memory;
use refit_transport::Transport;

use super::{Failed, Inner, Target};
use crate::digest::{DigestRequest, Digests};
use crate::error::RefitError;
use crate::header::{Expected, Header};
use crate::publication::Publication;
use crate::source::Source;

/// The version that a target holds, and how it came by it.
#[derive(Debug)]
pub(super) struct Installation {
    pub(super) version: u64,
    pub(super) plan: Arc<Plan>,
}

/// A target whose parameters are published: to other targets it is a source rank like any other. It serves as before, and
/// cannot be pulled into before it is [taken back](Self::take_back).
///
/// Lent is what the target holds as its sources hold it, byte for byte, so that it does not matter from whom it is read.
/// Parameters whose elements were converted or mapped on the way, and what the engine derives from parameters, stay
/// behind: they are [withheld](Self::withheld), and whoever needs them reads them from the trainer, or cannot be planned.
#[derive(Debug)]
pub struct Lent<T: Transport> {
    /// Dropped first: its registrations cover the parameters.
    source: Box<Source<T>>,
    inner: Box<Inner<T>>,
    /// What is not lent, by its index in the target's layout.
    withheld: Vec<(usize, Memory)>,
}

impl<T: Transport> Target<T> {
    /// Publishes the parameters under this rank, which must be no other source's of those who read them, as the version
    /// that was installed last.
    ///
    /// # Errors
    /// [`RefitError::NothingInstalled`] when the parameters are not as a refit left them; [`RefitError::NothingToLend`]
    /// when all of them were converted on the way; [`RefitError::Pool`] and [`RefitError::Device`] when there is no
    /// header. The target comes back as it was.
    pub fn lend(self, rank: u32) -> Result<Lent<T>, Failed<Self>> {
        lend(self.0, rank).map_err(|(error, inner)| Failed { error, state: Self(inner) })
    }
}

type Refused<T> = (RefitError, Box<Inner<T>>);

fn lend<T: Transport>(mut inner: Box<Inner<T>>, rank: u32) -> Result<Lent<T>, Refused<T>> {
    let Some(Installation { version, plan }) = &inner.installed else {
        return Err((RefitError::NothingInstalled, inner));
    };
    let (version, exact) = (*version, exact(&inner.layout, plan));
    let layout = match part(&inner.layout, rank, &exact) {
        Ok(layout) => layout,
        Err(error) => return Err((error, inner)),
    };
    let mut source = inner.lender.take().filter(|source| *source.layout() == layout);
    let (mut lent, mut withheld) = (Vec::new(), Vec::new());
    for (index, memory) in std::mem::take(&mut inner.live).into_iter().enumerate() {
        if exact[index] { lent.push(memory) } else { withheld.push((index, memory)) }
    }
    let device = inner.device.clone();
    if let Some(source) = &mut source {
        source.put_params(lent, device);
    } else {
        match Source::of(inner.transport.clone(), &inner.pool, layout, lent) {
            Ok(mut made) => {
                if let Err(error) = made.open() {
                    inner.live = merged(made.take_params(), withheld);
                    return Err((error, inner));
                }
                source = Some(Box::new(made));
            }
            Err(refused) => {
                let (error, lent) = *refused;
                inner.live = merged(lent, withheld);
                return Err((error, inner));
            }
        }
    }
    let Some(mut source) = source else { unreachable!("it was there or has been made") };
    match source.close(version) {
        Ok(_) => Ok(Lent { source, inner, withheld }),
        Err(error) => {
            // Nobody has been told of the header, or it says that nothing may be read.
            inner.live = merged(source.take_params(), withheld);
            inner.lender = Some(source);
            Err((error, inner))
        }
    }
}

impl<T: Transport> Lent<T> {
    /// What others need to read from this rank. Take it after everything on this agent is registered. It is the same every
    /// time that the target is lent under one rank.
    ///
    /// # Errors
    /// As [`Source::publication`].
    pub fn publication(&self) -> Result<Publication, RefitError> {
        self.source.publication()
    }

    /// What the version header says.
    #[must_use]
    pub fn header(&self) -> Header {
        self.source.header()
    }

    /// What others are to be told to expect of this rank.
    #[must_use]
    pub fn offered(&self) -> Option<Expected> {
        self.source.offered()
    }

    /// What is lent, under the rank that it is lent under.
    #[must_use]
    pub fn layout(&self) -> &RankLayout {
        self.source.layout()
    }

    /// The parameters that are not lent.
    pub fn withheld(&self) -> impl Iterator<Item = &str> {
        let params = self.inner.layout.params();
        self.withheld.iter().map(|(index, _)| params[*index].name().as_ref())
    }

    /// Every live parameter, by name.
    pub fn params(&self) -> impl Iterator<Item = (&str, &Memory)> {
        let params = self.inner.layout.params();
        let kept =
            self.withheld.iter().map(|(index, memory)| (params[*index].name().as_ref(), memory));
        self.source.params().chain(kept)
    }

    /// As [`Source::digests`], of what is lent.
    ///
    /// # Errors
    /// As [`Source::digests`].
    pub fn digests(&self, request: &DigestRequest) -> Result<Digests, RefitError> {
        self.source.digests(request)
    }

    /// Ends lending: whoever reads at this moment discards what it reads.
    ///
    /// # Errors
    /// [`RefitError::Device`] when the header is a device's and cannot be written: others may go on reading, so the
    /// target stays lent.
    pub fn take_back(mut self) -> Result<Target<T>, Failed<Box<Self>>> {
        if let Err(error) = self.source.open() {
            return Err(Failed { error, state: Box::new(self) });
        }
        let Self { mut source, mut inner, withheld } = self;
        inner.live = merged(source.take_params(), withheld);
        inner.lender = Some(source);
        Ok(Target(inner))
    }
}

/// Which parameters hold what sources hold: all of whose bytes were copied, by a plan that covers every byte.
fn exact(layout: &RankLayout, plan: &Plan) -> Vec<bool> {
    let plain = |param: &refit_planner::Param| param.element_map() == ElementMap::Identity;
    let mut exact: Vec<bool> = layout.params().iter().map(plain).collect();
    for segment in plan.segments() {
        if segment.transform != Transform::Copy {
            exact[segment.target as usize] = false;
        }
    }
    exact
}

/// Some parameters of a layout, under another rank.
fn part(layout: &RankLayout, rank: u32, keep: &[bool]) -> Result<RankLayout, RefitError> {
    if !keep.contains(&true) {
        return Err(RefitError::NothingToLend { params: keep.len() });
    }
    let mut part = LayoutBuilder::new(rank);
    // In their order, which gives them the numbers that bands know them by.
    for tensor in layout.tensors() {
        part.tensor(&tensor.name, tensor.rows, tensor.cols)?;
    }
    for (param, _) in layout.params().iter().zip(keep).filter(|(_, keep)| **keep) {
        part.param(param.clone())?;
    }
    Ok(part.build())
}

/// Parameters in the order of the layout again.
fn merged(lent: Vec<Memory>, withheld: Vec<(usize, Memory)>) -> Vec<Memory> {
    let mut merged = Vec::with_capacity(lent.len() + withheld.len());
    let (mut lent, mut withheld) = (lent.into_iter(), withheld.into_iter().peekable());
    loop {
        let next = withheld.next_if(|(index, _)| *index == merged.len()).map(|(_, memory)| memory);
        match next.or_else(|| lent.next()) {
            Some(memory) => merged.push(memory),
            None => return merged,
        }
    }
}
