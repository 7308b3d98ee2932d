//! A source of a bench, with or without slots that it packs for its targets.

use std::time::Instant;

use refit::pool::Memory;
use refit::transport::{Transport, TransportPool};
use refit::{PackedSource, Source};

use super::meeting::Meeting;
use super::protocol::{Rate, Reply};
use super::rank::lost;
use crate::device::Home;
use crate::error::CliError;

/// What a source rank holds.
#[derive(Debug)]
pub(super) enum Held<T: Transport> {
    Plain(Box<Source<T>>),
    Packed(Box<PackedSource<T>>),
}

impl<T: Transport> Held<T> {
    /// Lets `change` write every parameter, and says what filling the slots behind it came to, if there are some.
    pub(super) fn update(
        &mut self,
        version: u64,
        change: impl for<'a> FnOnce(Vec<(&'a str, &'a mut Memory)>) -> Result<(), CliError>,
    ) -> Result<Reply, CliError> {
        match self {
            Self::Plain(source) => {
                let mut updating = source.begin_update()?;
                change(updating.params_mut().collect())?;
                let announced = updating.commit(version)?.into();
                Ok(Reply::Filled { announced, packed: None })
            }
            Self::Packed(source) => {
                source.update(version, |params| change(params.collect()))??;
                let announced = source.offered().ok_or_else(lost)?.into();
                let packed = source.repacked();
                let seconds = packed.elapsed.as_secs_f64();
                let packed = Some(Rate { bytes: packed.bytes, seconds });
                Ok(Reply::Filled { announced, packed })
            }
        }
    }

    /// Packs what these target ranks have asked for, and publishes that.
    pub(super) fn pack(
        self,
        home: &Home,
        pool: &TransportPool<T>,
        meeting: &Meeting,
        targets: u32,
        deadline: Instant,
    ) -> Result<Self, CliError> {
        let Self::Plain(source) = self else { return Ok(self) };
        let requests = meeting.wait_for_requests(0..targets, deadline)?;
        let packed = home.equip_source(*source)?.pack(pool, &requests, u64::MAX)?;
        meeting.publish(&packed.publication()?)?;
        Ok(Self::Packed(Box::new(packed)))
    }
}
