//! `Source`: a trainer's rank.

mod keeper;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping};
use refit::pool::PoolOptions;
use refit::translate::bands::Side;
use refit::transport::{Transport, TransportPool, TransportRegistrar};
use refit_service::Seats;
use refit_service::source::{GroupRank, LiveSource, SourceOptions};

use self::keeper::Keeper;
use crate::agent::{self, Agents, Begin};
use crate::data::seconds;
use crate::desk::Desk;
use crate::entry::{Entered, Meeting, Said};
use crate::failure::{Failure, Kind};
use crate::home::Home;
use crate::layout::Layout;
use crate::report::Figures;

/// One rank of a trainer, whose parameters others read.
#[derive(Debug)]
#[pyclass(module = "refit_rl._core", frozen, weakref)]
pub(crate) struct Source {
    desk: Arc<Desk<Box<dyn Serving>>>,
    rank: u32,
    drain: Duration,
    _keeper: Keeper,
}

/// A source over whichever transport.
trait Serving: Send + std::fmt::Debug {
    /// Joins again where the store took this process for dead.
    fn stay(&mut self, deadline: Instant) -> Result<(), Failure>;

    fn begin(&mut self, deadline: Instant) -> Result<(), Failure>;

    fn commit(&mut self, version: u64) -> Result<(), Failure>;

    /// The version on offer.
    fn offered(&self) -> Option<u64>;

    fn is_updating(&self) -> bool;

    fn answer(&mut self) -> Result<(), Failure>;

    fn figures(&self) -> Figures;

    /// Withdraws, and says how many readers were left.
    fn leave(self: Box<Self>, deadline: Instant) -> Result<usize, Failure>;
}

#[pymethods]
impl Source {
    #[new]
    #[pyo3(signature = (
        rendezvous, layout, tensors, *, model, ranks = 1, group = "trainer".to_owned(), job = "refit".to_owned(),
        key_file = None, transport = "auto", insecure_tcp = None, timeout = 30.0, ttl = 10.0, lease = 30.0, drain = 10.0
    ))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments")]
    fn new(
        py: Python<'_>,
        rendezvous: &str,
        layout: &Layout,
        tensors: &Bound<'_, PyMapping>,
        model: String,
        ranks: u32,
        group: String,
        job: String,
        key_file: Option<PathBuf>,
        transport: &str,
        insecure_tcp: Option<String>,
        timeout: f64,
        ttl: f64,
        lease: f64,
        drain: f64,
    ) -> PyResult<Self> {
        let rank = layout.layout().rank();
        let drain = seconds("drain", drain)?;
        let most_lease = seconds("lease", lease)?;
        let options = SourceOptions::default().with_most_lease(most_lease).with_drain(drain);
        let entry = Said {
            rendezvous,
            layout,
            tensors,
            model,
            group,
            ranks,
            job,
            key_file,
            transport,
            insecure_tcp,
            timeout,
            ttl,
        };
        let entry = entry.read(py, Side::Source)?;
        let (desk, keeper) = py.detach(move || {
            let (wish, entered) = entry.enter(true)?;
            // Often enough to be there again before a reader's patience ends.
            let look = entered.ttl / 3;
            let desk = Arc::new(Desk::new(agent::begin(wish, Join { entered, options })?));
            let keeper = Keeper::new(&desk, look)?;
            Ok::<_, Failure>((desk, keeper))
        })?;
        Ok(Self { desk, rank, drain, _keeper: keeper })
    }

    #[getter]
    fn rank(&self) -> u32 {
        self.rank
    }

    #[getter]
    fn version(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        Ok(py.detach(|| self.desk.with(|live| Ok(live.offered())))?)
    }

    #[pyo3(signature = (timeout = 30.0))]
    fn begin_update(&self, py: Python<'_>, timeout: f64) -> PyResult<()> {
        let within = seconds("timeout", timeout)?;
        Ok(py.detach(|| self.desk.with(|live| live.begin(Instant::now() + within)))?)
    }

    fn commit(&self, py: Python<'_>, version: u64) -> PyResult<()> {
        Ok(py.detach(|| {
            self.desk.with(|live| {
                if !live.is_updating() {
                    let text = "no update was begun: call begin_update before anything is written";
                    return Err(Failure::new(Kind::NotFenced, text).rank(self.rank));
                }
                live.commit(version)
            })
        })?)
    }

    #[pyo3(signature = (version, timeout = 30.0))]
    fn publish(&self, py: Python<'_>, version: u64, timeout: f64) -> PyResult<()> {
        let within = seconds("timeout", timeout)?;
        Ok(py.detach(|| {
            self.desk.with(|live| {
                if let Some(open) = live.offered() {
                    let text = format!(
                        "version {open} is on offer: what was written since may have been read half done; call \
                         begin_update before writing"
                    );
                    return Err(Failure::new(Kind::NotFenced, text).rank(self.rank));
                }
                live.begin(Instant::now() + within)?;
                live.commit(version)
            })
        })?)
    }

    #[pyo3(signature = (version = None, timeout = 30.0))]
    fn updating(slf: Py<Self>, version: Option<u64>, timeout: f64) -> PyResult<Updating> {
        seconds("timeout", timeout)?;
        Ok(Updating { source: slf, version, timeout })
    }

    fn answer(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| self.desk.with(|live| live.answer()))?)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        py.detach(|| self.desk.with(|live| Ok(live.figures())))?.to_dict(py)
    }

    #[pyo3(signature = (timeout = None))]
    fn close(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<usize> {
        let within = timeout.map_or(Ok(self.drain), |timeout| seconds("timeout", timeout))?;
        Ok(py.detach(|| match self.desk.take()? {
            None => Ok(0),
            Some(live) => live.leave(Instant::now() + within),
        })?)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_args))]
    fn __exit__(&self, py: Python<'_>, _args: &Bound<'_, PyAny>) -> PyResult<()> {
        self.close(py, None).map(drop)
    }

    fn __repr__(&self) -> String {
        format!("<Source rank {}>", self.rank)
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // It waits for readers, and nobody else of Python may have to.
        Python::attach(|py| py.detach(|| drop(self.desk.take())));
    }
}

/// From `begin_update` to `commit`, as a `with` block.
#[derive(Debug)]
#[pyclass(module = "refit_rl._core", frozen)]
pub(crate) struct Updating {
    source: Py<Source>,
    version: Option<u64>,
    timeout: f64,
}

#[pymethods]
impl Updating {
    fn __enter__(&self, py: Python<'_>) -> PyResult<Py<Source>> {
        self.source.get().begin_update(py, self.timeout)?;
        Ok(self.source.clone_ref(py))
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        if !kind.is_none() {
            return Ok(());
        }
        let source = self.source.get();
        let updating = py.detach(|| source.desk.with(|live| Ok(live.is_updating())))?;
        match (updating, self.version) {
            (false, _) => Ok(()),
            (true, Some(version)) => source.commit(py, version),
            (true, None) => {
                let text = "the update ends and nothing was committed: call commit(version) in its body, or give \
                            updating() the version";
                Err(Failure::new(Kind::NotFenced, text).rank(source.rank).into())
            }
        }
    }
}

/// What makes a source, once there is a transport.
struct Join {
    entered: Entered,
    options: SourceOptions,
}

impl Begin for Join {
    type Made = Box<dyn Serving>;

    fn over<T: Transport>(self, agents: Agents<T>) -> Result<Self::Made, Failure> {
        let Entered { seats, home, params, layout, group, ranks, within, .. } = self.entered;
        let transport = agents()?;
        let registrar = TransportRegistrar::new(transport.clone());
        let pool = TransportPool::new(home.clone(), registrar, PoolOptions::default());
        let at = GroupRank { group, rank: layout.rank(), ranks };
        let source = home.equip_source(refit::Source::new(transport, &pool, layout, params)?)?;
        let deadline = Instant::now() + within;
        let live = LiveSource::join(seats.take()?, at, source, self.options, deadline)?;
        Ok(Box::new(Live { live, seats, home, pool, within, updating: false }))
    }
}

#[derive(Debug)]
struct Live<T: Transport> {
    live: LiveSource<Meeting, refit::Source<T>>,
    seats: Seats<Meeting>,
    home: Home,
    pool: TransportPool<T>,
    /// What joining may take.
    within: Duration,
    /// Whether the parameters may be written.
    updating: bool,
}

impl<T: Transport> Live<T> {
    fn rejoin(&mut self, deadline: Instant) -> Result<(), Failure> {
        Ok(self.live.rejoin(self.seats.take()?, deadline)?)
    }
}

impl<T: Transport> Serving for Live<T> {
    fn stay(&mut self, deadline: Instant) -> Result<(), Failure> {
        if self.live.has_vanished()? { self.rejoin(deadline) } else { Ok(()) }
    }

    fn begin(&mut self, deadline: Instant) -> Result<(), Failure> {
        if self.updating {
            return Ok(());
        }
        self.stay(deadline)?;
        // What was launched before this belongs to the version that is open.
        self.home.synchronize()?;
        let began = match self.live.begin_update(deadline) {
            Err(error) if error.is_session_ended() => {
                self.rejoin(deadline)?;
                self.live.begin_update(deadline).map(drop)
            }
            began => began.map(drop),
        };
        began?;
        self.updating = true;
        Ok(())
    }

    fn commit(&mut self, version: u64) -> Result<(), Failure> {
        self.home.synchronize()?;
        // The update was begun before, so this neither waits nor closes anything.
        let now = Instant::now();
        let committed = self.live.begin_update(now).and_then(|updating| updating.commit(version));
        match committed {
            Ok(()) => {}
            // What it says by now is whole, and of this version: joining again offers it.
            Err(error) if error.is_session_ended() => {
                self.rejoin(now + self.within)?;
                if self.live.offered() != Some(version) {
                    self.live.begin_update(now)?.commit(version)?;
                }
            }
            Err(error) => return Err(error.into()),
        }
        self.updating = false;
        Ok(())
    }

    fn offered(&self) -> Option<u64> {
        self.live.offered()
    }

    fn is_updating(&self) -> bool {
        self.updating
    }

    fn answer(&mut self) -> Result<(), Failure> {
        Ok(self.live.answer()?)
    }

    fn figures(&self) -> Figures {
        let (service, pool) = (*self.live.stats(), self.pool.stats());
        Figures { service, pool, ..Figures::default() }
    }

    fn leave(self: Box<Self>, deadline: Instant) -> Result<usize, Failure> {
        let Self { live, .. } = *self;
        let left = live.leave(deadline)?;
        let unreleased = left.unreleased.len();
        if unreleased > 0 {
            // Somebody may read this memory still; it goes with the process, and not before.
            std::mem::forget(left.source);
        }
        Ok(unreleased)
    }
}
