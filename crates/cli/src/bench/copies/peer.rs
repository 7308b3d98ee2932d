//! Measured through the peer transport.

use std::collections::BTreeMap;
use std::sync::Arc;

use refit::planner::{Band, Dtype, LayoutBuilder, Param};
use refit::pool::{Allocator, Memory};
use refit::transport::peer::{PeerRegistration, PeerTransport};
use refit::transport::{Transport, draw_incarnation};
use refit::{
    HEADER_BYTES, Header, Place, Publication, PublishedHeader, PublishedRegion, RefitError, Stamp,
};

use super::super::ceiling::Ceiling;
use super::super::meeting::{Meeting, meet};
use super::super::protocol::Reply;
use super::super::rank::{RankSetup, lost};
use crate::device::Home;
use crate::error::CliError;
use crate::transports;

/// What copies are measured with, beside the parameters.
const NAME: &str = "copies";

/// A source's largest allocation, readable by peers until this goes.
#[derive(Debug)]
pub(in crate::bench) struct Published {
    // Dropped first: it is the transport's.
    _registrations: [PeerRegistration; 2],
    _transport: Arc<PeerTransport>,
    _header: Memory,
    // What is published stays for as long as this does.
    _meeting: Meeting,
}

impl Published {
    /// Publishes the largest allocation of these parameters.
    pub(in crate::bench) fn new<'a>(
        setup: &RankSetup,
        home: &Home,
        params: impl Iterator<Item = &'a Memory>,
    ) -> Result<Self, CliError> {
        let region = params.map(Memory::allocation).max_by_key(|region| region.len());
        let region = region.ok_or_else(lost)?;
        let transport = transports::peer(&format!("copies-source-{}", setup.rank), home)?;
        let registration = transport.register(region).map_err(RefitError::from)?;
        // What it holds does not change: one header for all of the bench.
        let mut memory = home.allocate(HEADER_BYTES).map_err(crate::device::allocation)?;
        let incarnation = draw_incarnation(transport.agent()).map_err(RefitError::from)?;
        Header { incarnation, stamp: Stamp::default() }.store(&mut memory)?;
        let own = transport.register(memory.allocation()).map_err(RefitError::from)?;
        let registrations = [registration, own];
        let mut layout = LayoutBuilder::new(setup.rank);
        let (name, len) = (format!("arena.{}", setup.rank), region.len());
        let tensor = layout.tensor(&name, len, 1).map_err(RefitError::from)?;
        let band = Band::new(tensor, 0..len, 0..1);
        layout
            .param(Param::new(name.as_str(), Dtype::U8, len, 1).band(band))
            .map_err(RefitError::from)?;
        let (address, cuda) = (region.address(), setup.gpu);
        let header = Place::new(memory.address(), memory.kind());
        let header_region = PublishedRegion {
            address: header.address,
            len: HEADER_BYTES as u64,
            cuda: header.cuda,
        };
        let publication = Publication::new(
            transport.agent().to_owned(),
            transport.metadata().map_err(RefitError::from)?,
            layout.build(),
            PublishedHeader { incarnation, place: header },
            vec![Place { address, cuda }],
            vec![PublishedRegion { address, len, cuda }, header_region],
        );
        let meeting = meet(&setup.directory, NAME)?;
        meeting.publish(&publication.map_err(RefitError::from)?)?;
        Ok(Self {
            _registrations: registrations,
            _transport: transport,
            _header: memory,
            _meeting: meeting,
        })
    }
}

/// What a target measures copies with.
#[derive(Debug)]
pub(in crate::bench) enum Copies {
    /// Ready.
    Ceiling(Ceiling<PeerTransport>),
    /// Not to be had, and why.
    Unreachable(String),
}

impl Copies {
    /// Reads these bytes from each source in one copy.
    pub(in crate::bench) fn new(
        setup: &RankSetup,
        home: &Home,
        bytes: &BTreeMap<u32, u64>,
    ) -> Result<Self, CliError> {
        let transport = transports::peer(&format!("copies-target-{}", setup.rank), home)?;
        let meeting = meet(&setup.directory, NAME)?;
        let published = meeting.wait(0..setup.source.world(), setup.deadline()?)?;
        // Nobody announces what is copied: its headers are read before as well.
        let sources = (published.as_slice(), None);
        match Ceiling::new(home, &transport, setup.rank, sources, bytes, setup.patience) {
            Ok(ceiling) => Ok(Self::Ceiling(ceiling)),
            // GPUs without a path to each other are no reason to stop a bench that does not need one.
            Err(CliError::Refit(RefitError::Transport(error))) => {
                Ok(Self::Unreachable(error.to_string()))
            }
            Err(error) => Err(error),
        }
    }

    pub(in crate::bench) fn read(&mut self) -> Result<Reply, CliError> {
        match self {
            Self::Ceiling(ceiling) => ceiling.read(None),
            Self::Unreachable(reason) => Ok(Reply::Unmeasured { reason: reason.clone() }),
        }
    }
}
