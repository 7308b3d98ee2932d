//! Where this process listens for TCP, as the kernel says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The listening sockets of this process, by the number that the kernel gave each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Listeners(BTreeMap<u64, SocketAddr>);

impl Listeners {
    /// As they are now, in the network that this thread is in.
    pub(super) fn now() -> io::Result<Self> {
        let mut own = BTreeSet::new();
        for entry in fs::read_dir("/proc/self/fd")? {
            // One that was closed meanwhile has no link any more.
            let Ok(link) = fs::read_link(entry?.path()) else { continue };
            own.extend(link.to_str().and_then(socket));
        }
        let mut listening = Self::default();
        for table in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
            match fs::read_to_string(table) {
                Ok(text) => {
                    listening.0.extend(parse(&text).filter(|(inode, _)| own.contains(inode)))
                }
                // A kernel without IPv6.
                Err(error) if error.kind() == io::ErrorKind::NotFound && table.ends_with('6') => {}
                Err(error) => return Err(error),
            }
        }
        Ok(listening)
    }

    /// Those that are not among `others`.
    pub(super) fn without(mut self, others: &Self) -> Self {
        self.0.retain(|inode, _| !others.0.contains_key(inode));
        self
    }

    /// Those that can be reached from other hosts.
    pub(super) fn beyond_loopback(mut self) -> Self {
        self.0.retain(|_, address| !address.ip().to_canonical().is_loopback());
        self
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        self.0.values().copied().collect()
    }
}

/// The number in `socket:[12345]`.
fn socket(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// The listening sockets of a table of the kernel's.
fn parse(table: &str) -> impl Iterator<Item = (u64, SocketAddr)> {
    const LISTEN: &str = "0A";
    table.lines().skip(1).filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (&local, &state, &inode) = (words.get(1)?, words.get(3)?, words.get(9)?);
        if state != LISTEN {
            return None;
        }
        let (address, port) = local.split_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        Some((inode.parse().ok()?, SocketAddr::new(ip(address)?, port)))
    })
}

/// Words of 32 bits in hexadecimal, each as this processor reads the network's bytes.
fn ip(text: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = u32::from_str_radix(text.get(at * 8..at * 8 + 8)?, 16).ok()?;
        Some(word.to_ne_bytes())
    };
    match text.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let mut octets = [0; 16];
            for at in 0..4 {
                octets[at * 4..at * 4 + 4].copy_from_slice(&word(at)?);
            }
            Some(Ipv6Addr::from(octets).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[cfg(target_endian = "little")]
    #[test]
    fn the_kernels_tables_are_read() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";
        let row = |local: &str, state: &str, inode: &str| {
            format!(
                "   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 00000000a7b262d3 100 0 0 10 0\n"
            )
        };
        let table = [
            head.to_owned(),
            row("0100007F:07E8", "0A", "11"),
            row("020200C0:C2ED", "0A", "12"),
            row("020200C0:C2EE", "01", "13"),
            row("00000000000000000000000001000000:0050", "0A", "14"),
            row("0000000000000000FFFF00000100007F:0051", "0A", "15"),
            row("00000000000000000000000000000000:0052", "0A", "16"),
            row("zz", "0A", "17"),
            "short\n".to_owned(),
        ]
        .concat();
        let found = Listeners(parse(&table).collect());
        let texts: Vec<String> = found.addresses().iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            ["127.0.0.1:2024", "192.0.2.2:49901", "[::1]:80", "[::ffff:127.0.0.1]:81", "[::]:82"]
        );
        let beyond: Vec<u64> = found.beyond_loopback().0.into_keys().collect();
        assert_eq!(beyond, [12, 16]);
    }

    #[test]
    fn own_listeners_are_found_and_told_from_earlier_ones() {
        let before = Listeners::now().unwrap();
        let loopback = TcpListener::bind("127.0.0.1:0").unwrap();
        let all = TcpListener::bind("0.0.0.0:0").unwrap();
        let new = Listeners::now().unwrap().without(&before);
        let addresses = new.addresses();
        // Other tests of this process may listen as well.
        assert!(addresses.contains(&loopback.local_addr().unwrap()));
        let beyond = new.clone().beyond_loopback().addresses();
        assert!(beyond.contains(&all.local_addr().unwrap()));
        assert!(!beyond.contains(&loopback.local_addr().unwrap()));
        drop(all);
        assert!(!new.without(&Listeners::now().unwrap()).is_empty(), "what ended is told as well");
    }
}
