//! What the pool holds, in numbers, and the right to hold more.

use std::error::Error;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::PoolError;
use crate::sync::{AtomicBool, Condvar, Mutex, MutexGuard};

/// The books. Locked after the pool's entries where both are needed, and never across a foreign call.
#[derive(Debug)]
pub(crate) struct Ledger {
    books: Mutex<Books>,
    /// Signalled whenever bytes are given back.
    freed: Condvar,
    /// Whether `books.failure` holds something, so that a warm lease need not look.
    failed: AtomicBool,
    /// Bytes that may be quarantined at once.
    limit: u64,
    /// Whether there are more, so that a warm lease need not look.
    exceeded: AtomicBool,
}

#[derive(Debug, Default)]
pub(crate) struct Books {
    /// Bytes reserved and not given back: of idle, leased, half-built, leaving and quarantined entries.
    pub(crate) bytes: u64,
    /// The part of `bytes` that threads are freeing right now.
    pub(crate) leaving: u64,
    /// The part of `bytes` that transfers may still write, and in how many entries.
    pub(crate) quarantined: u64,
    pub(crate) quarantined_entries: u64,
    pub(crate) allocations: u64,
    pub(crate) registrations: u64,
    pub(crate) deregistrations: u64,
    pub(crate) failed_deregistrations: u64,
    failure: Option<Failure>,
}

#[derive(Debug)]
struct Failure {
    count: u64,
    first: Box<dyn Error + Send + Sync>,
}

impl Ledger {
    pub(crate) fn new(limit: u64) -> Self {
        Self {
            books: Mutex::default(),
            freed: Condvar::default(),
            failed: AtomicBool::new(false),
            limit,
            exceeded: AtomicBool::new(false),
        }
    }

    pub(crate) fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock()
    }

    /// Waits until somebody gives bytes back.
    pub(crate) fn wait(&self, books: &mut MutexGuard<'_, Books>) {
        self.freed.wait(books);
    }

    pub(crate) fn quarantine(&self, bytes: u64) {
        let mut books = self.books();
        books.quarantined += bytes;
        books.quarantined_entries += 1;
        self.exceeded.store(books.quarantined > self.limit, Ordering::Release);
    }

    pub(crate) fn release(&self, bytes: u64) {
        let mut books = self.books();
        books.quarantined -= bytes;
        books.quarantined_entries -= 1;
        self.exceeded.store(books.quarantined > self.limit, Ordering::Release);
    }

    pub(crate) fn allocated(&self) {
        self.books().allocations += 1;
    }

    pub(crate) fn registered(&self) {
        self.books().registrations += 1;
    }

    pub(crate) fn deregistered<E: Error + Send + Sync + 'static>(&self, result: Result<(), E>) {
        let mut books = self.books();
        books.deregistrations += 1;
        if let Err(error) = result {
            books.failed_deregistrations += 1;
            match &mut books.failure {
                Some(failure) => failure.count += 1,
                None => books.failure = Some(Failure { count: 1, first: Box::new(error) }),
            }
            self.failed.store(true, Ordering::Release);
        }
    }

    /// The failed deregistrations since the last call, or a quarantine that is full, as an error.
    pub(crate) fn check(&self) -> Result<(), PoolError> {
        self.check_failures()?;
        if !self.exceeded.load(Ordering::Acquire) {
            return Ok(());
        }
        let (books, limit) = (self.books(), self.limit);
        let (quarantined, entries) = (books.quarantined, books.quarantined_entries);
        if quarantined > limit {
            return Err(PoolError::Quarantine { quarantined, entries, limit });
        }
        Ok(())
    }

    fn check_failures(&self) -> Result<(), PoolError> {
        if !self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut books = self.books();
        self.failed.store(false, Ordering::Release);
        let failure = books.failure.take();
        drop(books);
        match failure {
            Some(Failure { count: failures, first: source }) => {
                Err(PoolError::Deregister { failures, source })
            }
            None => Ok(()),
        }
    }
}

/// A right to hold bytes. Dropping it gives them back.
#[derive(Debug)]
pub(crate) struct Reservation {
    ledger: Arc<Ledger>,
    bytes: u64,
    leaving: bool,
}

impl Reservation {
    /// The right to `bytes`, entered into the books. The caller has checked that they fit.
    pub(crate) fn new(ledger: Arc<Ledger>, books: &mut Books, bytes: u64) -> Self {
        books.bytes += bytes;
        Self { ledger, bytes, leaving: false }
    }

    /// A right to hold nothing yet.
    pub(crate) fn none(ledger: Arc<Ledger>) -> Self {
        Self { ledger, bytes: 0, leaving: false }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    pub(crate) fn absorb(&mut self, mut other: Self) {
        self.bytes += mem::take(&mut other.bytes);
    }

    /// Says that these bytes are about to be freed, so that whoever needs them waits rather than fails.
    pub(crate) fn leave(&mut self, books: &mut Books) {
        if !mem::replace(&mut self.leaving, true) {
            books.leaving += self.bytes;
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if self.bytes == 0 {
            return;
        }
        let mut books = self.ledger.books();
        books.bytes -= self.bytes;
        if self.leaving {
            books.leaving -= self.bytes;
        }
        drop(books);
        self.ledger.freed.notify_all();
    }
}
