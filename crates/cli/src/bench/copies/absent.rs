//! A build without CUDA has nothing to measure.

use std::collections::BTreeMap;

use refit::pool::Memory;

use super::super::protocol::Reply;
use super::super::rank::RankSetup;
use crate::device::Home;
use crate::error::CliError;
use crate::transports::without;

#[derive(Debug)]
pub(in crate::bench) enum Published {}

impl Published {
    pub(in crate::bench) fn new<'a>(
        _: &RankSetup,
        _: &Home,
        _: impl Iterator<Item = &'a Memory>,
    ) -> Result<Self, CliError> {
        Err(without("CUDA", "cuda"))
    }
}

#[derive(Debug)]
pub(in crate::bench) enum Copies {}

impl Copies {
    pub(in crate::bench) fn new(
        _: &RankSetup,
        _: &Home,
        _: &BTreeMap<u32, u64>,
    ) -> Result<Self, CliError> {
        Err(without("CUDA", "cuda"))
    }

    pub(in crate::bench) fn read(&mut self) -> Result<Reply, CliError> {
        match *self {}
    }
}
