use refit_planner::Capabilities;
use refit_pool::Region;

use crate::{Peer, ReadOp, Status, Transport, TransportError, Written};

/// The transport that there is none of: what [`AutoTransport`](super::AutoTransport) is built with instead of NIXL
/// where that was left out.
#[derive(Clone, Copy, Debug)]
pub enum Never {}

impl Transport for Never {
    type Registration = Self;
    type Prepared = Self;

    fn backend(&self) -> &'static str {
        match *self {}
    }

    fn agent(&self) -> &str {
        match *self {}
    }

    fn capabilities(&self) -> Capabilities {
        match *self {}
    }

    fn metadata(&self) -> Result<Vec<u8>, TransportError> {
        match *self {}
    }

    fn register(&self, _region: &Region) -> Result<Self, TransportError> {
        match *self {}
    }

    fn deregister(&self, _registration: Self) -> Result<(), TransportError> {
        match *self {}
    }

    fn connect(&self, _name: &str, _metadata: &[u8]) -> Result<Peer, TransportError> {
        match *self {}
    }

    fn disconnect(&self, _peer: &Peer) -> Result<(), TransportError> {
        match *self {}
    }

    fn prepare(&self, _peer: &Peer, _reads: &[ReadOp]) -> Result<Self, TransportError> {
        match *self {}
    }

    fn written<'a>(&self, _prepared: &'a Self) -> &'a [Written] {
        match *self {}
    }

    fn reads(&self, _prepared: &Self) -> usize {
        match *self {}
    }

    unsafe fn post(&self, _prepared: &mut Self) -> Result<Status, TransportError> {
        match *self {}
    }

    fn poll(&self, _prepared: &mut Self) -> Result<Status, TransportError> {
        match *self {}
    }

    fn suspect(&self, _prepared: &Self) {
        match *self {}
    }
}
