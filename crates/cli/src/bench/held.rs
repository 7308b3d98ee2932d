//! A source of a bench, with or without slots that it packs for its targets.

use std::time::Duration;

use refit::pool::Memory;
use refit::transport::{Transport, TransportPool};
use refit::{Directory, PackedSource, RefitError, Source};

use super::protocol::{Rate, Reply};
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
                updating.commit(version)?;
                Ok(Reply::Done)
            }
            Self::Packed(source) => {
                source.update(version, |params| change(params.collect()))??;
                let packed = source.repacked();
                let seconds = packed.elapsed.as_secs_f64();
                Ok(Reply::Rate(Rate { bytes: packed.bytes, seconds }))
            }
        }
    }

    /// Packs what these target ranks have asked for, and publishes that.
    pub(super) fn pack(
        self,
        home: &Home,
        pool: &TransportPool<T>,
        directory: &Directory,
        targets: u32,
        patience: Duration,
    ) -> Result<Self, CliError> {
        let Self::Plain(source) = self else { return Ok(self) };
        let requests =
            directory.wait_for_requests(0..targets, patience).map_err(RefitError::from)?;
        let packed = home.equip_source(*source)?.pack(pool, &requests, u64::MAX)?;
        directory.publish(&packed.publication()?).map_err(RefitError::from)?;
        Ok(Self::Packed(Box::new(packed)))
    }
}
