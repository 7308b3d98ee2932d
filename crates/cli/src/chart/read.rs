//! What is drawn, and how it is read from files.

use serde::Deserialize;

/// A whole picture.
#[derive(Debug, Default)]
pub(super) struct Chart {
    /// The names of the files.
    pub(super) files: Vec<String>,
    /// What was measured on, without repetitions.
    pub(super) machines: Vec<String>,
    /// One for each model, in the order of the files.
    pub(super) panels: Vec<Panel>,
    /// What bars stand for, in the order in which they are drawn.
    pub(super) series: Vec<Series>,
    transports: Vec<String>,
    methods: Vec<String>,
}

/// One model.
#[derive(Debug)]
pub(super) struct Panel {
    pub(super) model: String,
    /// What files say about it: layers kept, how often it was measured.
    pub(super) notes: Vec<String>,
    pub(super) groups: Vec<Group>,
}

/// One pair of sizes.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) source: String,
    pub(super) target: String,
    /// In the order of their series.
    pub(super) bars: Vec<Bar>,
}

/// One rate.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bar {
    /// Which of [`Chart::series`].
    pub(super) series: usize,
    /// Gigabytes a second, of all engine ranks together.
    pub(super) gbps: f64,
    /// The same over the ceiling of its pair and transport.
    pub(super) of_ceiling: Option<f64>,
    /// The share of the bytes that never left their GPU, where it is known and counts.
    pub(super) at_home: Option<f64>,
}

/// What a bar stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Series {
    pub(super) kind: Kind,
    pub(super) label: String,
}

/// Which colour a bar has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A whole refit over the n-th transport.
    Refit(usize),
    /// Its reads alone.
    Pull(usize),
    /// One big read over that transport.
    Ceiling(usize),
    /// The n-th of the others.
    Peer(usize),
}

/// A file of `refit bench --json`, as far as it is drawn.
#[derive(Debug, Deserialize)]
struct Bench {
    config: String,
    layers: u32,
    transport: String,
    machine: BenchMachine,
    device: Option<Device>,
    #[serde(default)]
    separate_sources: bool,
    cycles: Vec<Cycle>,
    pairs: Vec<Pair>,
}

#[derive(Debug, Deserialize)]
struct BenchMachine {
    cpu: String,
    cores: u64,
}

#[derive(Debug, Deserialize)]
struct Device {
    gpus: Vec<Gpu>,
}

#[derive(Debug, Deserialize)]
struct Gpu {
    name: String,
}

#[derive(Debug, Deserialize)]
struct Cycle {
    source: String,
    target: String,
    mode: String,
    pull_gbps: f64,
    refit_gbps: f64,
}

#[derive(Debug, Deserialize)]
struct Pair {
    source: String,
    target: String,
    ceilings: Ceilings,
}

#[derive(Debug, Deserialize)]
struct Ceilings {
    big_read_gbps: Option<f64>,
}

impl PeerResult {
    /// With fewer GPUs than ranks, an engine rank finds some of its bytes on its own GPU.
    #[allow(clippy::cast_precision_loss, reason = "a share for people")]
    fn at_home(&self) -> Option<f64> {
        let near = self.needed_bytes.checked_sub(self.remote_bytes?)?;
        // Norms that every trainer rank holds are near in any case.
        (near * 20 > self.needed_bytes).then(|| near as f64 / self.needed_bytes as f64)
    }
}

/// A file of `benches/peers`.
#[derive(Debug, Deserialize)]
struct Peers {
    machine: PeersMachine,
    results: Vec<PeerResult>,
}

#[derive(Debug, Deserialize)]
struct PeersMachine {
    device: String,
    gpus: usize,
}

#[derive(Debug, Deserialize)]
struct PeerResult {
    #[serde(default)]
    needed_bytes: u64,
    #[serde(default)]
    remote_bytes: Option<u64>,
    method: String,
    model: String,
    source: String,
    target: String,
    gbps: f64,
}

/// What tells the two kinds of file apart.
#[derive(Debug, Deserialize)]
struct Head {
    schema: Option<u64>,
    kind: Option<String>,
}

/// No link is faster: a larger rate is a mistake.
const MOST_GBPS: f64 = 1e7;

impl Chart {
    /// Adds what a file holds; the error says what is wrong with it.
    pub(super) fn add(&mut self, name: &str, text: &str) -> Result<(), String> {
        let wrong = |error: serde_json::Error| {
            format!("not what `refit bench --json` or benches/peers write: {error}")
        };
        let head: Head = serde_json::from_str(text).map_err(wrong)?;
        if head.schema != Some(1) {
            let found = head.schema.map_or_else(|| "none".to_owned(), |schema| schema.to_string());
            return Err(format!("schema {found}, where this `refit` draws schema 1"));
        }
        match head.kind.as_deref() {
            None => self.add_bench(&serde_json::from_str(text).map_err(wrong)?)?,
            Some("peers") => self.add_peers(&serde_json::from_str(text).map_err(wrong)?)?,
            Some(kind) => return Err(format!("a file of kind `{kind}` is not drawn")),
        }
        self.files.push(name.to_owned());
        Ok(())
    }

    fn add_bench(&mut self, bench: &Bench) -> Result<(), String> {
        let gpus = bench.device.as_ref().map(|device| &device.gpus).filter(|gpus| !gpus.is_empty());
        self.add_machine(match gpus {
            Some(gpus) => several(gpus.len(), &gpus[0].name),
            None => format!("{}, {} cores", bench.machine.cpu, bench.machine.cores),
        });
        let apart = if bench.separate_sources { ", tensors allocated apart" } else { "" };
        let via = format!("{}{apart}", bench.transport);
        let transport = index_of(&mut self.transports, &via);
        let refit = self.series(Kind::Refit(transport), format!("refit over {via}"));
        let pull = self.series(Kind::Pull(transport), "its reads alone".to_owned());
        let ceiling = self.series(Kind::Ceiling(transport), "its ceiling: one big read".to_owned());

        let rounds = bench.cycles.iter().filter(|cycle| cycle.mode == "cached").count()
            / bench.pairs.len().max(1);
        let panel = self.panel(&bench.config);
        panel.note(format!("{} layers over {via}, medians of {rounds}", bench.layers));
        for pair in &bench.pairs {
            let name = format!("{} -> {}", pair.source, pair.target);
            let median = |rate: fn(&Cycle) -> f64| {
                let of_pair = bench.cycles.iter().filter(|cycle| {
                    cycle.mode == "cached"
                        && cycle.source == pair.source
                        && cycle.target == pair.target
                });
                let rate = median(of_pair.map(rate).collect());
                checked(rate.ok_or_else(|| format!("no cached cycle of {name}"))?)
            };
            let most = pair.ceilings.big_read_gbps.map(checked).transpose()?;
            let group = panel.group(&pair.source, &pair.target);
            if group.bars.iter().any(|bar| bar.series == refit) {
                return Err(format!(
                    "{} {name} over {via} is in another file, too; draw them apart",
                    bench.config
                ));
            }
            for (series, gbps) in [
                (refit, median(|cycle| cycle.refit_gbps)?),
                (pull, median(|cycle| cycle.pull_gbps)?),
            ] {
                let of_ceiling = most.filter(|&most| most > 0.0).map(|most| gbps / most);
                group.add(Bar { series, gbps, of_ceiling, at_home: None });
            }
            if let Some(gbps) = most {
                group.add(Bar { series: ceiling, gbps, of_ceiling: None, at_home: None });
            }
        }
        Ok(())
    }

    fn add_peers(&mut self, peers: &Peers) -> Result<(), String> {
        self.add_machine(several(peers.machine.gpus, &peers.machine.device));
        for result in &peers.results {
            let method = index_of(&mut self.methods, &result.method);
            let series = self.series(Kind::Peer(method), label(&result.method));
            let group = self.panel(&result.model).group(&result.source, &result.target);
            if group.bars.iter().any(|bar| bar.series == series) {
                return Err(format!(
                    "{} of {} {} -> {} is there twice",
                    result.method, result.model, result.source, result.target
                ));
            }
            let (gbps, at_home) = (checked(result.gbps)?, result.at_home());
            group.add(Bar { series, gbps, of_ceiling: None, at_home });
        }
        Ok(())
    }

    fn add_machine(&mut self, machine: String) {
        if !self.machines.contains(&machine) {
            self.machines.push(machine);
        }
    }

    fn series(&mut self, kind: Kind, label: String) -> usize {
        let found = self.series.iter().position(|series| series.kind == kind);
        found.unwrap_or_else(|| {
            self.series.push(Series { kind, label });
            self.series.len() - 1
        })
    }

    fn panel(&mut self, model: &str) -> &mut Panel {
        let found = self.panels.iter().position(|panel| panel.model == model);
        let index = found.unwrap_or_else(|| {
            let model = model.to_owned();
            self.panels.push(Panel { model, notes: Vec::new(), groups: Vec::new() });
            self.panels.len() - 1
        });
        &mut self.panels[index]
    }
}

impl Panel {
    fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    fn group(&mut self, source: &str, target: &str) -> &mut Group {
        let found =
            self.groups.iter().position(|group| group.source == source && group.target == target);
        let index = found.unwrap_or_else(|| {
            let (source, target) = (source.to_owned(), target.to_owned());
            self.groups.push(Group { source, target, bars: Vec::new() });
            self.groups.len() - 1
        });
        &mut self.groups[index]
    }
}

impl Group {
    fn add(&mut self, bar: Bar) {
        self.bars.push(bar);
        self.bars.sort_by_key(|bar| bar.series);
    }
}

/// Where `name` stands in `names`; at the end if it was not there.
fn index_of(names: &mut Vec<String>, name: &str) -> usize {
    names.iter().position(|known| known == name).unwrap_or_else(|| {
        names.push(name.to_owned());
        names.len() - 1
    })
}

fn several(count: usize, name: &str) -> String {
    if count > 1 { format!("{count} x {name}") } else { name.to_owned() }
}

/// What readers call the methods of `benches/peers`.
fn label(method: &str) -> String {
    let known = match method {
        "nccl_gather_broadcast" => "NCCL gather, broadcast, slice",
        "nccl_p2p" => "NCCL exact send and receive",
        "torch_peer_copy" => "torch copy_ between GPUs",
        other => other,
    };
    known.to_owned()
}

/// A rate that can be drawn.
fn checked(gbps: f64) -> Result<f64, String> {
    if (0.0..=MOST_GBPS).contains(&gbps) {
        Ok(gbps)
    } else {
        Err(format!("{gbps} GB/s is no rate"))
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// A bench of one pair: `rates` are those of its cached cycles.
    pub(in super::super) fn bench(config: &str, transport: &str, rates: &[f64]) -> String {
        let cycle = |mode: &str, gbps: f64| json!({ "source": "TP2", "target": "TP1", "mode": mode, "pull_gbps": gbps + 1.0, "refit_gbps": gbps });
        let mut cycles = vec![cycle("uncached", 1.0)];
        cycles.extend(rates.iter().map(|&gbps| cycle("cached", gbps)));
        json!({
            "schema": 1, "config": config, "layers": 3, "transport": transport,
            "machine": { "cpu": "a <processor>", "cores": 2 },
            "cycles": cycles,
            "pairs": [{ "source": "TP2", "target": "TP1", "ceilings": { "big_read_gbps": 40.0 } }],
        })
        .to_string()
    }

    pub(in super::super) fn peers(model: &str, results: &[(&str, f64)]) -> String {
        let results: Vec<_> = results
            .iter()
            .map(|(method, gbps)| {
                json!({ "method": method, "model": model, "source": "TP2", "target": "TP1", "gbps": gbps })
            })
            .collect();
        json!({ "schema": 1, "kind": "peers", "machine": { "device": "GPU", "gpus": 2 }, "results": results })
            .to_string()
    }

    fn rates(group: &Group) -> Vec<(usize, f64)> {
        group.bars.iter().map(|bar| (bar.series, bar.gbps)).collect()
    }

    #[test]
    fn cached_medians_and_ceilings_are_read() {
        let mut chart = Chart::default();
        chart.add("a.json", &bench("m", "peer", &[30.0, 10.0, 20.0])).unwrap();
        assert_eq!(chart.machines, ["a <processor>, 2 cores"]);
        let kinds: Vec<_> = chart.series.iter().map(|series| series.kind).collect();
        assert_eq!(kinds, [Kind::Refit(0), Kind::Pull(0), Kind::Ceiling(0)]);
        let group = &chart.panels[0].groups[0];
        assert_eq!(rates(group), [(0, 20.0), (1, 21.0), (2, 40.0)]);
        assert_eq!(group.bars[0].of_ceiling, Some(0.5));
        assert_eq!(chart.panels[0].notes, ["3 layers over peer, medians of 3"]);
    }

    #[test]
    fn a_ceiling_that_was_not_measured_is_not_drawn() {
        let mut chart = Chart::default();
        chart.add("a", &bench("m", "peer", &[20.0]).replace(":40.0", ":null")).unwrap();
        let group = &chart.panels[0].groups[0];
        assert_eq!(rates(group), [(0, 20.0), (1, 21.0)]);
        assert_eq!(group.bars[0].of_ceiling, None);
    }

    #[test]
    fn models_have_panels_and_transports_and_peers_have_series() {
        let mut chart = Chart::default();
        chart.add("p.json", &peers("m", &[("nccl_p2p", 5.0), ("mine", 6.0)])).unwrap();
        chart.add("a.json", &bench("m", "peer", &[20.0])).unwrap();
        chart.add("b.json", &bench("m", "nixl", &[10.0])).unwrap();
        chart.add("c.json", &bench("n", "nixl", &[9.0])).unwrap();
        assert_eq!(chart.files, ["p.json", "a.json", "b.json", "c.json"]);
        let models: Vec<_> = chart.panels.iter().map(|panel| panel.model.as_str()).collect();
        assert_eq!(models, ["m", "n"]);
        assert_eq!(chart.panels[0].groups.len(), 1);
        assert_eq!(chart.panels[0].groups[0].bars.len(), 8);
        assert_eq!(rates(&chart.panels[1].groups[0]), [(5, 9.0), (6, 10.0), (7, 40.0)]);
        assert_eq!(chart.series[1].label, "mine");
        assert_eq!(chart.series[5].kind, Kind::Refit(1));
    }

    #[test]
    fn what_cannot_be_drawn_is_said() {
        let good = bench("m", "peer", &[20.0]);
        for (text, hint) in [
            ("{".to_owned(), "not what"),
            (r#"{"schema": 2}"#.to_owned(), "schema 2"),
            (r#"{"config": "m"}"#.to_owned(), "schema none"),
            (r#"{"schema": 1}"#.to_owned(), "config"),
            (r#"{"schema": 1, "kind": "plan"}"#.to_owned(), "`plan`"),
            (good.replace("\"big_read_gbps\":40.0", "\"big_read_gbps\":-1.0"), "-1 GB/s"),
            (good.replace("\"refit_gbps\":20.0", "\"refit_gbps\":1e300"), "is no rate"),
            (bench("m", "peer", &[]), "no cached cycle of TP2 -> TP1"),
        ] {
            let error = Chart::default().add("x", &text).unwrap_err();
            assert!(error.contains(hint), "{error}");
        }
        let mut chart = Chart::default();
        chart.add("a", &good).unwrap();
        assert!(chart.add("b", &good).unwrap_err().contains("in another file"));
        let twice = peers("m", &[("x", 1.0), ("x", 2.0)]);
        assert!(chart.add("c", &twice).unwrap_err().contains("twice"));
    }
}
