//! One rank of a bench: a source that writes values, or a target that refits, verifies and measures ceilings.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use refit::planner::{Policy, RankLayout};
use refit::pool::PoolOptions;
use refit::transport::{Transport, TransportPool, TransportRegistrar};
use refit::{
    Cancelled, Expected, PackRequest, Prepared, Publication, Report, Source, Target, TargetOptions,
    allocate,
};

use super::ceiling::{Ceiling, bytes_by_source};
use super::copies::{Copies, Published};
use super::held::Held;
use super::meeting::{Meeting, meet};
use super::protocol::{Command, Description, Mode, RankReport, Reply};
use super::values::Values;
use crate::device::{Guards, Home};
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
    /// The GPU that holds its memory, or none where the host does.
    pub(crate) gpu: Option<u32>,
    /// Whether copies by a copy engine are measured beside the transport.
    pub(crate) copies: bool,
    /// Whether a source holds every parameter in an allocation of its own.
    pub(crate) separate: bool,
    pub(crate) directory: PathBuf,
    /// Whether this rank has a process of its own, whose memory means something.
    pub(crate) own_process: bool,
    /// Threads that write and compare values.
    pub(crate) threads: usize,
    /// MiB that a wave may stage; 0 for everything at once, none for what suits the memory.
    pub(crate) wave: Option<u64>,
    /// How long a pull may take.
    pub(crate) patience: Duration,
}

/// What a rank makes of its setup.
struct Ready {
    layout: RankLayout,
    values: Values,
}

impl RankSetup {
    /// Until when ranks wait for each other, from now.
    pub(super) fn deadline(&self) -> Result<Instant, CliError> {
        let too_long = || CliError::Usage("--patience is too long for a clock".to_owned());
        Instant::now().checked_add(self.patience).ok_or_else(too_long)
    }

    fn ready(&self, side: impl FnOnce(Sides) -> Vec<RankLayout>) -> Result<Ready, CliError> {
        let mut config = model::config(&self.config)?;
        config.num_layers = self.layers;
        let source = model::source(&config, self.source)?;
        let target = model::target(&config, self.target)?;
        let target: Vec<RankLayout> = target.into_iter().map(|target| target.layout).collect();
        let values = Values::new(&source, &target)?;
        let missing = || CliError::Usage(format!("there is no rank {} in these sizes", self.rank));
        let mut layouts = side(Sides { source, target }).into_iter();
        let layout = layouts.find(|layout| layout.rank() == self.rank).ok_or_else(missing)?;
        Ok(Ready { layout, values })
    }
}

struct Sides {
    source: Vec<RankLayout>,
    target: Vec<RankLayout>,
}

/// Serves a source rank until told to stop. `answer` is called once per command, and once before the first.
pub(crate) fn source<T: Transport>(
    setup: &RankSetup,
    home: &Home,
    transport: Arc<T>,
    commands: impl Iterator<Item = Command>,
    mut answer: impl FnMut(Reply),
) -> Result<(), CliError> {
    let Ready { layout, values } = setup.ready(|sides| sides.source)?;
    let pool = TransportPool::new(
        home.clone(),
        TransportRegistrar::new(transport.clone()),
        PoolOptions::default(),
    );
    let params = if setup.separate { home.separate(&layout)? } else { allocate(&layout, home)? };
    let source = Source::new(transport, &pool, layout.clone(), params)?;
    let params = source.params().map(|(_, memory)| memory);
    let _readable = setup.copies.then(|| Published::new(setup, home, params)).transpose()?;
    let meeting = meet(&setup.directory, "params")?;
    meeting.publish(&source.publication()?)?;
    let mut held = Held::Plain(Box::new(source));
    let fill = |held: &mut Held<T>, cycle| {
        held.update(cycle, |params| {
            values.fill(home, &layout, params.into_iter(), cycle, setup.threads)
        })
    };
    fill(&mut held, 0)?;
    answer(Reply::Ready);
    for command in commands {
        let reply = match command {
            Command::Fill { cycle } => fill(&mut held, cycle)?,
            Command::Pack => {
                held = held.pack(home, &pool, &meeting, setup.target.world(), setup.deadline()?)?;
                Reply::Done
            }
            Command::Stop => break,
            other => return Err(CliError::Usage(format!("a source cannot {other:?}"))),
        };
        answer(reply);
    }
    Ok(())
}

/// Serves a target rank until told to stop.
pub(crate) fn target<T: Transport>(
    setup: &RankSetup,
    home: &Home,
    transport: Arc<T>,
    commands: impl Iterator<Item = Command>,
    mut answer: impl FnMut(Reply),
) -> Result<(), CliError> {
    let Ready { layout, values } = setup.ready(|sides| sides.target)?;
    let meeting = meet(&setup.directory, "params")?;
    let published = meeting.wait(0..setup.source.world(), setup.deadline()?)?;

    let pool = TransportPool::new(
        home.clone(),
        TransportRegistrar::new(transport.clone()),
        PoolOptions::default(),
    );
    let (params, guards) = home.guarded(&layout)?;
    let target = Target::new(
        transport.clone(),
        pool.clone(),
        layout.clone(),
        params,
        TargetOptions::default(),
    )?;
    let target = home.equip(target)?;
    let mut bench = TargetBench {
        setup,
        home,
        published,
        pool,
        transport,
        layout,
        values,
        guards,
        target: Some(target),
        announced: Vec::new(),
        request: None,
        ceiling: None,
        copies: None,
    };
    answer(Reply::Ready);
    for command in commands {
        let reply = match command {
            Command::Refit { mode, announced } => {
                bench.announced = announced.into_iter().map(Expected::from).collect();
                Reply::Refit(Box::new(bench.refit(mode)?))
            }
            Command::Verify { cycle } => bench.verify(cycle)?,
            Command::Describe => Reply::Described(Box::new(bench.describe()?)),
            Command::BigRead => {
                let announced = bench.announced.clone();
                bench.ceiling()?.read(Some(&announced))?
            }
            Command::Copies => bench.copies()?.read()?,
            Command::Memcpy => bench.ceiling()?.memcpy(home)?,
            Command::Stop => break,
            Command::AskToPack => bench.ask_to_pack(&meeting)?,
            Command::MeetPacked => bench.meet_packed(&meeting)?,
            other => return Err(CliError::Usage(format!("a target cannot {other:?}"))),
        };
        answer(reply);
    }
    Ok(())
}

struct TargetBench<'a, T: Transport> {
    setup: &'a RankSetup,
    home: &'a Home,
    published: Vec<Publication>,
    pool: TransportPool<T>,
    transport: Arc<T>,
    layout: RankLayout,
    values: Values,
    guards: Guards,
    /// Absent only inside a refit, or after one failed.
    target: Option<Target<T>>,
    /// What the sources announced with the values that they hold.
    announced: Vec<Expected>,
    /// What was asked of the sources, after it was.
    request: Option<PackRequest>,
    ceiling: Option<Ceiling<T>>,
    copies: Option<Copies>,
}

impl<T: Transport> TargetBench<'_, T> {
    fn set_mode(&mut self, mode: Mode) -> Result<(), CliError> {
        let policy = if mode == Mode::ReadPerRun { Policy::ReadPerRun } else { Policy::Cheapest };
        let mut lower = self.home.lowering().with_policy(policy);
        if let Some(wave) = self.setup.wave {
            let bytes = wave.checked_mul(1 << 20).filter(|bytes| *bytes > 0);
            lower = lower.with_wave_bytes(bytes.unwrap_or(u64::MAX));
        }
        let target = self.target.as_mut().ok_or_else(lost)?;
        target.set_options(TargetOptions::default().with_lower(lower));
        Ok(())
    }

    fn refit(&mut self, mode: Mode) -> Result<RankReport, CliError> {
        self.set_mode(mode)?;
        let mut target = self.target.take().ok_or_else(lost)?;
        if mode == Mode::Uncached {
            target.forget_plans();
            self.pool.clear();
        }
        let (target, report) =
            cycle(target, &self.published, Some(&self.announced), self.setup.patience)?;
        self.target = Some(target);
        let host = self.setup.own_process && self.setup.gpu.is_none();
        let peak = if host { crate::memory::peak_bytes()? } else { 0 };
        Ok(RankReport::new(self.setup.rank, &report, self.layout.bytes(), peak))
    }

    /// Says what sources would have to pack.
    fn ask_to_pack(&mut self, meeting: &Meeting) -> Result<Reply, CliError> {
        self.set_mode(Mode::Cached)?;
        let target = self.target.as_mut().ok_or_else(lost)?;
        let request = target.pack_request(&self.published)?;
        meeting.ask(&request)?;
        self.request = Some(request);
        Ok(Reply::Done)
    }

    /// Reads from now on what sources have packed.
    fn meet_packed(&mut self, meeting: &Meeting) -> Result<Reply, CliError> {
        let request = self.request.as_ref().ok_or_else(lost)?;
        let (sources, deadline) = (0..self.setup.source.world(), self.setup.deadline()?);
        self.published = meeting.wait_until_packed(sources, request, deadline)?;
        Ok(Reply::Done)
    }

    fn verify(&self, cycle: u64) -> Result<Reply, CliError> {
        let target = self.target.as_ref().ok_or_else(lost)?;
        let threads = self.setup.threads;
        self.values.verify(self.home, &self.layout, target.params(), cycle, threads)?;
        self.guards.check(self.home, &self.layout)?;
        Ok(Reply::Done)
    }

    /// What the next refit would do, which it does not do.
    fn describe(&mut self) -> Result<Description, CliError> {
        self.set_mode(Mode::Cached)?;
        let prepared = self.target.take().ok_or_else(lost)?.prepare(&self.published)?;
        let mut description = Description::new(self.setup.rank, prepared.program());
        let target = cancelled(prepared)?;
        description.routes = target.routes().collect();
        self.target = Some(target);
        Ok(description)
    }

    /// The bytes that a refit reads from each source.
    fn bytes_by_source(&mut self) -> Result<BTreeMap<u32, u64>, CliError> {
        let prepared = self.target.take().ok_or_else(lost)?.prepare(&self.published)?;
        let bytes = bytes_by_source(prepared.program());
        self.target = Some(cancelled(prepared)?);
        Ok(bytes)
    }

    fn ceiling(&mut self) -> Result<&mut Ceiling<T>, CliError> {
        if self.ceiling.is_none() {
            let bytes = self.bytes_by_source()?;
            let RankSetup { rank, patience, .. } = *self.setup;
            let (home, transport, published) = (self.home, &self.transport, &self.published);
            self.ceiling = Some(Ceiling::new(
                home,
                transport,
                rank,
                (published, Some(self.announced.as_slice())),
                &bytes,
                patience,
            )?);
        }
        self.ceiling.as_mut().ok_or_else(lost)
    }

    fn copies(&mut self) -> Result<&mut Copies, CliError> {
        if self.copies.is_none() {
            let bytes = self.bytes_by_source()?;
            self.copies = Some(Copies::new(self.setup, self.home, &bytes)?);
        }
        self.copies.as_mut().ok_or_else(lost)
    }
}

fn cancelled<T: Transport>(prepared: Prepared<T>) -> Result<Target<T>, CliError> {
    match prepared.cancel() {
        Cancelled::Whole(target) => Ok(target),
        Cancelled::Invalid(_) => Err(lost()),
    }
}

/// One refit of what sources have announced, if they have, whatever way it finds its buffers.
pub(super) fn cycle<T: Transport>(
    target: Target<T>,
    published: &[Publication],
    announced: Option<&[Expected]>,
    patience: Duration,
) -> Result<(Target<T>, Report), CliError> {
    let mut prepared = target.prepare(published)?;
    if let Some(announced) = announced {
        prepared = prepared.expecting(announced)?;
    }
    let pulling = prepared.pull()?;
    Ok(pulling.wait(Instant::now() + patience)?.land()?.install().refreshed())
}

pub(super) fn lost() -> CliError {
    CliError::Usage("the target was lost in an earlier failure".to_owned())
}
