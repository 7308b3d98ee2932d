//! One rank of a bench: a source that writes values, or a target that refits, verifies and measures ceilings.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use refit::planner::{Band, Dtype, LayoutBuilder, LowerOptions, Param, Policy, RankLayout};
use refit::pool::{HostAllocator, PoolOptions};
use refit::transport::{Transport, TransportPool, TransportRegistrar};
use refit::{
    Directory, Place, Publication, PublishedRegion, RefitError, Report, Source, Target,
    TargetOptions, allocate,
};

use super::protocol::{Command, Mode, RankReport, Reply};
use super::values;
use crate::error::CliError;
use crate::model;
use crate::sizes::{SourceSizes, TargetSizes};

/// Everything a rank needs to know.
#[derive(Clone, Debug)]
pub(crate) struct RankSetup {
    pub(crate) config: String,
    pub(crate) layers: u32,
    pub(crate) source: SourceSizes,
    pub(crate) target: TargetSizes,
    pub(crate) rank: u32,
    pub(crate) directory: PathBuf,
    /// Whether this rank has a process of its own, whose memory means something.
    pub(crate) own_process: bool,
    /// MiB that a wave may stage; 0 for everything at once.
    pub(crate) wave: u64,
    /// How long a pull may take.
    pub(crate) patience: Duration,
}

impl RankSetup {
    fn layout(&self, layouts: Vec<RankLayout>) -> Result<RankLayout, CliError> {
        let missing = || CliError::Usage(format!("there is no rank {} in these sizes", self.rank));
        layouts.into_iter().find(|layout| layout.rank() == self.rank).ok_or_else(missing)
    }

    fn model(&self) -> Result<refit::translate::ModelConfig, CliError> {
        let mut config = model::config(&self.config)?;
        config.num_layers = self.layers;
        Ok(config)
    }
}

/// Serves a source rank until told to stop. `answer` is called once per command, and once before the first.
pub(crate) fn source<T: Transport>(
    setup: &RankSetup,
    transport: Arc<T>,
    commands: impl Iterator<Item = Command>,
    mut answer: impl FnMut(Reply),
) -> Result<(), CliError> {
    let layout = setup.layout(model::source(&setup.model()?, setup.source)?)?;
    let pool = TransportPool::new(
        HostAllocator,
        TransportRegistrar::new(transport.clone()),
        PoolOptions::default(),
    );
    let mut source =
        Source::new(transport, &pool, layout.clone(), allocate(&layout, &HostAllocator)?)?;
    values::fill(&layout, source.params_mut(), 0)?;
    let directory = Directory::new(&setup.directory).map_err(RefitError::from)?;
    directory.publish(&source.publication()?).map_err(RefitError::from)?;
    answer(Reply::Ready);
    for command in commands {
        match command {
            Command::Fill { cycle } => values::fill(&layout, source.params_mut(), cycle)?,
            Command::Stop => break,
            other => return Err(CliError::Usage(format!("a source cannot {other:?}"))),
        }
        answer(Reply::Done);
    }
    Ok(())
}

/// Serves a target rank until told to stop.
pub(crate) fn target<T: Transport>(
    setup: &RankSetup,
    transport: Arc<T>,
    commands: impl Iterator<Item = Command>,
    mut answer: impl FnMut(Reply),
) -> Result<(), CliError> {
    let layout = model::target(&setup.model()?, setup.target)?.into_iter();
    let layout = setup.layout(layout.map(|target| target.layout).collect())?;
    let directory = Directory::new(&setup.directory).map_err(RefitError::from)?;
    let sources = 0..setup.source.world();
    let published = directory.wait(sources, setup.patience).map_err(RefitError::from)?;

    let pool = TransportPool::new(
        HostAllocator,
        TransportRegistrar::new(transport.clone()),
        PoolOptions::default(),
    );
    let mut params = allocate(&layout, &HostAllocator)?;
    for (_, memory) in &mut params {
        memory.host_bytes_mut().into_iter().for_each(|bytes| bytes.fill(values::POISON));
    }
    let target = Target::new(
        transport.clone(),
        pool.clone(),
        layout.clone(),
        params,
        TargetOptions::default(),
    )?;
    let mut bench = TargetBench {
        setup,
        published,
        pool,
        transport,
        layout,
        target: Some(target),
        ceiling: None,
    };
    answer(Reply::Ready);
    for command in commands {
        let reply = match command {
            Command::Refit { mode } => Reply::Refit(Box::new(bench.refit(mode)?)),
            Command::Verify { cycle } => {
                let target = bench.target.as_ref().ok_or_else(lost)?;
                values::verify(&bench.layout, target.params(), cycle)?;
                Reply::Done
            }
            Command::BigRead => bench.big_read()?,
            Command::Memcpy => bench.memcpy()?,
            Command::Stop => break,
            Command::Fill { .. } => return Err(CliError::Usage("a target cannot fill".to_owned())),
        };
        answer(reply);
    }
    Ok(())
}

struct TargetBench<'a, T: Transport> {
    setup: &'a RankSetup,
    published: Vec<Publication>,
    pool: TransportPool<T>,
    transport: Arc<T>,
    layout: RankLayout,
    /// Absent only inside a refit, or after one failed.
    target: Option<Target<T>>,
    ceiling: Option<Ceiling<T>>,
}

/// A target that reads as many bytes from each source as a refit does, in one read: the link's own rate, measured
/// through the same code.
struct Ceiling<T: Transport> {
    target: Option<Target<T>>,
    published: Vec<Publication>,
}

impl<T: Transport> TargetBench<'_, T> {
    fn refit(&mut self, mode: Mode) -> Result<RankReport, CliError> {
        let mut target = self.target.take().ok_or_else(lost)?;
        let policy = if mode == Mode::ReadPerRun { Policy::ReadPerRun } else { Policy::Cheapest };
        let wave_bytes = self.setup.wave.checked_mul(1 << 20).filter(|bytes| *bytes > 0);
        let lower = LowerOptions::default()
            .with_policy(policy)
            .with_wave_bytes(wave_bytes.unwrap_or(u64::MAX));
        target.set_options(TargetOptions::default().with_lower(lower));
        if mode == Mode::Uncached {
            target.forget_plans();
            self.pool.clear();
        }
        let (target, report) = cycle(target, &self.published, self.setup.patience)?;
        self.target = Some(target);
        let peak = if self.setup.own_process { crate::memory::peak_bytes()? } else { 0 };
        Ok(RankReport::new(self.setup.rank, &report, self.layout.bytes(), peak))
    }

    fn ceiling(&mut self) -> Result<&mut Ceiling<T>, CliError> {
        if self.ceiling.is_none() {
            let program = self.target.take().ok_or_else(lost)?.prepare(&self.published)?;
            let mut bytes = std::collections::BTreeMap::<u32, u64>::new();
            for read in program.program().reads() {
                let rank = program.program().sources()[read.source as usize].rank;
                *bytes.entry(rank).or_default() += read.bytes();
            }
            self.target = match program.cancel() {
                refit::Cancelled::Whole(target) => Some(target),
                refit::Cancelled::Invalid(_) => return Err(lost()),
            };
            self.ceiling = Some(self.build_ceiling(&bytes)?);
        }
        self.ceiling.as_mut().ok_or_else(lost)
    }

    fn build_ceiling(
        &self,
        bytes: &std::collections::BTreeMap<u32, u64>,
    ) -> Result<Ceiling<T>, CliError> {
        let mut wanted = LayoutBuilder::new(self.setup.rank);
        let mut published = Vec::new();
        for publication in &self.published {
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
                vec![Place { address, cuda }],
                publication.regions().to_vec(),
            );
            published.push(published_arena.map_err(RefitError::from)?);
        }
        let wanted = wanted.build();
        let pool = TransportPool::new(
            HostAllocator,
            TransportRegistrar::new(self.transport.clone()),
            PoolOptions::default(),
        );
        let params = allocate(&wanted, &HostAllocator)?;
        let target =
            Target::new(self.transport.clone(), pool, wanted, params, TargetOptions::default())?;
        // The first read touches the memory and builds the read; it is not counted.
        let (target, _) = cycle(target, &published, self.setup.patience)?;
        Ok(Ceiling { target: Some(target), published })
    }

    fn big_read(&mut self) -> Result<Reply, CliError> {
        let patience = self.setup.patience;
        let ceiling = self.ceiling()?;
        let target = ceiling.target.take().ok_or_else(lost)?;
        // Twice, and the second counts: a refit finds its memory warm from verifying, so a ceiling must as well.
        let (target, _) = cycle(target, &ceiling.published, patience)?;
        let (target, report) = cycle(target, &ceiling.published, patience)?;
        ceiling.target = Some(target);
        Ok(Reply::Rate { bytes: report.wire_bytes, seconds: report.pull.as_secs_f64() })
    }

    fn memcpy(&mut self) -> Result<Reply, CliError> {
        let target = self.ceiling()?.target.as_mut().ok_or_else(lost)?;
        let (mut bytes, mut seconds) = (0, 0.0);
        for (_, memory) in target.params_mut() {
            let buffer = memory.host_bytes_mut().ok_or_else(lost)?;
            let (into, from) = buffer.split_at_mut(buffer.len() / 2);
            let from = &from[..into.len()];
            let started = Instant::now();
            into.copy_from_slice(from);
            seconds += started.elapsed().as_secs_f64();
            bytes += into.len() as u64;
        }
        Ok(Reply::Rate { bytes, seconds })
    }
}

/// One refit, whatever way it finds its buffers.
fn cycle<T: Transport>(
    target: Target<T>,
    published: &[Publication],
    patience: Duration,
) -> Result<(Target<T>, Report), CliError> {
    let pulling = target.prepare(published)?.pull()?;
    Ok(pulling.wait(Instant::now() + patience)?.land()?.install().refreshed())
}

fn lost() -> CliError {
    CliError::Usage("the target was lost in an earlier failure".to_owned())
}
