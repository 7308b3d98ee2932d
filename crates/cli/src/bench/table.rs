//! What a bench found, as a table for people and as JSON for everything else.

use serde::Serialize;
use serde_json::json;

use super::protocol::{Mode, RankReport};
use crate::plan::amplification;
use crate::sizes::{SourceSizes, TargetSizes, bytes};

/// A whole bench.
#[derive(Debug)]
pub(crate) struct Run {
    config: String,
    layers: u32,
    of_layers: u32,
    transport: &'static str,
    pub(crate) pairs: Vec<PairResult>,
}

/// One pair of sizes.
#[derive(Debug)]
pub(crate) struct PairResult {
    source: SourceSizes,
    target: TargetSizes,
    pub(crate) cycles: Vec<Cycle>,
    pub(crate) memcpy_gbps: Vec<f64>,
    pub(crate) big_read_gbps: Vec<f64>,
}

/// One cycle of all target ranks together: the slowest one's times, everyone's bytes and counts.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Cycle {
    source: String,
    target: String,
    mode: Mode,
    cycle: u32,
    plan_s: f64,
    alloc_s: f64,
    register_s: f64,
    connect_s: f64,
    prepare_s: f64,
    pull_s: f64,
    land_s: f64,
    total_s: f64,
    wire_bytes: u64,
    needed_bytes: u64,
    staging_bytes: u64,
    reads: u64,
    plans: u64,
    prepared_reads: u64,
    allocations: u64,
    registrations: u64,
    amplification: f64,
    pull_gbps: f64,
    refit_gbps: f64,
    peak_rss_bytes: u64,
    ranks: Vec<RankReport>,
}

impl Cycle {
    #[allow(clippy::cast_precision_loss, reason = "rates for people")]
    pub(crate) fn new(
        source: SourceSizes,
        target: TargetSizes,
        mode: Mode,
        cycle: u32,
        ranks: Vec<RankReport>,
    ) -> Self {
        let slowest = |time: fn(&RankReport) -> f64| ranks.iter().map(time).fold(0.0, f64::max);
        let sum = |count: fn(&RankReport) -> u64| ranks.iter().map(count).sum::<u64>();
        let (wire_bytes, needed_bytes) =
            (sum(|rank| rank.wire_bytes), sum(|rank| rank.needed_bytes));
        let (pull_s, total_s) = (slowest(|rank| rank.pull_s), slowest(|rank| rank.total_s));
        let rate = |bytes: u64, seconds: f64| {
            if seconds > 0.0 { bytes as f64 / seconds / 1e9 } else { 0.0 }
        };
        Self {
            source: source.to_string(),
            target: target.to_string(),
            mode,
            cycle,
            plan_s: slowest(|rank| rank.plan_s),
            alloc_s: slowest(|rank| rank.alloc_s),
            register_s: slowest(|rank| rank.register_s),
            connect_s: slowest(|rank| rank.connect_s),
            prepare_s: slowest(|rank| rank.prepare_s),
            pull_s,
            land_s: slowest(|rank| rank.land_s),
            total_s,
            wire_bytes,
            needed_bytes,
            staging_bytes: sum(|rank| rank.staging_bytes),
            reads: sum(|rank| rank.reads),
            plans: sum(|rank| rank.plans),
            prepared_reads: sum(|rank| rank.prepared_reads),
            allocations: sum(|rank| rank.allocations),
            registrations: sum(|rank| rank.registrations),
            amplification: amplification(wire_bytes, needed_bytes),
            pull_gbps: rate(wire_bytes, pull_s),
            refit_gbps: rate(needed_bytes, total_s),
            peak_rss_bytes: ranks.iter().map(|rank| rank.peak_rss_bytes).max().unwrap_or_default(),
            ranks,
        }
    }
}

/// Of a pair, what its cycles come to.
#[derive(Clone, Copy, Debug, Serialize)]
struct Ratios {
    /// Cached pull rate over the rate of one big read.
    pull_of_big_read: f64,
    /// Cached refit rate, landing and all, over the rate of one big read.
    refit_of_big_read: f64,
    /// Cached total over its own pull.
    total_of_pull: f64,
    /// Uncached allocation, registration and preparation over the pull of the same cycle.
    cold_setup_of_pull: f64,
    /// One read per row: its pull rate, without its preparation, over the rate of one big read, where measured.
    read_per_row_of_big_read: Option<f64>,
}

impl PairResult {
    pub(crate) fn new(source: SourceSizes, target: TargetSizes) -> Self {
        Self {
            source,
            target,
            cycles: Vec::new(),
            memcpy_gbps: Vec::new(),
            big_read_gbps: Vec::new(),
        }
    }

    fn median_of(&self, mode: Mode, value: impl Fn(&Cycle) -> f64) -> Option<f64> {
        median(self.cycles.iter().filter(|cycle| cycle.mode == mode).map(value).collect())
    }

    fn ratios(&self) -> Ratios {
        let ceiling = median(self.big_read_gbps.clone()).unwrap_or_default();
        let of_ceiling = |rate: Option<f64>| rate.map(|rate| rate / ceiling);
        let cached = |value: fn(&Cycle) -> f64| self.median_of(Mode::Cached, value);
        let setup =
            |cycle: &Cycle| (cycle.alloc_s + cycle.register_s + cycle.prepare_s) / cycle.pull_s;
        Ratios {
            pull_of_big_read: of_ceiling(cached(|cycle| cycle.pull_gbps)).unwrap_or_default(),
            refit_of_big_read: of_ceiling(cached(|cycle| cycle.refit_gbps)).unwrap_or_default(),
            total_of_pull: cached(|cycle| cycle.total_s / cycle.pull_s).unwrap_or_default(),
            cold_setup_of_pull: self.median_of(Mode::Uncached, setup).unwrap_or_default(),
            read_per_row_of_big_read: of_ceiling(
                self.median_of(Mode::ReadPerRun, |cycle| cycle.pull_gbps),
            ),
        }
    }

    fn modes(&self) -> impl Iterator<Item = Mode> + '_ {
        [Mode::Uncached, Mode::Cached, Mode::ReadPerRun]
            .into_iter()
            .filter(|mode| self.cycles.iter().any(|cycle| cycle.mode == *mode))
    }

    pub(crate) fn print(&self) {
        let ranks = self.cycles.first().map_or(0, |cycle| cycle.ranks.len());
        let plural = if ranks == 1 { "" } else { "s" };
        let needed = self.cycles.first().map_or(0, |cycle| cycle.needed_bytes);
        println!(
            "\n{} -> {}: {ranks} target rank{plural}, {}",
            self.source,
            self.target,
            bytes(needed)
        );
        println!(
            "{:>5} {:<12} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>7} {:>9} {:>6} {:>6} {:>5} {:>6}",
            "cycle",
            "buffers",
            "plan",
            "alloc",
            "register",
            "connect",
            "prepare",
            "pull",
            "land",
            "total",
            "reads",
            "wire",
            "ampl",
            "allocs",
            "regs",
            "GB/s"
        );
        for cycle in &self.cycles {
            row(&cycle.cycle.to_string(), cycle);
        }
        for mode in self.modes() {
            row("med", &self.median_cycle(mode));
        }
        let memcpy = median(self.memcpy_gbps.clone()).unwrap_or_default();
        let big = median(self.big_read_gbps.clone()).unwrap_or_default();
        println!(
            "ceilings of the same run: memcpy {memcpy:.2} GB/s, one big read from each source {big:.2} GB/s"
        );
        let ratios = self.ratios();
        println!(
            "cached: pull {:.2}x of one big read, whole refit {:.2}x, total {:.3}x of its pull; \
             uncached: alloc + register + prepare {:.2}% of its pull",
            ratios.pull_of_big_read,
            ratios.refit_of_big_read,
            ratios.total_of_pull,
            ratios.cold_setup_of_pull * 100.0
        );
        let peak =
            self.cycles.iter().flat_map(|cycle| &cycle.ranks).take(2 * ranks).collect::<Vec<_>>();
        if let Some(rank) = peak
            .iter()
            .max_by_key(|rank| rank.peak_rss_bytes)
            .filter(|rank| rank.peak_rss_bytes > 0)
        {
            let expected = rank.param_bytes + rank.staging_bytes;
            println!(
                "peak memory of a target: {}, {} over its parameters and staging",
                bytes(rank.peak_rss_bytes),
                bytes(rank.peak_rss_bytes.saturating_sub(expected))
            );
        }
    }

    /// A cycle that never was: the median of every column.
    fn median_cycle(&self, mode: Mode) -> Cycle {
        let of = |value: fn(&Cycle) -> f64| self.median_of(mode, value).unwrap_or_default();
        let last = self.cycles.iter().rfind(|cycle| cycle.mode == mode);
        let mut cycle = last
            .cloned()
            .unwrap_or_else(|| Cycle::new(self.source, self.target, mode, 0, Vec::new()));
        cycle.plan_s = of(|cycle| cycle.plan_s);
        cycle.alloc_s = of(|cycle| cycle.alloc_s);
        cycle.register_s = of(|cycle| cycle.register_s);
        cycle.connect_s = of(|cycle| cycle.connect_s);
        cycle.prepare_s = of(|cycle| cycle.prepare_s);
        cycle.pull_s = of(|cycle| cycle.pull_s);
        cycle.land_s = of(|cycle| cycle.land_s);
        cycle.total_s = of(|cycle| cycle.total_s);
        cycle.refit_gbps = of(|cycle| cycle.refit_gbps);
        cycle
    }
}

impl Run {
    pub(crate) fn new(
        config: String,
        layers: u32,
        of_layers: u32,
        transport: &'static str,
    ) -> Self {
        Self { config, layers, of_layers, transport, pairs: Vec::new() }
    }

    pub(crate) fn print_header(&self, free: u64, chosen: bool) {
        let Self { config, layers, of_layers, transport, .. } = self;
        println!("refit bench: {config}, {layers} of {of_layers} layers, over {transport}");
        if chosen {
            println!(
                "({layers} layers are what fits into half of the {} of free memory; --layers changes it)",
                bytes(free)
            );
        }
        println!(
            "times in seconds, of the slowest rank; bytes and counts of all target ranks together; every byte verified"
        );
    }

    pub(crate) fn print_summary(&self) {
        println!(
            "\n{:<16} {:>16} {:>12} {:>14} {:>18} {:>16}",
            "cached",
            "pull/big read",
            "refit/big",
            "total/pull",
            "cold setup/pull",
            "read per row/big"
        );
        for pair in &self.pairs {
            let ratios = pair.ratios();
            let per_row = ratios
                .read_per_row_of_big_read
                .map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
            println!(
                "{:<16} {:>16.2} {:>12.2} {:>14.3} {:>17.2}% {:>16}",
                format!("{} -> {}", pair.source, pair.target),
                ratios.pull_of_big_read,
                ratios.refit_of_big_read,
                ratios.total_of_pull,
                ratios.cold_setup_of_pull * 100.0,
                per_row
            );
        }
    }

    /// `cycles[]` and `ceilings` of the whole run, and the same for every pair under `pairs[]`.
    pub(crate) fn json(&self) -> serde_json::Value {
        let ceilings = |pairs: &[PairResult]| {
            let all = |rates: fn(&PairResult) -> &Vec<f64>| {
                median(pairs.iter().flat_map(rates).copied().collect())
            };
            json!({
                "memcpy_gbps": all(|pair| &pair.memcpy_gbps),
                "big_read_gbps": all(|pair| &pair.big_read_gbps),
            })
        };
        let pairs: Vec<_> = self
            .pairs
            .iter()
            .map(|pair| {
                json!({
                    "source": pair.source.to_string(),
                    "target": pair.target.to_string(),
                    "ceilings": ceilings(std::slice::from_ref(pair)),
                    "ceiling_samples": { "memcpy_gbps": pair.memcpy_gbps, "big_read_gbps": pair.big_read_gbps },
                    "ratios": pair.ratios(),
                })
            })
            .collect();
        let cycles: Vec<&Cycle> = self.pairs.iter().flat_map(|pair| &pair.cycles).collect();
        json!({
            "schema": 1,
            "config": self.config,
            "layers": self.layers,
            "transport": self.transport,
            "machine": machine(),
            "cycles": cycles,
            "ceilings": ceilings(&self.pairs),
            "pairs": pairs,
        })
    }
}

pub(crate) fn machine() -> serde_json::Value {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    json!({ "cpu": model.trim_start_matches([' ', '\t', ':']), "cores": cores })
}

fn row(number: &str, cycle: &Cycle) {
    println!(
        "{:>5} {:<12} {:>8.4} {:>8.4} {:>8.4} {:>8.4} {:>8.4} {:>8.4} {:>8.4} {:>8.4} {:>7} {:>9} {:>5.2}x {:>6} {:>5} {:>6.2}",
        number,
        cycle.mode.label(),
        cycle.plan_s,
        cycle.alloc_s,
        cycle.register_s,
        cycle.connect_s,
        cycle.prepare_s,
        cycle.pull_s,
        cycle.land_s,
        cycle.total_s,
        cycle.reads,
        bytes(cycle.wire_bytes),
        cycle.amplification,
        cycle.allocations,
        cycle.registrations,
        cycle.refit_gbps
    );
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
