//! What is logged: every stage, and nothing that is a secret.

use std::fs;

use crate::process::{Job, Rank, have_nixl};

const STAGES: [&str; 10] = [
    "control_discovery",
    "source_preparation",
    "setup_registration",
    "transfer_planning",
    "wire_transfer",
    "receive_sync",
    "transformation",
    "installation",
    "post_install",
    "rollout_readiness",
];

#[test]
fn a_refit_names_its_ten_stages_and_neither_keys_nor_addresses() {
    if !have_nixl("a_refit_names_its_ten_stages_and_neither_keys_nor_addresses") {
        return;
    }
    let job = Job::new();
    let start = |arguments: &str| {
        let mut command = job.rank(arguments);
        command.env("RUST_LOG", "trace");
        Rank::start(command)
    };
    let mut source = start("serve --source tp=1 --rank 0");
    // Two ranks, so that one waits for the other.
    let mut targets = [0, 1].map(|rank| start(&format!("pull --target tp=2 --rank {rank}")));
    targets.iter_mut().for_each(|target| drop(target.hear("installed")));
    let ids = [source.id(), targets[0].id(), targets[1].id()];
    let mapped: Vec<(u64, u64)> = ids.iter().flat_map(|id| ranges(*id)).collect();
    source.signal(rustix::process::Signal::USR1);
    for target in &mut targets {
        target.hear_version("installed", 2);
    }
    let mut log = String::new();
    for rank in targets.iter_mut().chain([&mut source]) {
        rank.signal(rustix::process::Signal::TERM);
        log += &rank.end().1;
        log += "\n";
    }
    for stage in STAGES {
        let closed = |line: &str| line.contains(stage) && line.contains("close");
        assert!(log.lines().any(closed), "no line says how long {stage} took");
    }
    assert!(log.contains("DEBUG"), "{log}");
    assert!(!log.contains(&job.secret));
    let spelled: String = job.secret.bytes().map(|byte| format!("{byte:02x}")).collect();
    assert!(!log.to_lowercase().contains(&spelled));
    for word in log.split(|c: char| !c.is_ascii_alphanumeric()) {
        let decimal = word.parse::<u64>().ok();
        let hex = u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
        for number in [decimal, hex].into_iter().flatten() {
            let inside = mapped.iter().any(|&(from, to)| (from..to).contains(&number));
            let line = log.lines().find(|line| line.contains(word));
            assert!(!inside, "`{word}` is an address: {line:?}");
        }
    }
}

/// Where a process has memory.
fn ranges(id: u32) -> Vec<(u64, u64)> {
    let maps = fs::read_to_string(format!("/proc/{id}/maps")).unwrap();
    let range = |line: &str| {
        let (from, to) = line.split(' ').next()?.split_once('-')?;
        Some((u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?))
    };
    let ranges: Vec<_> = maps.lines().filter_map(range).collect();
    assert!(ranges.len() > 10);
    ranges
}
