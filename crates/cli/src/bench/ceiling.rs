//! What the machine can do at most, measured beside the refits.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use refit::planner::{Band, Dtype, LayoutBuilder, Param, Program};
use refit::pool::PoolOptions;
use refit::transport::{Transport, TransportPool, TransportRegistrar};
use refit::{
    Expected, Place, Publication, PublishedRegion, RefitError, Report, Target, TargetOptions,
    allocate,
};

use super::protocol::{Rate, Reply};
use super::rank::{cycle, lost};
use crate::device::Home;
use crate::error::CliError;

/// A target that reads as many bytes from each source as a refit does, in one read: the link's own rate, measured
/// through the same code.
#[derive(Debug)]
pub(super) struct Ceiling<T: Transport> {
    target: Option<Target<T>>,
    published: Vec<Publication>,
    patience: Duration,
}

/// The bytes that a program reads from each source rank.
pub(super) fn bytes_by_source(program: &Program) -> BTreeMap<u32, u64> {
    let mut bytes = BTreeMap::new();
    for read in program.reads() {
        let rank = program.sources()[read.source as usize].rank;
        *bytes.entry(rank).or_default() += read.bytes();
    }
    bytes
}

impl<T: Transport> Ceiling<T> {
    /// A ceiling for a target `rank` that reads these bytes from the largest allocation of each source.
    pub(super) fn new(
        home: &Home,
        transport: &Arc<T>,
        rank: u32,
        (sources, announced): (&[Publication], Option<&[Expected]>),
        bytes: &BTreeMap<u32, u64>,
        patience: Duration,
    ) -> Result<Self, CliError> {
        let mut wanted = LayoutBuilder::new(rank);
        let mut published = Vec::new();
        for publication in sources {
            let Some(&bytes) = bytes.get(&publication.rank()) else { continue };
            let largest =
                publication.regions().iter().max_by_key(|region| region.len).ok_or_else(lost)?;
            let name = format!("arena.{}", publication.rank());
            let whole = |layout: &mut LayoutBuilder, held: u64| {
                let tensor = layout.tensor(&name, largest.len, 1)?;
                let band = Band::new(tensor, 0..held, 0..1);
                layout.param(Param::new(name.as_str(), Dtype::U8, held, 1).band(band)).map(|_| ())
            };
            let mut arena = LayoutBuilder::new(publication.rank());
            whole(&mut arena, largest.len).map_err(RefitError::from)?;
            whole(&mut wanted, bytes.min(largest.len)).map_err(RefitError::from)?;
            let PublishedRegion { address, cuda, .. } = *largest;
            let published_arena = Publication::new(
                publication.agent().to_owned(),
                publication.metadata().to_vec(),
                arena.build(),
                publication.header(),
                vec![Place { address, cuda }],
                publication.regions().to_vec(),
            );
            published.push(published_arena.map_err(RefitError::from)?);
        }
        let wanted = wanted.build();
        let pool = TransportPool::new(
            home.clone(),
            TransportRegistrar::new(transport.clone()),
            PoolOptions::default(),
        );
        let params = allocate(&wanted, home)?;
        let target =
            Target::new(transport.clone(), pool, wanted, params, TargetOptions::default())?;
        let target = home.equip(target)?;
        // The first read touches the memory and builds the read; it is not counted.
        let (target, _) = cycle(target, &published, announced, patience)?;
        Ok(Self { target: Some(target), published, patience })
    }

    /// Reads once, to measure.
    pub(super) fn read(&mut self, announced: Option<&[Expected]>) -> Result<Reply, CliError> {
        // Twice, and the second counts: a refit finds its memory warm from verifying, so a ceiling must as well.
        self.once(announced)?;
        let report = self.once(announced)?;
        let seconds = report.pull.as_secs_f64();
        Ok(Reply::Rate(Rate { bytes: report.wire_bytes, seconds }))
    }

    fn once(&mut self, announced: Option<&[Expected]>) -> Result<Report, CliError> {
        let target = self.target.take().ok_or_else(lost)?;
        let (target, report) = cycle(target, &self.published, announced, self.patience)?;
        self.target = Some(target);
        Ok(report)
    }

    /// Copies from one half of what is read to the other.
    pub(super) fn memcpy(&mut self, home: &Home) -> Result<Reply, CliError> {
        let target = self.target.as_mut().ok_or_else(lost)?;
        let (mut bytes, mut time) = (0, Duration::ZERO);
        for (_, memory) in target.params_mut() {
            let half = memory.len() / 2;
            time += home.copy_half(memory)?;
            bytes += half as u64;
        }
        Ok(Reply::Rate(Rate { bytes, seconds: time.as_secs_f64() }))
    }
}
