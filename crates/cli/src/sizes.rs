//! Parallel sizes as a person writes them: `tp=4,pp=1`.

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
