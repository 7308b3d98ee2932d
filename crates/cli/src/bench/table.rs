//! What a bench found, as a table for people and as JSON for everything else.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::json;

use super::args::Args;
use super::protocol::{Description, Mode, Moved, RankReport, Rate, Reply};
use super::sizing::Room;
use crate::device::Gpus;
use crate::placement::Placement;
use crate::plan::amplification;
use crate::sizes::{SourceSizes, TargetSizes, bytes};
use crate::transports::TransportName;

/// A whole bench.
#[derive(Debug)]
pub(crate) struct Run {
    config: String,
    layers: u32,
    /// Whether the layers were chosen by the memory that is free.
    chosen: bool,
    of_layers: u32,
    transport: &'static str,
    separate: bool,
    gpus: Option<Gpus>,
    pub(crate) pairs: Vec<PairResult>,
}

/// One pair of sizes.
#[derive(Debug)]
pub(crate) struct PairResult {
    source: SourceSizes,
    target: TargetSizes,
    placement: Option<Placement>,
    pub(crate) cycles: Vec<Cycle>,
    /// Of every round, what every target rank reached.
    pub(crate) memcpys: Vec<Vec<Rate>>,
    pub(crate) big_reads: Vec<Vec<Rate>>,
    /// Of every change of values, what every source rank that packs took to do so.
    pub(crate) packs: Vec<Vec<Rate>>,
    /// Of every round in which copies by a copy engine were measured beside the transport.
    copies: Vec<Vec<Rate>>,
    /// Why they were not.
    no_copies: Option<String>,
    /// Of every target rank.
    pub(crate) descriptions: Vec<Description>,
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
    ready_s: f64,
    posting_s: f64,
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
            ready_s: slowest(|rank| rank.ready_s),
            posting_s: slowest(|rank| rank.posting_s),
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
    /// Uncached total, connecting apart, over cached total.
    cold_of_warm: f64,
    /// One read per row: its pull rate, without its preparation, over the rate of one big read, where measured.
    read_per_row_of_big_read: Option<f64>,
}

impl PairResult {
    pub(crate) fn new(
        source: SourceSizes,
        target: TargetSizes,
        placement: Option<Placement>,
    ) -> Self {
        Self {
            source,
            target,
            placement,
            cycles: Vec::new(),
            memcpys: Vec::new(),
            big_reads: Vec::new(),
            packs: Vec::new(),
            copies: Vec::new(),
            no_copies: None,
            descriptions: Vec::new(),
        }
    }

    /// Takes in a round of copies, in which a rank without a way to a source has none.
    pub(crate) fn add_copies(&mut self, replies: &[Reply], rates: Vec<Rate>) {
        let reason = replies.iter().find_map(|reply| match reply {
            Reply::Unmeasured { reason } => Some(reason.clone()),
            _ => None,
        });
        match reason {
            Some(reason) => self.no_copies = Some(reason),
            None => self.copies.push(rates),
        }
    }

    fn memcpy_gbps(&self) -> Vec<f64> {
        together(&self.memcpys)
    }

    fn big_read_gbps(&self) -> Vec<f64> {
        together(&self.big_reads)
    }

    fn median_of(&self, mode: Mode, value: impl Fn(&Cycle) -> f64) -> Option<f64> {
        median(self.cycles.iter().filter(|cycle| cycle.mode == mode).map(value).collect())
    }

    fn ratios(&self) -> Ratios {
        let ceiling = median(self.big_read_gbps()).unwrap_or_default();
        let of_ceiling = |rate: Option<f64>| rate.map(|rate| rate / ceiling);
        let cached = |value: fn(&Cycle) -> f64| self.median_of(Mode::Cached, value);
        let setup =
            |cycle: &Cycle| (cycle.alloc_s + cycle.register_s + cycle.prepare_s) / cycle.pull_s;
        Ratios {
            pull_of_big_read: of_ceiling(cached(|cycle| cycle.pull_gbps)).unwrap_or_default(),
            refit_of_big_read: of_ceiling(cached(|cycle| cycle.refit_gbps)).unwrap_or_default(),
            total_of_pull: cached(|cycle| cycle.total_s / cycle.pull_s).unwrap_or_default(),
            cold_setup_of_pull: self.median_of(Mode::Uncached, setup).unwrap_or_default(),
            cold_of_warm: self
                .median_of(Mode::Uncached, |cycle| cycle.total_s - cycle.connect_s)
                .unwrap_or_default()
                / cached(|cycle| cycle.total_s).unwrap_or_default(),
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
        if let Some(placement) = &self.placement {
            println!("{placement}");
        }
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
        let memcpy = median(self.memcpy_gbps()).unwrap_or_default();
        let big = median(self.big_read_gbps()).unwrap_or_default();
        println!(
            "ceilings of the same run: memcpy {memcpy:.2} GB/s, one big read from each source {big:.2} GB/s"
        );
        if let Some(copies) = median(together(&self.copies)) {
            println!("one copy by a copy engine from each source {copies:.2} GB/s");
        }
        if let Some(reason) = &self.no_copies {
            println!("one copy by a copy engine was not measured: {reason}");
        }
        let ratios = self.ratios();
        println!(
            "cached: pull {:.2}x of one big read, whole refit {:.2}x, total {:.3}x of its pull; \
             uncached: alloc + register + prepare {:.2}% of its pull, total without connecting {:.3}x of cached",
            ratios.pull_of_big_read,
            ratios.refit_of_big_read,
            ratios.total_of_pull,
            ratios.cold_setup_of_pull * 100.0,
            ratios.cold_of_warm
        );
        if let Some((packed, seconds)) = self.packed() {
            println!(
                "sources packed {} behind every change, in {seconds:.4} s (the slowest; no part of a refit)",
                bytes(packed)
            );
        }
        self.receivers().iter().for_each(Receiver::print);
        self.print_ways();
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

    /// What all sources pack, and the time of the slowest.
    fn packed(&self) -> Option<(u64, f64)> {
        let rounds: Vec<Rate> = self.packs.iter().map(|round| Rate::together(round)).collect();
        let packed = rounds.iter().map(|rate| rate.bytes).max().filter(|&bytes| bytes > 0)?;
        Some((packed, median(rounds.iter().map(|rate| rate.seconds).collect())?))
    }

    fn receivers(&self) -> Vec<Receiver> {
        let ranks = self.cycles.first().map_or(0, |cycle| cycle.ranks.len());
        (0..ranks).map(|index| Receiver::new(self, index)).collect()
    }

    /// What the reads of a cached refit are, and the ways they go.
    fn print_ways(&self) {
        let (mut direct, mut staged, mut bulk) = <(Moved, Moved, Moved)>::default();
        let mut routes = BTreeMap::<&str, Vec<String>>::new();
        for description in &self.descriptions {
            for (sum, part) in [
                (&mut direct, description.direct),
                (&mut staged, description.staged),
                (&mut bulk, description.bulk),
            ] {
                sum.add(part.reads, part.bytes);
            }
            for (source, route) in &description.routes {
                routes.entry(route).or_default().push(format!("{source}->{}", description.rank));
            }
        }
        let shown = |moved: Moved| format!("{} ({})", moved.reads, bytes(moved.bytes));
        println!(
            "reads: {} straight to their place, {} by way of staging; of all, {} by a copy engine",
            shown(direct),
            shown(staged),
            shown(bulk)
        );
        for (route, pairs) in routes {
            println!("route {}: {route}", pairs.join(" "));
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

/// What one target rank came to: medians of its own.
#[derive(Clone, Debug, Serialize)]
struct Receiver {
    rank: u32,
    gpu: Option<u32>,
    /// Of cached refits, `prepare` to `install`.
    seconds: f64,
    /// Bytes needed over that.
    gbps: f64,
    /// Of one big read, measured while the other ranks read theirs.
    big_read_gbps: f64,
    /// The rate over that of one big read.
    of_big_read: f64,
    /// Of one copy by a copy engine, where that was measured beside the transport.
    copy_gbps: Option<f64>,
    /// The rate over that of one copy.
    of_copy: Option<f64>,
    /// Of cached refits, from the start of `prepare` until the first wave was handed to the transport.
    ready_s: f64,
    /// And how long posting it took.
    posting_s: f64,
    /// Of uncached refits, without connecting.
    cold_seconds: f64,
    /// Most registrations of an uncached refit.
    cold_registrations: u64,
}

impl Receiver {
    #[allow(clippy::cast_precision_loss, reason = "rates for people")]
    fn new(pair: &PairResult, index: usize) -> Self {
        let reports = |mode| {
            let of_mode = pair.cycles.iter().filter(move |cycle| cycle.mode == mode);
            of_mode.filter_map(|cycle| cycle.ranks.get(index))
        };
        let of = |mode, value: fn(&RankReport) -> f64| {
            median(reports(mode).map(value).collect()).unwrap_or_default()
        };
        let rank = reports(Mode::Cached).next().map(|report| report.rank).unwrap_or_default();
        let gbps = of(Mode::Cached, |report| report.needed_bytes as f64 / report.total_s / 1e9);
        let own = |rounds: &[Vec<Rate>]| {
            let rates = rounds.iter().filter_map(|round| round.get(index));
            median(rates.map(|rate| rate.gbps()).collect())
        };
        let (ceiling, copy_gbps) = (own(&pair.big_reads).unwrap_or_default(), own(&pair.copies));
        Self {
            rank,
            gpu: pair.placement.as_ref().and_then(|placement| placement.target(rank)),
            seconds: of(Mode::Cached, |report| report.total_s),
            gbps,
            big_read_gbps: ceiling,
            of_big_read: gbps / ceiling,
            copy_gbps,
            of_copy: copy_gbps.map(|copy| gbps / copy),
            ready_s: of(Mode::Cached, |report| report.ready_s),
            posting_s: of(Mode::Cached, |report| report.posting_s),
            cold_seconds: of(Mode::Uncached, |report| report.total_s - report.connect_s),
            cold_registrations: reports(Mode::Uncached)
                .map(|report| report.registrations)
                .max()
                .unwrap_or_default(),
        }
    }

    fn print(&self) {
        let gpu = self.gpu.map(|gpu| format!(" on GPU {gpu}")).unwrap_or_default();
        let copy = self.copy_gbps.zip(self.of_copy);
        let copy = copy.map(|(rate, ratio)| format!(", {ratio:.3}x of one copy ({rate:.2} GB/s)"));
        println!(
            "receiver {}{gpu}: {:.5} s, {:.2} GB/s, {:.3}x of its big read ({:.2} GB/s){}; {:.1} us until reads are \
             posted, and {:.1} us of posting; uncached {:.5} s, {} registrations",
            self.rank,
            self.seconds,
            self.gbps,
            self.of_big_read,
            self.big_read_gbps,
            copy.unwrap_or_default(),
            self.ready_s * 1e6,
            self.posting_s * 1e6,
            self.cold_seconds,
            self.cold_registrations
        );
    }
}

impl Run {
    pub(crate) fn new(
        args: &Args,
        layers: u32,
        of_layers: u32,
        transport: TransportName,
        gpus: Option<Gpus>,
    ) -> Self {
        Self {
            config: args.config.clone(),
            layers,
            chosen: args.layers.is_none(),
            of_layers,
            transport: transport.name(),
            separate: args.separate,
            gpus,
            pairs: Vec::new(),
        }
    }

    pub(crate) fn print_header(&self, room: &Room) {
        let Self { config, layers, of_layers, transport, .. } = self;
        println!("refit bench: {config}, {layers} of {of_layers} layers, over {transport}");
        for gpu in self.gpus.iter().flat_map(|gpus| &gpus.gpus) {
            println!("GPU {}: {}, {} free", gpu.ordinal, gpu.name, bytes(gpu.free_bytes));
        }
        if self.chosen {
            println!("({layers} layers are what fits into {}; --layers changes it)", room.text());
        }
        if self.separate {
            println!("every parameter of a source in an allocation of its own");
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
            let all =
                |rates: fn(&PairResult) -> Vec<f64>| median(pairs.iter().flat_map(rates).collect());
            json!({
                "memcpy_gbps": all(PairResult::memcpy_gbps),
                "big_read_gbps": all(PairResult::big_read_gbps),
                "copy_gbps": all(|pair| together(&pair.copies)),
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
                    "ceiling_samples": { "memcpy_gbps": pair.memcpy_gbps(), "big_read_gbps": pair.big_read_gbps(), "copy_gbps": together(&pair.copies) },
                    "placement": pair.placement,
                    "packed": pair.packed().map(|(bytes, seconds)| json!({ "bytes": bytes, "seconds": seconds })),
                    "ratios": pair.ratios(),
                    "receivers": pair.receivers(),
                    "reads": pair.descriptions,
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
            "device": self.gpus,
            "separate_sources": self.separate,
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

/// Of every round, the rate of all ranks together.
fn together(rounds: &[Vec<Rate>]) -> Vec<f64> {
    rounds.iter().map(|rates| Rate::together(rates).gbps()).collect()
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
