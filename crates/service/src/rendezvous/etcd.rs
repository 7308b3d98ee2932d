//! A rendezvous in etcd.
//!
//! ```text
//! <root>/e/<key>                  an entry
//! <root>/c/<key>:<id>/<n>         a chunk of one that is too large for a request
//! ```
//!
//! Entry and chunks have one lease, so they go together. Everything is read at one revision.

mod cache;
mod options;
mod runtime;
mod value;
mod watch;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{
    Client, Compare, CompareOp, DeleteOptions, Error, GetOptions, KvClient, LeaseClient,
    PutOptions, Txn, TxnOp, TxnOpResponse, WatchClient,
};

use parking_lot::Mutex;

use self::cache::Cache;
pub use self::options::EtcdOptions;
use self::runtime::{Guard, Runtime};
use self::value::{CHUNK, Cut, INLINE, Value};
use super::{
    Created, Key, Life, Reach, Rendezvous, RendezvousError, Revision, Snapshot, check_ttl,
    check_value,
};
use crate::random::random;

const STORE: &str = "etcd";

/// Entries of one page, and chunks of one. Both are at most 2 MiB.
const PAGE: i64 = 128;
const CHUNK_PAGE: i64 = 4;

/// Most bytes of an answer.
const MAX_ANSWER: usize = 8 << 20;

/// How often a session is renewed in its ttl.
const RENEWALS: u32 = 4;

/// Between tries.
const PAUSE: Duration = Duration::from_millis(50);

/// A rendezvous in etcd: all clones, and all with the same cluster and root, are one store.
///
/// Leases of etcd are whole seconds and two at least: a shorter ttl is prolonged to that. [`changed`](Rendezvous::changed)
/// is a watch. A call that fails says so within the timeout of [`EtcdOptions`]; large values take several calls. A write that
/// fails may have taken effect all the same.
#[derive(Clone)]
pub struct Etcd(Arc<Shared>);

struct Shared {
    kv: KvClient,
    lease: LeaseClient,
    watch: WatchClient,
    options: EtcdOptions,
    cache: Mutex<Cache>,
    // Last, so that nothing is left that would need it.
    runtime: Runtime,
}

/// Keeps entries while it is held.
#[derive(Debug)]
pub struct EtcdSession {
    shared: Arc<Shared>,
    lease: i64,
    ended: Arc<AtomicBool>,
    _renewing: Guard,
}

/// gRPC's numbers of what can go wrong.
mod code {
    pub(super) const INVALID_ARGUMENT: i32 = 3;
    pub(super) const NOT_FOUND: i32 = 5;
    pub(super) const PERMISSION_DENIED: i32 = 7;
    pub(super) const RESOURCE_EXHAUSTED: i32 = 8;
    pub(super) const FAILED_PRECONDITION: i32 = 9;
    pub(super) const OUT_OF_RANGE: i32 = 11;
    pub(super) const UNAUTHENTICATED: i32 = 16;
}

/// What a call came to, besides what it was for.
enum Trouble {
    /// The server has forgotten how things were at that revision.
    Compacted,
    Other(RendezvousError),
}

impl From<RendezvousError> for Trouble {
    fn from(error: RendezvousError) -> Self {
        Self::Other(error)
    }
}

impl Etcd {
    /// Connects to a cluster and asks it something, so that what is wrong shows at once.
    ///
    /// # Errors
    /// [`RendezvousError::Options`] for what cannot be meant, [`RendezvousError::Unreachable`] when there is no etcd,
    /// [`RendezvousError::Refused`] when it does not let this process in.
    pub fn new(options: EtcdOptions) -> Result<Self, RendezvousError> {
        let connect = options.connect()?;
        let runtime = Runtime::new().map_err(|source| RendezvousError::Io {
            action: "start a thread for",
            path: "refit-etcd".into(),
            source,
        })?;
        let endpoints = options.endpoints.clone();
        let limit = options.timeout;
        let connecting = async move { Client::connect(endpoints, Some(connect)).await };
        let client = match runtime.run(limit, connecting) {
            Some(Ok(client)) => client,
            Some(Err(error)) => return Err(refused(&options, "connect", &error)),
            None => return Err(unreachable(&options, "connect", "no answer".to_owned())),
        };
        let etcd = Self(Arc::new(Shared {
            kv: client.kv_client().max_decoding_message_size(MAX_ANSWER),
            lease: client.lease_client(),
            watch: client.watch_client().max_decoding_message_size(MAX_ANSWER),
            options,
            cache: Mutex::default(),
            runtime,
        }));
        etcd.list(&Key::new(["refit"])?)?;
        Ok(etcd)
    }
}

impl Shared {
    fn entry(&self, key: &Key) -> String {
        format!("{}/e/{key}", self.options.root)
    }

    /// Where the chunks of an entry begin.
    fn chunks(&self, key: &Key) -> String {
        format!("{}/c/{key}:", self.options.root)
    }

    fn chunk(&self, key: &Key, id: u128, number: u64) -> String {
        format!("{}{id:032x}/{number:08x}", self.chunks(key))
    }

    fn key(&self, entry: &[u8]) -> Option<Key> {
        let entry = std::str::from_utf8(entry).ok()?;
        let path = entry.strip_prefix(&self.options.root)?.strip_prefix("/e/")?;
        Key::try_from(path.to_owned()).ok()
    }

    /// Runs one call to its end or to the timeout.
    fn call<T: Send + 'static>(
        &self,
        action: &'static str,
        future: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, RendezvousError> {
        match self.runtime.run(self.options.timeout, future) {
            Some(Ok(done)) => Ok(done),
            Some(Err(error)) => Err(refused(&self.options, action, &error)),
            None => Err(unreachable(&self.options, action, "no answer".to_owned())),
        }
    }

    /// The same for what may be tried again: a server that restarts is not gone yet.
    fn read<T: Send + 'static, F: Future<Output = Result<T, Error>> + Send + 'static>(
        &self,
        action: &'static str,
        make: impl Fn() -> F,
    ) -> Result<T, Trouble> {
        let started = Instant::now();
        loop {
            let left = self.options.timeout.saturating_sub(started.elapsed());
            let error = match self.runtime.run(left, make()) {
                Some(Ok(done)) => return Ok(done),
                Some(Err(Error::GRpcStatus(status)))
                    if i32::from(status.code()) == code::OUT_OF_RANGE =>
                {
                    return Err(Trouble::Compacted);
                }
                Some(Err(error)) => refused(&self.options, action, &error),
                None => unreachable(&self.options, action, "no answer".to_owned()),
            };
            let again = matches!(error, RendezvousError::Unreachable { .. })
                && started.elapsed() + PAUSE < self.options.timeout;
            if !again {
                return Err(error.into());
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn txn(
        &self,
        action: &'static str,
        txn: Txn,
    ) -> Result<(bool, i64, Vec<TxnOpResponse>), RendezvousError> {
        let mut kv = self.kv.clone();
        let done = self.call(action, async move { kv.txn(txn).await })?;
        let revision = done.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok((done.succeeded(), revision, done.op_responses()))
    }

    /// All entries at or under a key, as they were at one moment.
    fn snapshot(&self, prefix: &Key) -> Result<Snapshot, RendezvousError> {
        let started = Instant::now();
        loop {
            match self.snapshot_once(prefix) {
                Ok(snapshot) => return Ok(snapshot),
                Err(Trouble::Other(error)) => return Err(error),
                // So slow that the server has forgotten that moment: another one.
                Err(Trouble::Compacted) => {
                    let waited = started.elapsed();
                    if waited > self.options.timeout {
                        let action = "list entries";
                        return Err(RendezvousError::Busy { store: STORE, action, waited });
                    }
                }
            }
        }
    }

    fn snapshot_once(&self, prefix: &Key) -> Result<Snapshot, Trouble> {
        let mut revision = 0;
        let mut entries = BTreeMap::new();
        // `0` follows `/`. Between them and the prefix itself others may lie, such as `a-b` beside `a`.
        let (mut from, end) = (self.entry(prefix).into_bytes(), format!("{}0", self.entry(prefix)));
        loop {
            let page = self.read("list entries", || {
                let options = GetOptions::new()
                    .with_range(end.as_str())
                    .with_limit(PAGE)
                    .with_revision(revision);
                let (mut kv, from) = (self.kv.clone(), from.clone());
                async move { kv.get(from, Some(options)).await }
            })?;
            if revision == 0 {
                revision = page.header().map_or(0, etcd_client::ResponseHeader::revision);
            }
            for pair in page.kvs() {
                let Some(key) = self.key(pair.key()).filter(|key| key.is_under(prefix)) else {
                    continue;
                };
                let value = self.value(&key, pair.value(), revision)?;
                entries.insert(key, value);
            }
            match page.kvs().last() {
                Some(last) if page.more() => from = [last.key(), &[0]].concat(),
                _ => break,
            }
        }
        let revision = Revision(u64::try_from(revision).unwrap_or(0));
        Ok(Snapshot { revision, entries, ..Snapshot::default() })
    }

    /// The value of an entry, its chunks read as they were at this revision.
    fn value(&self, key: &Key, entry: &[u8], revision: i64) -> Result<Vec<u8>, Trouble> {
        let foreign = |why| RendezvousError::Foreign { store: STORE, key: key.clone(), why };
        let cut = match Value::decode(entry) {
            Some(Value::Inline(value)) => return Ok(value),
            Some(Value::Cut(cut)) => cut,
            None => return Err(foreign("it was not written by a process of this release").into()),
        };
        if let Some(value) = self.cache.lock().get(&cut) {
            return Ok(value);
        }
        let mut value = Vec::new();
        let mut number = 0;
        while number < cut.chunks() {
            let page = self.read("read a value", || {
                let options = GetOptions::new()
                    .with_range(self.chunk(key, cut.id, cut.chunks()))
                    .with_limit(CHUNK_PAGE)
                    .with_revision(revision);
                let (mut kv, from) = (self.kv.clone(), self.chunk(key, cut.id, number));
                async move { kv.get(from, Some(options)).await }
            })?;
            for pair in page.kvs() {
                if pair.key() != self.chunk(key, cut.id, number).as_bytes()
                    || pair.value().len() > CHUNK
                {
                    return Err(foreign("its chunks are not in order").into());
                }
                value.extend_from_slice(pair.value());
                number += 1;
            }
            if page.kvs().is_empty() {
                return Err(foreign("a chunk of it is missing").into());
            }
        }
        if Cut::new(cut.id, &value) != cut {
            return Err(foreign("its chunks are not what was written").into());
        }
        self.cache.lock().put(cut, &value);
        Ok(value)
    }

    fn write(
        &self,
        key: &Key,
        value: &[u8],
        lease: Option<i64>,
        replace: bool,
    ) -> Result<Created, RendezvousError> {
        let action = "write an entry";
        let started = Instant::now();
        let put = || lease.map(|lease| PutOptions::new().with_lease(lease));
        loop {
            let chunks = self.chunks(key);
            // All chunks that other values of this entry have had; `;` follows `:`, and `0` follows `/`.
            let all = format!("{}/c/{key};", self.options.root);
            let (entry, compare, delete) = if value.len() <= INLINE {
                let delete = vec![(chunks, all)];
                (Value::Inline(value.to_vec()), Vec::new(), delete)
            } else {
                let cut = self.put_chunks(key, value, put)?;
                let ours = format!("{chunks}{:032x}", cut.id);
                let first = self.chunk(key, cut.id, 0);
                let delete = vec![(chunks, format!("{ours}/")), (format!("{ours}0"), all)];
                // Who writes the same entry at the same time has deleted ours, or finds theirs deleted.
                let compare = vec![Compare::create_revision(first, CompareOp::Greater, 0)];
                (Value::Cut(cut), compare, delete)
            };
            let mut compare = compare;
            if !replace {
                compare.push(Compare::create_revision(self.entry(key), CompareOp::Equal, 0));
            }
            let mut then = vec![TxnOp::put(self.entry(key), entry.encode(), put())];
            then.extend(delete.into_iter().map(|(from, end)| {
                TxnOp::delete(from, Some(DeleteOptions::new().with_range(end)))
            }));
            let otherwise = [TxnOp::get(self.entry(key), None)];
            let txn = Txn::new().when(compare).and_then(then).or_else(otherwise);
            let (done, revision, answers) = self.txn(action, txn)?;
            if done {
                return Ok(Created::New);
            }
            if let Value::Cut(cut) = entry {
                self.remove_chunks(key, cut.id);
            }
            if let Some(TxnOpResponse::Get(found)) = answers.first()
                && let Some(pair) = found.kvs().first()
                && !replace
            {
                match self.value(key, pair.value(), revision) {
                    Ok(value) => return Ok(Created::Already(value)),
                    Err(Trouble::Other(error)) => return Err(error),
                    Err(Trouble::Compacted) => {}
                }
            }
            let waited = started.elapsed();
            if waited > self.options.timeout {
                return Err(RendezvousError::Busy { store: STORE, action, waited });
            }
        }
    }

    fn put_chunks(
        &self,
        key: &Key,
        value: &[u8],
        put: impl Fn() -> Option<PutOptions>,
    ) -> Result<Cut, RendezvousError> {
        let id = random().map_err(|source| RendezvousError::Io {
            action: "read",
            path: "/dev/urandom".into(),
            source,
        })?;
        let cut = Cut::new(id, value);
        for (number, chunk) in (0..).zip(value.chunks(CHUNK)) {
            let (name, chunk, options) = (self.chunk(key, id, number), chunk.to_vec(), put());
            let mut kv = self.kv.clone();
            let done =
                self.call("write a value", async move { kv.put(name, chunk, options).await });
            if let Err(error) = done {
                self.remove_chunks(key, id);
                return Err(error);
            }
        }
        Ok(cut)
    }

    /// Takes away what is no entry's. If that fails, the next write of the entry or the end of the session does it.
    fn remove_chunks(&self, key: &Key, id: u128) {
        let prefix = format!("{}{id:032x}/", self.chunks(key));
        let mut kv = self.kv.clone();
        let delete =
            async move { kv.delete(prefix, Some(DeleteOptions::new().with_prefix())).await };
        if let Err(error) = self.call("remove a value", delete) {
            tracing::warn!(%key, %error, "chunks of a value are left over");
        }
    }
}

fn unreachable(options: &EtcdOptions, action: &'static str, why: String) -> RendezvousError {
    let (at, within) = (options.endpoints.join(", "), options.timeout);
    RendezvousError::Unreachable { store: STORE, at, action, within, why }
}

/// What an error of the client means here.
fn refused(options: &EtcdOptions, action: &'static str, error: &Error) -> RendezvousError {
    match error {
        Error::GRpcStatus(status) => {
            let why = status.message().to_owned();
            match i32::from(status.code()) {
                code::NOT_FOUND if why.contains("lease") => RendezvousError::SessionEnded,
                code::INVALID_ARGUMENT
                | code::NOT_FOUND
                | code::PERMISSION_DENIED
                | code::RESOURCE_EXHAUSTED
                | code::FAILED_PRECONDITION
                | code::OUT_OF_RANGE
                | code::UNAUTHENTICATED => RendezvousError::Refused { store: STORE, action, why },
                _ => unreachable(options, action, why),
            }
        }
        Error::InvalidArgs(_) | Error::InvalidUri(_) => {
            RendezvousError::Refused { store: STORE, action, why: error.to_string() }
        }
        error => unreachable(options, action, with_causes(error)),
    }
}

/// An error and what it came from, which the client's own text leaves out.
fn with_causes(error: &Error) -> String {
    let Error::TransportError(transport) = error else { return error.to_string() };
    let mut text = transport.to_string();
    let mut source = std::error::Error::source(transport);
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Etcd").field(&self.0.options).finish()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.options.fmt(f)
    }
}

impl Rendezvous for Etcd {
    type Session = EtcdSession;

    fn store(&self) -> &'static str {
        STORE
    }

    fn reach(&self) -> Reach {
        Reach::Network
    }

    fn session(&self, ttl: Duration) -> Result<EtcdSession, RendezvousError> {
        check_ttl(ttl)?;
        let shared = &self.0;
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        let mut client = shared.lease.clone();
        let granted =
            shared.call("begin a session", async move { client.grant(seconds, None).await })?;
        let lease = granted.id();
        let every = Duration::from_secs(u64::try_from(granted.ttl()).unwrap_or(1)) / RENEWALS;
        let ended = Arc::new(AtomicBool::new(false));
        let renewing = renew(shared.lease.clone(), lease, every, Arc::clone(&ended));
        let renewing = shared.runtime.spawn(renewing);
        Ok(EtcdSession { shared: Arc::clone(shared), lease, ended, _renewing: renewing })
    }

    fn put(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, EtcdSession>,
    ) -> Result<(), RendezvousError> {
        check_value(key, value)?;
        let lease = self.lease(&life)?;
        self.0.write(key, value, lease, true).map(drop)
    }

    fn create(
        &self,
        key: &Key,
        value: &[u8],
        life: Life<'_, EtcdSession>,
    ) -> Result<Created, RendezvousError> {
        check_value(key, value)?;
        let lease = self.lease(&life)?;
        self.0.write(key, value, lease, false)
    }

    fn remove(&self, key: &Key) -> Result<(), RendezvousError> {
        let shared = &self.0;
        let chunks = DeleteOptions::new().with_prefix();
        let both = [
            TxnOp::delete(shared.entry(key), None),
            TxnOp::delete(shared.chunks(key), Some(chunks)),
        ];
        shared.txn("remove an entry", Txn::new().and_then(both)).map(drop)
    }

    fn list(&self, prefix: &Key) -> Result<Snapshot, RendezvousError> {
        self.0.snapshot(prefix)
    }

    fn changed(
        &self,
        prefix: &Key,
        since: Revision,
        deadline: Instant,
    ) -> Result<Option<Snapshot>, RendezvousError> {
        if self.0.watch(prefix, since, deadline)? { self.list(prefix).map(Some) } else { Ok(None) }
    }
}

impl Etcd {
    fn lease(&self, life: &Life<'_, EtcdSession>) -> Result<Option<i64>, RendezvousError> {
        match life {
            Life::Kept => Ok(None),
            Life::Session(session) if !Arc::ptr_eq(&session.shared, &self.0) => {
                Err(RendezvousError::ForeignSession { store: STORE })
            }
            Life::Session(session) if session.ended.load(Ordering::Acquire) => {
                Err(RendezvousError::SessionEnded)
            }
            Life::Session(session) => Ok(Some(session.lease)),
        }
    }
}

/// Renews a lease until the server says that it is no more. A server that does not answer may have kept it.
async fn renew(client: LeaseClient, lease: i64, every: Duration, ended: Arc<AtomicBool>) {
    loop {
        if let Ok(false) = renew_until_it_fails(client.clone(), lease, every).await {
            ended.store(true, Ordering::Release);
            tracing::warn!("a session has ended: etcd did not hear of it in time");
            return;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn renew_until_it_fails(
    mut client: LeaseClient,
    lease: i64,
    every: Duration,
) -> Result<bool, Error> {
    let late = || Error::LeaseKeepAliveError("no answer".to_owned());
    let open = tokio::time::timeout(every, client.keep_alive(lease));
    let (mut keeper, mut answers) = open.await.map_err(|_| late())??;
    loop {
        keeper.keep_alive().await?;
        let answer = tokio::time::timeout(every, answers.message()).await.map_err(|_| late())??;
        if answer.ok_or_else(late)?.ttl() <= 0 {
            return Ok(false);
        }
        tokio::time::sleep(every).await;
    }
}

impl Drop for EtcdSession {
    fn drop(&mut self) {
        let (mut client, lease) = (self.shared.lease.clone(), self.lease);
        let revoke = async move { client.revoke(lease).await };
        match self.shared.call("end a session", revoke) {
            Ok(_) | Err(RendezvousError::SessionEnded) => {}
            // The server does the same when the lease runs out.
            Err(error) => tracing::warn!(%error, "a session cannot be ended"),
        }
    }
}
