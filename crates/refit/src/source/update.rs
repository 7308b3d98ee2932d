//! Changing a source's parameters: the header says so before the first byte is written, and what they are behind the last.

use std::slice;

use refit_planner::Param;
use refit_pool::Memory;
use refit_transport::Transport;

use super::Source;
use super::packed::PackedSource;
use crate::error::RefitError;
use crate::header::{Expected, Header, Stamp};
use crate::land::DeviceLander;

/// Parameters that are being changed. No target installs anything that it reads of them, from before this was made until
/// [`commit`](Self::commit).
///
/// Dropped without a commit, also by a panic, it leaves them so: nobody may read what may be half of a change. The next
/// [`Source::begin_update`] goes on with the same change; so may a trainer that writes by other means than this holds
/// borrows for.
#[derive(Debug)]
#[must_use = "the parameters cannot be read before the change is committed"]
pub struct Updating<'a, T: Transport>(Held<'a, T>);

#[derive(Debug)]
enum Held<'a, T: Transport> {
    Plain(&'a mut Source<T>),
    Packed(&'a mut PackedSource<T>),
}

/// Every parameter of a source, by name, to be written.
#[derive(Debug)]
pub struct ParamsMut<'a> {
    params: slice::Iter<'a, Param>,
    memory: slice::IterMut<'a, Memory>,
}

impl<'a> Iterator for ParamsMut<'a> {
    type Item = (&'a str, &'a mut Memory);

    fn next(&mut self) -> Option<Self::Item> {
        Some((self.params.next()?.name().as_ref(), self.memory.next()?))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.memory.size_hint()
    }
}

impl<T: Transport> Source<T> {
    /// Says in the header that the parameters are being written; they may be as soon as this returns. Does not wait for
    /// anybody who reads: what they read from now on they discard.
    ///
    /// # Errors
    /// [`RefitError::Device`] when the header is a device's and cannot be written. Nothing may be changed then.
    pub fn begin_update(&mut self) -> Result<Updating<'_, T>, RefitError> {
        self.open()?;
        Ok(Updating(Held::Plain(self)))
    }

    pub(crate) fn open(&mut self) -> Result<(), RefitError> {
        // Remembered before it is written: a header that may be half of this one is none.
        if self.header.stamp.is_stable() {
            self.header.stamp.epoch = self.next_epoch()?;
        }
        self.write_header(self.header)
    }

    pub(crate) fn close(&mut self, version: u64) -> Result<Expected, RefitError> {
        let epoch = self.next_epoch()?;
        let header = Header { stamp: Stamp { epoch, version }, ..self.header };
        // Spent, also if a peer has not seen it: the same epoch twice would be two versions that are taken for one.
        self.header.stamp.epoch = epoch;
        self.header.stamp.epoch = self.next_epoch()?;
        self.write_header(header)?;
        self.header = header;
        let Header { incarnation, .. } = header;
        Ok(Expected { rank: self.layout.rank(), incarnation, version, epoch })
    }

    fn next_epoch(&self) -> Result<u64, RefitError> {
        let rank = self.layout.rank();
        self.header.stamp.epoch.checked_add(1).ok_or(RefitError::Epochs { rank })
    }

    fn write_header(&mut self, header: Header) -> Result<(), RefitError> {
        header.store_by(&mut self.lease.arenas_mut()[0], self.device.as_ref(), &self.reach)
    }

    /// Takes the parameters out: of a header that says that they are being written.
    pub(crate) fn take_params(&mut self) -> Vec<Memory> {
        debug_assert!(!self.header.stamp.is_stable());
        std::mem::take(&mut self.params)
    }

    /// Puts them back, each where it was.
    pub(crate) fn put_params(&mut self, params: Vec<Memory>, device: Option<DeviceLander>) {
        debug_assert_eq!(params.len(), self.layout.params().len());
        (self.params, self.device) = (params, device);
    }

    fn writable(&mut self) -> ParamsMut<'_> {
        ParamsMut { params: self.layout.params().iter(), memory: self.params.iter_mut() }
    }
}

impl<T: Transport> PackedSource<T> {
    /// As [`Source::begin_update`].
    ///
    /// # Errors
    /// As [`Source::begin_update`].
    pub fn begin_update(&mut self) -> Result<Updating<'_, T>, RefitError> {
        self.source.open()?;
        Ok(Updating(Held::Packed(self)))
    }
}

impl<T: Transport> Updating<'_, T> {
    /// Every parameter's memory, for the trainer to change.
    pub fn params_mut(&mut self) -> ParamsMut<'_> {
        match &mut self.0 {
            Held::Plain(source) => source.writable(),
            Held::Packed(packed) => packed.source.writable(),
        }
    }

    /// Says in the header that the parameters are this version, whole: after the slots, where there are some, were filled
    /// from them. Returns what targets are to be told to expect. Versions are the trainer's to number; the same one may be
    /// committed again.
    ///
    /// A device copies into slots behind what the stream of the source's lander has, and waits for no other. Whatever else
    /// writes parameters has to be done.
    ///
    /// # Errors
    /// [`RefitError::Device`] when a device fails that copies into slots or has the header. The parameters cannot be read
    /// then, until a commit after another [`Source::begin_update`].
    pub fn commit(self, version: u64) -> Result<Expected, RefitError> {
        match self.0 {
            Held::Plain(source) => source.close(version),
            Held::Packed(packed) => {
                packed.repack()?;
                packed.source.close(version)
            }
        }
    }
}
