//! A pool whose registrations are a transport's and whose prepared work is batches of reads.

use std::sync::Arc;

use refit_pool::{Lease, Pool, Region, Registrar};

use crate::{Transport, TransportError};

/// Registers a pool's memory with a transport.
#[derive(Debug)]
pub struct TransportRegistrar<T>(Arc<T>);

/// A pool for [`Pull`](crate::Pull)s: its entries keep batches of reads, one or more for each peer.
pub type TransportPool<T> = Pool<TransportRegistrar<T>, Vec<<T as Transport>::Prepared>>;

/// A lease of a [`TransportPool`].
pub type TransportLease<T> = Lease<TransportRegistrar<T>, Vec<<T as Transport>::Prepared>>;

impl<T> TransportRegistrar<T> {
    /// A registrar for this transport.
    #[must_use]
    pub fn new(transport: Arc<T>) -> Self {
        Self(transport)
    }

    /// The transport.
    #[must_use]
    pub fn transport(&self) -> &Arc<T> {
        &self.0
    }
}

impl<T: Transport> Registrar for TransportRegistrar<T> {
    type Registration = T::Registration;
    type Error = TransportError;

    fn register(&self, region: &Region) -> Result<Self::Registration, TransportError> {
        self.0.register(region)
    }

    fn deregister(&self, registration: Self::Registration) -> Result<(), TransportError> {
        self.0.deregister(registration)
    }
}
