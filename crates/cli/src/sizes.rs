//! Sizes as a person writes and reads them: `tp=4,pp=1`, `1.5 GB`.

use std::fmt;
use std::str::FromStr;

/// Sizes of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) tp: u32,
    pub(crate) pp: u32,
}

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut sizes = Self { tp: 1, pp: 1 };
        for part in text.split(',') {
            let (name, size) = part
                .split_once('=')
                .ok_or_else(|| format!("`{part}` is not name=size, as in tp=4,pp=2"))?;
            let size: u32 = size
                .trim()
                .parse()
                .ok()
                .filter(|&size| (1..=4096).contains(&size))
                .ok_or_else(|| format!("`{size}` is not a size between 1 and 4096"))?;
            match name.trim() {
                "tp" => sizes.tp = size,
                "pp" => sizes.pp = size,
                other => return Err(format!("`{other}` is not a size this command knows: tp, pp")),
            }
        }
        Ok(sizes)
    }
}

impl fmt::Display for Sizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TP{}", self.tp)?;
        if self.pp > 1 {
            write!(f, " PP{}", self.pp)?;
        }
        Ok(())
    }
}

/// Bytes as a person reads them.
#[allow(clippy::cast_precision_loss, reason = "sizes for people")]
pub(crate) fn bytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
