//! Versions that go from sources to targets, whoever comes and goes.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use refit::translate::ModelConfig;
use refit::translate::megatron::{self, Pipeline, SourceRank, TrainerOptions, TrainerSizes};
use rustix::process::Signal;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

use crate::process::{Job, Rank, config, have_nixl};

#[test]
fn two_sources_and_two_targets_go_through_three_versions() {
    if !have_nixl("two_sources_and_two_targets_go_through_three_versions") {
        return;
    }
    let job = Job::new();
    let mut sources = [0, 1].map(|rank| job.start(&format!("serve --source tp=2 --rank {rank}")));
    let pull = |rank| {
        format!(
            "pull --target tp=2 --rank {rank} --versions 3 --digests if-answered --metrics 127.0.0.1:0"
        )
    };
    let mut targets = [0, 1].map(|rank| job.start(&pull(rank)));
    let addresses = targets.each_mut().map(|target| target.hear("metrics")["address"].clone());
    let bytes = targets.each_mut().map(|target| target.hear("joined")["bytes"].clone());
    for version in 1..=3 {
        for source in &mut sources {
            source.hear_version("published", version);
        }
        for (target, bytes) in targets.iter_mut().zip(&bytes) {
            let installed = target.hear_version("installed", version);
            // Every byte, against the number of the version.
            assert_eq!(installed["verified_bytes"], *bytes);
        }
        if version == 2 {
            let page = scrape(addresses[1].as_str().unwrap());
            let of = r#"{side="target",job="refit",name="engine",rank="1"}"#;
            for line in [
                format!("refit_version{of} 2"),
                format!("refit_installs_total{of} 2"),
                format!("refit_parameters_bytes{of} {}", bytes[1]),
                format!("refit_verified_bytes_total{of} {}", 2 * bytes[1].as_u64().unwrap()),
                format!("refit_pool_quarantined_bytes{of} 0"),
            ] {
                assert!(page.lines().any(|it| it == line), "{line} is not in:\n{page}");
            }
        }
        if version < 3 {
            sources[0].signal(Signal::USR1);
        }
    }
    for target in &mut targets {
        let (status, errors) = target.end();
        assert_eq!(status.code(), Some(0), "{errors}");
    }
    sources.iter_mut().for_each(Rank::leave);
}

#[test]
fn a_source_that_is_killed_comes_back_with_a_newer_version() {
    if !have_nixl("a_source_that_is_killed_comes_back_with_a_newer_version") {
        return;
    }
    let job = Job::new();
    let serve = |rank| format!("serve --source tp=2 --rank {rank}");
    let mut sources = [0, 1].map(|rank| job.start(&serve(rank)));
    let mut target = job.start("pull --target tp=1 --rank 0");
    target.hear_version("installed", 1);
    sources[0].signal(Signal::KILL);
    sources[0].end();
    sources[0] = job.start(&serve(0));
    target.hear_version("installed", 2);
    // The other one may die as well: it takes what rank 0 offers.
    sources[1].signal(Signal::KILL);
    sources[1].end();
    sources[1] = job.start(&serve(1));
    sources[1].hear_version("published", 2);
    sources[0].signal(Signal::USR1);
    target.hear_version("installed", 3);
    target.leave();
    sources.iter_mut().for_each(Rank::leave);
}

#[test]
fn a_target_that_is_paused_or_relays_ends_with_the_same_bytes() {
    if !have_nixl("a_target_that_is_paused_or_relays_ends_with_the_same_bytes") {
        return;
    }
    let job = Job::new();
    let mut source = job.start("serve --source tp=1 --rank 0");
    let mut relay = job.start("pull --target tp=1 --rank 0 --replica first --relay");
    relay.hear_version("installed", 1);
    let mut paused =
        job.start("pull --target tp=1 --rank 0 --replica second --paused --versions 2");
    paused.hear_version("installed", 1);
    source.leave();
    // Nobody holds it but the relay.
    let mut late = job.start("pull --target tp=1 --rank 0 --replica third --versions 1");
    late.hear_version("installed", 1);
    assert_eq!(late.end().0.code(), Some(0));
    // The next life of the trainer counts on.
    let mut source = job.start("serve --source tp=1 --rank 0");
    source.hear_version("published", 2);
    paused.hear_version("installed", 2);
    relay.hear_version("installed", 2);
    assert_eq!(paused.end().0.code(), Some(0));
    relay.leave();
    source.leave();
}

#[test]
fn a_checkpoint_is_served_as_it_is_at_every_version() {
    if !have_nixl("a_checkpoint_is_served_as_it_is_at_every_version") {
        return;
    }
    let job = Job::new();
    let folder = job.path().join("model");
    fs::create_dir(&folder).unwrap();
    fs::copy(config(), folder.join("config.json")).unwrap();
    write_checkpoint(&folder, 1);
    let of = format!("--checkpoint {}", folder.display());
    let mut source = job.start(&format!("serve --source tp=1 --rank 0 {of}"));
    let mut target = job.start(&format!("pull --target tp=1 --rank 0 {of}"));
    let bytes = target.hear("joined")["bytes"].clone();
    assert_eq!(target.hear_version("installed", 1)["verified_bytes"], bytes);
    write_checkpoint(&folder, 2);
    source.signal(Signal::USR1);
    assert_eq!(target.hear_version("installed", 2)["verified_bytes"], bytes);
    // What was compared is what is there: other bytes are found.
    write_checkpoint(&folder, 3);
    let mut other = job.start(&format!("pull --target tp=1 --rank 0 --replica other {of}"));
    let (status, errors) = other.end();
    assert_eq!(status.code(), Some(1), "{errors}");
    assert!(errors.contains("is wrong from byte"), "{errors}");
    target.leave();
    source.leave();
}

/// Every tensor that a trainer of this model holds, in bytes that go with a number.
fn write_checkpoint(folder: &Path, number: u8) {
    let config =
        ModelConfig::from_json(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
    let stages = Pipeline::new(1).stages(config.num_layers).unwrap();
    let ranks: Vec<SourceRank> = TrainerSizes::new(1).ranks(&stages).unwrap();
    let options = TrainerOptions::default();
    let held = megatron::expected(&config, &ranks[0], &options).unwrap();
    let layout = megatron::layout(&config, &ranks[0], &held).unwrap();
    let mut tensors = BTreeMap::new();
    for (param, tensor, _) in layout.bands() {
        assert_eq!(param.dtype().size(), 2);
        let shape = [tensor.rows, tensor.cols].map(|it| usize::try_from(it).unwrap());
        let bytes: Vec<u8> = (0..2 * shape[0] * shape[1])
            .map(|at| (at % 251).to_le_bytes()[0].wrapping_mul(number))
            .collect();
        tensors.insert(tensor.name.to_string(), (shape, bytes));
    }
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        (name.as_str(), TensorView::new(Dtype::BF16, shape.to_vec(), bytes).unwrap())
    });
    let path = folder.join("model.safetensors");
    let draft = folder.join("draft");
    serialize_to_file(views, None, &draft).unwrap();
    fs::rename(draft, path).unwrap();
}

/// What a page of metrics says of a rank.
pub(crate) fn figure(address: &str, name: &str) -> f64 {
    let page = scrape(address);
    let line = page.lines().find(|line| line.starts_with(&format!("{name}{{")));
    let line = line.unwrap_or_else(|| panic!("{name} is not in:\n{page}"));
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

pub(crate) fn scrape(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    assert!(page.starts_with("HTTP/1.1 200"), "{page}");
    assert!(page.contains("application/openmetrics-text"), "{page}");
    page.replace("\r\n", "\n")
}
