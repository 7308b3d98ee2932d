use std::cell::Cell;
use std::sync::Arc;

use refit::planner::{Dims, Transform};
use refit::pool::{Allocator, HostAllocator, Key, MemoryKind};
use refit::transport::local::{LocalTransport, Network};
use refit::transport::{
    LocalRange, Pull, PullError, ReadOp, RemoteRange, Transport, TransportError,
};
use refit_tests::{corners, ranks};

use super::each;

const BYTES: u64 = 4096;
const SECRET: u8 = 0x77;

/// Metadata with numbers of eight bytes in place of others, under a digest that is right.
fn forged(metadata: &[u8], replaced: &[(usize, u64)]) -> Vec<u8> {
    let mut body = metadata[..metadata.len() - 32].to_vec();
    for &(at, value) in replaced {
        body[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    let mut hasher = blake3::Hasher::new_derive_key("refit-transport metadata v1");
    hasher.update(&body);
    [body.as_slice(), hasher.finalize().as_bytes()].concat()
}

/// Ranges that nobody registered may be published. Nothing is read from them.
#[test]
fn p05_metadata_at_the_corners() {
    let network = Network::new();
    let source = LocalTransport::new(&network, "source").unwrap();
    let [mut first, mut second] = [(); 2].map(|()| HostAllocator.allocate(4096).unwrap());
    first.host_bytes_mut().unwrap().fill(SECRET);
    second.host_bytes_mut().unwrap().fill(SECRET);
    let registrations =
        [&first, &second].map(|memory| source.register(memory.allocation()).unwrap());
    let metadata = source.metadata().unwrap();
    assert_eq!(forged(&metadata, &[]), metadata);
    let (connected, pulled) = (Cell::new(0), Cell::new(0));
    // Every place where eight bytes fit: counts, lengths, addresses, and what lies across them.
    each(metadata.len() - 32 - 7, |replaced| {
        let engine = Arc::new(LocalTransport::new(&network, "engine").unwrap());
        let Ok(peer) = engine.connect("source", &forged(&metadata, replaced)) else { return };
        connected.set(connected.get() + 1);
        let of_forged = replaced.iter().map(|(_, value)| *value);
        for address in of_forged.chain([first.address()]) {
            for len in corners::CORNERS.into_iter().chain([BYTES]) {
                let legal = u128::from(address) >= u128::from(first.address())
                    && u128::from(address) + u128::from(len) <= u128::from(first.address() + BYTES);
                let lease = ranks::pool(&engine).lease(Key::from([1; 32]), |build| {
                    let arena = build.arena(BYTES).unwrap();
                    let (kind, dims) = (MemoryKind::Host, Dims::none());
                    let from = RemoteRange { address, len, kind };
                    let into = LocalRange { address: arena.address(), len, kind };
                    let transform = Transform::Copy;
                    let read = ReadOp { from, into, run: len, dims, transform, bulk: false };
                    Ok::<_, TransportError>(vec![engine.prepare(&peer, &[read])?])
                });
                let Ok(lease) = lease else { continue };
                match Pull::start(engine.clone(), lease, Vec::new(), ..)
                    .and_then(|pull| pull.wait(ranks::soon()))
                {
                    Ok(settled) => {
                        assert!(legal, "read {len} bytes from {address:#x}");
                        let bytes = settled.lease.arenas()[0].host_bytes().unwrap();
                        let len = usize::try_from(len).unwrap();
                        assert!(bytes[..len].iter().all(|&byte| byte == SECRET));
                        pulled.set(pulled.get() + 1);
                    }
                    Err(PullError::Failed { .. }) => assert!(!legal),
                    Err(other) => panic!("{other}"),
                }
            }
        }
    });
    println!("{} were taken, {} pulls ended well", connected.get(), pulled.get());
    assert!(connected.get() > 0 && pulled.get() > 0);
    drop(registrations);
}
