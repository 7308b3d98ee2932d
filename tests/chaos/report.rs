//! What was counted, as a table and as JSON.

use serde_json::{Map, Value, json};

use crate::processes::Lane;

/// One part of a run, on one lane.
#[derive(Debug)]
pub(crate) struct Report {
    name: &'static str,
    lane: Lane,
    numbers: Vec<(String, Value)>,
    broken: Vec<String>,
    /// How many more promises were broken.
    omitted: usize,
}

impl Report {
    pub(crate) fn new(name: &'static str, lane: Lane) -> Self {
        Self { name, lane, numbers: Vec::new(), broken: Vec::new(), omitted: 0 }
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn lane(&self) -> Lane {
        self.lane
    }

    pub(crate) fn number(&mut self, name: impl Into<String>, value: impl Into<Value>) {
        self.numbers.push((name.into(), value.into()));
    }

    /// The shape of some times, given in microseconds.
    pub(crate) fn times(&mut self, name: &str, micros: &mut [u64]) {
        micros.sort_unstable();
        let at = |percent: usize| millis(percentile(micros, percent));
        let (p50, p99, max) = (at(50), at(99), at(100));
        self.number(name, json!({ "p50_ms": p50, "p99_ms": p99, "max_ms": max }));
    }

    /// A promise that does not hold.
    pub(crate) fn broken(&mut self, what: impl Into<String>) {
        if self.broken.len() < 20 {
            let what = what.into();
            eprintln!("{}, {}: BROKEN: {what}", self.name, self.lane.name());
            self.broken.push(what);
        } else {
            self.omitted += 1;
        }
    }

    pub(crate) fn check(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.broken(what());
        }
    }

    pub(crate) fn holds(&self) -> bool {
        self.broken.is_empty()
    }

    pub(crate) fn print(&self) {
        println!(
            "\n{}, {}: {}",
            self.name,
            self.lane.name(),
            if self.holds() { "held" } else { "BROKEN" }
        );
        for (name, value) in &self.numbers {
            println!("  {name:<34} {value}");
        }
        for broken in &self.broken {
            println!("  BROKEN {broken}");
        }
        if self.omitted > 0 {
            println!("  and {} more", self.omitted);
        }
    }

    pub(crate) fn json(&self) -> Value {
        let mut all: Map<String, Value> = self.numbers.iter().cloned().collect();
        let broken: Vec<Value> = self.broken.iter().map(|it| json!(it)).collect();
        all.insert("broken".to_owned(), Value::Array(broken));
        Value::Object(all)
    }
}

/// Of sorted numbers; 0 of none.
pub(crate) fn percentile(sorted: &[u64], percent: usize) -> u64 {
    match sorted.len() {
        0 => 0,
        len => sorted[(len * percent).div_ceil(100).clamp(1, len) - 1],
    }
}

/// In milliseconds, to a hundredth.
#[expect(clippy::cast_precision_loss, reason = "for people")]
pub(crate) fn millis(micros: u64) -> f64 {
    (micros as f64 / 10.0).round() / 100.0
}
