//! `Target`: an engine's rank.

mod rank;

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping};
use refit::translate::bands::Side;
use refit_service::reader::{Checks, ReaderOptions};
use refit_service::source::SourceOptions;

use self::rank::{Join, Live, Mode, Reading};
use crate::agent;
use crate::data::{one_of, seconds};
use crate::desk::Desk;
use crate::engine::{Callbacks, Notes};
use crate::entry::Said;
use crate::failure::{Failure, Kind};
use crate::layout::{Layout, actions_out};
use crate::report;

/// One rank of an engine, whose parameters are written.
#[derive(Debug)]
#[pyclass(module = "refit_rl._core", frozen, weakref)]
pub(crate) struct Target {
    desk: Desk<Box<dyn Reading>>,
    live: Live,
    notes: Notes,
    rank: u32,
    bytes: u64,
    /// How long one attempt to read goes on; half of a refresh's time where this does not say.
    attempt: Option<Duration>,
}

#[pymethods]
impl Target {
    #[new]
    #[pyo3(signature = (
        rendezvous, layout, tensors, *, model, ranks = 1, replica = "engine".to_owned(), mode = "staged", pause = None,
        post_actions = None, resume = None, checks = "never", job = "refit".to_owned(), key_file = None,
        transport = "auto", insecure_tcp = None, timeout = 30.0, ttl = 10.0, lease = 30.0, attempt = None, fanout = 16,
        relay = false, drain = 10.0
    ))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments")]
    fn new(
        py: Python<'_>,
        rendezvous: &str,
        layout: &Layout,
        tensors: &Bound<'_, PyMapping>,
        model: String,
        ranks: u32,
        replica: String,
        mode: &str,
        pause: Option<Py<PyAny>>,
        post_actions: Option<Py<PyAny>>,
        resume: Option<Py<PyAny>>,
        checks: &str,
        job: String,
        key_file: Option<PathBuf>,
        transport: &str,
        insecure_tcp: Option<String>,
        timeout: f64,
        ttl: f64,
        lease: f64,
        attempt: Option<f64>,
        fanout: u32,
        relay: bool,
        drain: f64,
    ) -> PyResult<Self> {
        let mode = one_of("mode", mode, &[("staged", Mode::Staged), ("direct", Mode::Direct)])?;
        let checks = one_of(
            "checks",
            checks,
            &[
                ("never", Checks::Never),
                ("if_answered", Checks::IfAnswered),
                ("always", Checks::Always),
            ],
        )?;
        let fanout = NonZeroU32::new(fanout)
            .ok_or_else(|| Failure::new(Kind::Config, "fanout is 0: nobody could read"))?;
        let lease = seconds("lease", lease)?;
        let options =
            ReaderOptions::default().with_lease(lease).with_fanout(fanout).with_checks(checks);
        let attempt = attempt.map(|attempt| seconds("attempt", attempt)).transpose()?;
        let drain = seconds("drain", drain)?;
        let offering = SourceOptions::default().with_most_lease(lease).with_drain(drain);
        let entry = Said {
            rendezvous,
            layout,
            tensors,
            model,
            group: replica,
            ranks,
            job,
            key_file,
            transport,
            insecure_tcp,
            timeout,
            ttl,
        };
        let entry = entry.read(py, Side::Target)?;
        let (rank, bytes) = (layout.layout().rank(), layout.layout().bytes());
        if let (None, [first, ..]) = (&post_actions, layout.actions()) {
            let text = format!(
                "the engine derives state from its parameters: give `post_actions`, a callback that carries out what \
                 `layout.post_actions` lists, such as: {first}"
            );
            return Err(Failure::new(Kind::Config, text).rank(rank).into());
        }
        let actions = layout.actions().to_vec();
        let (live, notes) = (Live::default(), Notes::default());
        let desk = py.detach({
            let (live, notes) = (live.clone(), notes.clone());
            move || {
                let (wish, entered) = entry.enter(relay)?;
                let home = entered.home.clone();
                let engine = Callbacks { pause, post_actions, resume, home, notes };
                let relay = relay.then_some(offering);
                let join = Join { entered, actions, mode, engine, options, relay, live };
                agent::begin(wish, join)
            }
        })?;
        Ok(Self { desk: Desk::new(desk), live, notes, rank, bytes, attempt })
    }

    #[getter]
    fn rank(&self) -> u32 {
        self.rank
    }

    #[getter]
    fn version(&self) -> Option<u64> {
        self.live.version()
    }

    #[pyo3(signature = (version = None, timeout = 30.0))]
    fn refresh<'py>(
        &self,
        py: Python<'py>,
        version: Option<u64>,
        timeout: f64,
    ) -> PyResult<Bound<'py, PyDict>> {
        let within = seconds("timeout", timeout)?;
        let (before, version, after, group, done, took) = py.detach(|| {
            self.desk.with(|rank| {
                let began = Instant::now();
                self.notes.clear();
                let at_least = version.unwrap_or_else(|| self.next());
                let before = rank.figures();
                // One that comes to nothing leaves time for another.
                rank.set_attempt(self.attempt.unwrap_or(within / 2));
                let version = match self.live.version() {
                    Some(live) if live >= at_least && rank.has_settled() => live,
                    _ => rank
                        .refresh(at_least, began + within)
                        .map_err(|failure| self.notes.blame(failure))?,
                };
                if let Some(failure) = self.notes.late() {
                    return Err(failure);
                }
                let after = rank.figures();
                // What was there already was read from nobody.
                let read = rank.read().filter(|_| after.service.refits > before.service.refits);
                let group = read.map(|read| read.group.clone());
                Ok((before, version, after, group, self.notes.done(), began.elapsed()))
            })
        })?;
        let out = PyDict::new(py);
        out.set_item("version", version)?;
        out.set_item("group", group)?;
        out.set_item("bytes", self.bytes)?;
        let since = |now: u64, before: u64| now.saturating_sub(before);
        out.set_item("wire_bytes", since(after.pulls.wire_bytes, before.pulls.wire_bytes))?;
        out.set_item("needed_bytes", since(after.pulls.needed_bytes, before.pulls.needed_bytes))?;
        out.set_item("reads", since(after.pulls.reads, before.pulls.reads))?;
        let seconds = report::seconds(py, before.pulls, after.pulls)?;
        seconds.set_item("total", took.as_secs_f64())?;
        out.set_item("seconds", seconds)?;
        let retries = report::retries(py, before.service.retries, after.service.retries)?;
        out.set_item("retries", retries)?;
        out.set_item("rejoins", since(after.service.rejoins, before.service.rejoins))?;
        out.set_item("post_actions", actions_out(py, &done)?)?;
        Ok(out)
    }

    #[pyo3(signature = (version = None, timeout = 30.0))]
    fn wait_for<'py>(
        &self,
        py: Python<'py>,
        version: Option<u64>,
        timeout: f64,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        let within = seconds("timeout", timeout)?;
        let offer = py.detach(|| {
            self.desk.with(|rank| {
                let at_least = version.unwrap_or_else(|| self.next());
                Ok(rank.wait_for(at_least, Instant::now() + within)?)
            })
        })?;
        let Some(offer) = offer else { return Ok(None) };
        let out = PyDict::new(py);
        out.set_item("version", offer.version)?;
        out.set_item("group", offer.group)?;
        Ok(Some(out))
    }

    fn serving(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        Ok(py.detach(|| self.desk.with(|rank| Ok(rank.serving())))?)
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        py.detach(|| self.desk.with(|rank| Ok(rank.figures())))?.to_dict(py)
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        Ok(py.detach(|| match self.desk.take()? {
            None => Ok(()),
            Some(rank) => rank.leave(),
        })?)
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_args))]
    fn __exit__(&self, py: Python<'_>, _args: &Bound<'_, PyAny>) -> PyResult<()> {
        self.close(py)
    }

    fn __repr__(&self) -> String {
        match self.live.version() {
            Some(version) => format!("<Target rank {} at version {version}>", self.rank),
            None => format!("<Target rank {} at no version>", self.rank),
        }
    }
}

impl Target {
    /// One newer than what is live.
    fn next(&self) -> u64 {
        self.live.version().map_or(0, |version| version.saturating_add(1))
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Leaving asks the store, and nobody else of Python may have to wait for that.
        Python::attach(|py| py.detach(|| drop(self.desk.take())));
    }
}
