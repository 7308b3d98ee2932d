//! A small model whose every element is known from its version: whoever reads it can tell whose bytes these are.

use std::ops::Range;

use refit::planner::{Band, Dtype, LayoutBuilder, Param, RankLayout};
use refit::pool::Memory;
use serde::{Deserialize, Serialize};

/// Two matrices of two bytes an element. Models of other salts share no bytes.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Model {
    pub(crate) salt: u64,
    pub(crate) rows: u64,
    pub(crate) cols: u64,
}

/// Which part of both matrices a rank holds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cut {
    /// Rank of ranks, by rows.
    Rows(u32, u32),
    /// Rank of ranks, by columns.
    Cols(u32, u32),
}

const TENSORS: [&str; 2] = ["first", "second"];

impl Model {
    /// What the trials refit: bytes enough that a fault may come while they move.
    pub(crate) fn small() -> Self {
        Self { salt: 1, rows: 256, cols: 512 }
    }

    /// Bytes enough that a writer comes in between.
    pub(crate) fn large() -> Self {
        Self { salt: 1, rows: 1024, cols: 1024 }
    }

    pub(crate) fn salted(self, salt: u64) -> Self {
        Self { salt, ..self }
    }

    /// The share of a rank.
    pub(crate) fn share(self, cut: Cut) -> Share {
        let part = |rank: u32, ranks: u32, whole: u64| {
            let (rank, ranks) = (u64::from(rank), u64::from(ranks));
            whole * rank / ranks..whole * (rank + 1) / ranks
        };
        match cut {
            Cut::Rows(rank, ranks) => {
                Share { model: self, rank, rows: part(rank, ranks, self.rows), cols: 0..self.cols }
            }
            Cut::Cols(rank, ranks) => {
                Share { model: self, rank, rows: 0..self.rows, cols: part(rank, ranks, self.cols) }
            }
        }
    }
}

/// What one rank holds.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    model: Model,
    rank: u32,
    rows: Range<u64>,
    cols: Range<u64>,
}

impl Share {
    pub(crate) fn layout(&self) -> RankLayout {
        let mut layout = LayoutBuilder::new(self.rank);
        let (height, width) = (self.rows.end - self.rows.start, self.cols.end - self.cols.start);
        for name in TENSORS {
            let tensor = layout.tensor(name, self.model.rows, self.model.cols).unwrap();
            let band = Band::new(tensor, self.rows.clone(), self.cols.clone());
            layout.param(Param::new(name, Dtype::Bf16, height, width).band(band)).unwrap();
        }
        layout.build()
    }

    /// Writes a parameter as it is in this version.
    pub(crate) fn fill(&self, param: &str, version: u64, memory: &mut Memory) {
        let bytes = memory.host_bytes_mut().unwrap();
        for (element, value) in bytes.chunks_exact_mut(2).zip(self.values(param, version)) {
            element.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Compares every byte. The error names the first element that is not of this version.
    pub(crate) fn verify<'a>(
        &self,
        params: impl Iterator<Item = (&'a str, &'a Memory)>,
        version: u64,
    ) -> Result<(), String> {
        let mut seen = 0;
        for (param, memory) in params {
            let bytes = memory.host_bytes().unwrap();
            let found = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
            let wrong = found.zip(self.values(param, version)).position(|(found, it)| found != it);
            if let Some(at) = wrong {
                return Err(format!("element {at} of `{param}` is not of version {version}"));
            }
            seen += bytes.len() as u64;
        }
        let all = 4 * (self.rows.end - self.rows.start) * (self.cols.end - self.cols.start);
        if seen == all { Ok(()) } else { Err(format!("{seen} of {all} bytes were there")) }
    }

    fn values(&self, param: &str, version: u64) -> impl Iterator<Item = u16> {
        let tensor = TENSORS.iter().position(|name| *name == param).unwrap() as u64;
        let key = mix(version ^ mix(self.model.salt ^ tensor << 32));
        let cols = self.cols.clone();
        self.rows.clone().flat_map(move |row| {
            let row = mix(key ^ row);
            cols.clone().map(move |col| {
                let [.., low, high] = (row ^ col).wrapping_mul(ODD).to_le_bytes();
                u16::from_le_bytes([low, high])
            })
        })
    }
}

const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

/// Spreads every bit over all (the finaliser of SplitMix64).
pub(crate) fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(ODD);
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}
