use refit::transport::Transport;
use refit::transport::local::{LocalTransport, Network};

/// Gives bytes to a transport as what a peer published: as they are, and under a digest that is right, which says nothing
/// of who wrote it. There is no such peer, so nobody is met.
pub fn metadata(data: &[u8]) {
    // Peers that were met are kept, so each input gets a transport of its own.
    let transport = LocalTransport::new(&Network::new(), "fuzzed").unwrap();
    let met = |bytes: &[u8]| transport.connect("peer", bytes).is_ok();
    assert!(!met(data), "nobody is there to be met");
    let mut hasher = blake3::Hasher::new_derive_key("refit-transport metadata v1");
    hasher.update(data);
    let sealed = [data, hasher.finalize().as_bytes()].concat();
    assert!(!met(&sealed), "nobody is there to be met");
}
