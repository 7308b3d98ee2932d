//! What a person or an orchestrator gets wrong, and what is said to it.

use crate::process::{Job, Rank, have_nixl};

/// What a command that does not go on says on its way out.
fn refused(job: &Job, arguments: &str, code: i32) -> String {
    let output = job.rank(arguments).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments}: {text}");
    text
}

#[test]
fn what_cannot_be_meant_is_refused_before_anything_begins() {
    let job = Job::new();
    for (arguments, part) in [
        ("serve --rank 0", "--source <"),
        ("serve --source tp=2 --rank 2", "--rank 2: a trainer of tp=2"),
        ("serve --source tp=3 --rank 0", "3"),
        ("serve --source tq=2 --rank 0", "tq"),
        ("serve --source tp=2 --rank 0 --versions 3", "--every"),
        ("serve --source tp=2 --rank 0 --transport local", "does not leave its process"),
        ("serve --source tp=2 --rank 0 --metrics 0.0.0.0:0", "--metrics-beyond-this-host"),
        ("serve --source tp=2 --rank 0 --deadline 0", "0.1 to 86400"),
        ("serve --source tp=2 --rank 0 --rendezvouz x", "--rendezvous"),
        ("pull --target tp=3 --rank 0", "3"),
        ("pull --target tp=2 --rank 0 --paused", "leave it out"),
        ("pull --target tp=1 --rank 0 --paused --staged", "cannot be used with"),
        ("pull --target tp=1 --rank 0 --layers 99", "the model has 2"),
        ("pull --target tp=1 --rank 0 --key-file /dev/null", "plain file"),
        ("pull --target tp=1 --rank 0 --checkpoint /nowhere", "/nowhere/config.json"),
    ] {
        let text = refused(&job, arguments, 2);
        assert!(text.contains(part), "{arguments}: {text}");
    }
}

#[test]
fn help_names_every_option_and_what_status_means() {
    for (command, parts) in [
        ("serve", ["--rendezvous", "--every", "SIGUSR1", "Status 1"]),
        ("pull", ["--replica", "--digests", "--wait", "Status 1"]),
    ] {
        let mut rank = std::process::Command::new(env!("CARGO_BIN_EXE_refit"));
        let output = rank.args([command, "--help"]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        for part in parts {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    }
}

#[test]
fn a_host_without_nixl_is_told_so() {
    let job = Job::new();
    let mut command = job.rank("serve --source tp=1 --rank 0");
    command.env("REFIT_NIXL_LIBRARY", "/nowhere/libnixl_capi.so").env("NIXL_PREFIX", "/nowhere");
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    // Where the system has one of its own, that is taken, and the process would run.
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("NIXL cannot be used"), "{text}");
    assert!(text.contains("/nowhere/libnixl_capi.so"), "{text}");
}

#[test]
fn tcp_beyond_this_host_is_refused_unless_it_is_asked_for() {
    if !have_nixl("tcp_beyond_this_host_is_refused_unless_it_is_asked_for") {
        return;
    }
    let job = Job::new();
    let mut command = job.rank("serve --source tp=1 --rank 0");
    let output = command.env("UCX_TLS", "tcp").env("UCX_NET_DEVICES", "all").output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("TCP beyond loopback"), "{text}");
}

#[test]
fn another_key_or_another_number_of_ranks_is_named() {
    if !have_nixl("another_key_or_another_number_of_ranks_is_named") {
        return;
    }
    let job = Job::new();
    let mut sources: Vec<Rank> = vec![job.start("serve --source tp=2 --rank 0")];
    sources[0].hear("published");
    let other = job.key("other", "another key, of as many bytes as it takes");
    let text =
        refused(&job, &format!("pull --target tp=1 --rank 0 --key-file {}", other.display()), 1);
    assert!(text.contains("another key"), "{text}");
    assert!(!text.contains("as many bytes"), "{text}");

    let text = refused(&job, "pull --target tp=1 --rank 0 --wait 1", 1);
    assert!(text.contains("of its 2 ranks [1] are not there"), "{text}");
    sources.push(job.start("serve --source tp=4 --rank 1"));
    sources[1].hear("published");
    let text = refused(&job, "pull --target tp=1 --rank 0 --wait 1", 1);
    assert!(text.contains("start all of them with one number"), "{text}");
    sources.iter_mut().for_each(Rank::leave);
}
