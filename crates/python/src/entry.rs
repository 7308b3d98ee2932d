//! What a source and a target are told alike, and what comes of it.

use std::path::PathBuf;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyMapping;
use refit::planner::RankLayout;
use refit::pool::Memory;
use refit::translate::bands::Side;
use refit::transport::draw_incarnation;
use refit_service::Seats;
use refit_service::rendezvous::{Address, JobKey, Sealed, Store, Writer};

use crate::agent::{self, Way, Wish};
use crate::data::seconds;
use crate::failure::{Failure, Kind};
use crate::home::Home;
use crate::layout::Layout;
use crate::tensor::Tensors;

/// The store, whatever kind it is, under the job's seal.
pub(crate) type Meeting = Sealed<Store>;

/// Arguments that both classes take, as they come.
#[derive(Debug)]
pub(crate) struct Said<'a, 'py> {
    pub(crate) rendezvous: &'a str,
    pub(crate) layout: &'a Layout,
    pub(crate) tensors: &'a Bound<'py, PyMapping>,
    pub(crate) model: String,
    /// The group or the replica, and how many ranks it has.
    pub(crate) group: String,
    pub(crate) ranks: u32,
    pub(crate) job: String,
    pub(crate) key_file: Option<PathBuf>,
    pub(crate) transport: &'a str,
    pub(crate) insecure_tcp: Option<String>,
    pub(crate) timeout: f64,
    pub(crate) ttl: f64,
}

/// A rank that may join: whatever can be known without waiting is as it has to be.
#[derive(Debug)]
pub(crate) struct Entry {
    layout: RankLayout,
    group: String,
    ranks: u32,
    within: Duration,
    at: Where,
    way: Way,
    tensors: Tensors,
    insecure_tcp: Option<String>,
    nixl: Vec<PathBuf>,
}

/// Where ranks meet, and under which names.
#[derive(Debug)]
struct Where {
    address: Address,
    job: String,
    model: String,
    key_file: Option<PathBuf>,
    ttl: Duration,
}

/// What a rank joins with, besides an agent.
#[derive(Debug)]
pub(crate) struct Entered {
    pub(crate) seats: Seats<Meeting>,
    pub(crate) home: Home,
    pub(crate) layout: RankLayout,
    pub(crate) params: Vec<(String, Memory)>,
    /// The group or the replica, and how many ranks it has.
    pub(crate) group: String,
    pub(crate) ranks: u32,
    /// After what silence this process counts as dead.
    pub(crate) ttl: Duration,
    /// What joining may take.
    pub(crate) within: Duration,
}

impl Said<'_, '_> {
    /// Reads them for a rank of this side.
    pub(crate) fn read(self, py: Python<'_>, side: Side) -> PyResult<Entry> {
        let (class, group) = match side {
            Side::Source => ("Source", "group"),
            Side::Target => ("Target", "replica"),
        };
        self.layout.side_is(side, class)?;
        let address = self.rendezvous.parse().map_err(Failure::from)?;
        let way = Way::read(self.transport)?;
        let layout = self.layout.layout().clone();
        check_rank(layout.rank(), self.ranks, group)?;
        let ttl = seconds("ttl", self.ttl)?;
        let within = seconds("timeout", self.timeout)?;
        let tensors = Tensors::look(&layout, self.tensors, side == Side::Target)?;
        let nixl = agent::nixl_places(py)?;
        let Self { model, group, ranks, job, key_file, insecure_tcp, .. } = self;
        let at = Where { address, job, model, key_file, ttl };
        Ok(Entry { layout, group, ranks, within, at, way, tensors, insecure_tcp, nixl })
    }
}

impl Entry {
    /// Opens the store, and adopts the tensors. `is_read`: whether others read from this rank.
    pub(crate) fn enter(self, is_read: bool) -> Result<(Wish, Entered), Failure> {
        let Self { layout, group, ranks, within, at, way, tensors, insecure_tcp, nixl } = self;
        let home = Home::new(tensors.kind())?;
        let name = format!("{group}-{}", layout.rank());
        let wish = Wish {
            way: way.at(&at.address, &home)?,
            name: name.clone(),
            home: home.clone(),
            is_read,
            bytes: layout.bytes(),
            insecure_tcp,
            nixl,
        };
        let seats = at.seats(&name)?;
        let params = tensors.adopt(&home)?;
        let ttl = at.ttl;
        Ok((wish, Entered { seats, home, layout, params, group, ranks, ttl, within }))
    }
}

impl Where {
    /// For the rank called `name`.
    fn seats(&self, name: &str) -> Result<Seats<Meeting>, Failure> {
        let key = JobKey::from_file_or_env(self.key_file.as_deref())?;
        let writer = Writer::new(&self.job, name, draw_incarnation(name)?)?;
        Ok(Seats::new(self.address.open()?, writer, key, &self.model, self.ttl)?)
    }
}

/// A rank is one of its group's.
fn check_rank(rank: u32, ranks: u32, what: &str) -> Result<(), Failure> {
    if rank < ranks {
        return Ok(());
    }
    let text =
        format!("the layout is of rank {rank}, and the {what} has {ranks} ranks, counted from 0");
    Err(Failure::new(Kind::Config, text).rank(rank))
}
