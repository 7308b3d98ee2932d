//! Sizes as a person writes and reads them: `tp=4,pp=1` for a trainer, `tp=2,ep` for an engine, `1.5 GB`.

use std::fmt;
use std::str::FromStr;

use refit::translate::TranslateError;
use refit::translate::megatron::{Pipeline, SourceRank, TrainerSizes};
use refit::translate::roles::Placement;
use refit::translate::vllm::{EngineModel, EngineSizes, TargetRank};

/// Sizes of the trainer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SourceSizes {
    pub(crate) tp: u32,
    pub(crate) pp: u32,
    /// Copies; by default as few as the experts' groups need.
    dp: u32,
    ep: u32,
    etp: u32,
    vpp: u32,
    /// Layers that predict tokens further ahead.
    mtp: u32,
}

impl SourceSizes {
    /// How `--help` shows them.
    pub(crate) const SHAPE: &str = "tp=N,pp=N,dp=N,ep=N,etp=N,vpp=N,mtp=N";

    pub(crate) fn new(tp: u32) -> Self {
        Self { tp, pp: 1, dp: 1, ep: 1, etp: 1, vpp: 1, mtp: 0 }
    }

    /// Whether this many layers can be split over the stages.
    pub(crate) fn takes(&self, layers: u32) -> bool {
        Pipeline::new(self.pp).with_chunks(self.vpp).stages(layers).is_ok()
    }

    /// Every rank of a trainer with this many layers.
    pub(crate) fn ranks(&self, layers: u32) -> Result<Vec<SourceRank>, TranslateError> {
        let Self { tp, pp, dp, ep, etp, vpp, mtp } = *self;
        let sizes = TrainerSizes::new(tp).with_dp(dp).with_ep(ep).with_etp(etp).with_mtp(mtp);
        sizes.ranks(&Pipeline::new(pp).with_chunks(vpp).stages(layers)?)
    }

    /// How many ranks there are.
    pub(crate) fn world(&self) -> u32 {
        self.tp.saturating_mul(self.dp).saturating_mul(self.pp)
    }

    /// These sizes as `FromStr` reads them.
    pub(crate) fn argument(&self) -> String {
        let Self { tp, pp, dp, ep, etp, vpp, mtp } = self;
        let mtp = if *mtp == 0 { String::new() } else { format!(",mtp={mtp}") };
        format!("tp={tp},pp={pp},dp={dp},ep={ep},etp={etp},vpp={vpp}{mtp}")
    }
}

impl FromStr for SourceSizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut sizes = Self::new(1);
        let mut dp = None;
        for part in text.split(',') {
            let (name, size) = part
                .split_once('=')
                .ok_or_else(|| format!("`{part}` is not name=size, as in tp=4,pp=2"))?;
            let size = number(size)?;
            match name.trim() {
                "tp" => sizes.tp = size,
                "pp" => sizes.pp = size,
                "dp" => dp = Some(size),
                "ep" => sizes.ep = size,
                "etp" => sizes.etp = size,
                "vpp" => sizes.vpp = size,
                "mtp" => sizes.mtp = size,
                other => return Err(unknown(other, "tp, pp, dp, ep, etp, vpp, mtp")),
            }
        }
        let experts = sizes.ep * sizes.etp;
        sizes.dp = dp.unwrap_or_else(|| experts / divisor(experts, sizes.tp));
        Ok(sizes)
    }
}

impl fmt::Display for SourceSizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tp, pp, dp, ep, etp, vpp, mtp } = *self;
        write!(f, "TP{tp}")?;
        for (name, size) in [("PP", pp), ("VPP", vpp), ("DP", dp), ("EP", ep), ("ETP", etp)] {
            if size > 1 {
                write!(f, " {name}{size}")?;
            }
        }
        if mtp > 0 { write!(f, " MTP{mtp}") } else { Ok(()) }
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

/// Sizes of the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TargetSizes(EngineSizes);

impl TargetSizes {
    /// How `--help` shows them.
    pub(crate) const SHAPE: &str = "tp=N,dp=N,pcp=N,ep[=linear|round_robin],sp,draft";

    pub(crate) fn new(tp: u32) -> Self {
        Self(EngineSizes::new(tp))
    }

    pub(crate) fn tp(&self) -> u32 {
        self.0.tp
    }

    /// Every rank.
    pub(crate) fn ranks(&self) -> Result<Vec<TargetRank>, TranslateError> {
        self.0.ranks()
    }

    /// How many ranks there are.
    pub(crate) fn world(&self) -> u32 {
        self.0.tp.saturating_mul(self.0.dp).saturating_mul(self.0.pcp)
    }

    /// These sizes as `FromStr` reads them.
    pub(crate) fn argument(&self) -> String {
        let EngineSizes { tp, dp, pcp, .. } = self.0;
        let mut text = format!("tp={tp},dp={dp},pcp={pcp}");
        match self.0.expert_parallel {
            None => {}
            Some(Placement::Linear) => text += ",ep",
            Some(Placement::RoundRobin) => text += ",ep=round_robin",
        }
        if self.0.sequence_parallel_moe {
            text += ",sp";
        }
        if self.0.model == EngineModel::Draft {
            text += ",draft";
        }
        text
    }
}

impl FromStr for TargetSizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut sizes = EngineSizes::new(1);
        for part in text.split(',') {
            let (name, size) = part.split_once('=').map_or((part, None), |(n, s)| (n, Some(s)));
            match (name.trim(), size.map(str::trim)) {
                ("ep", None | Some("linear")) => sizes.expert_parallel = Some(Placement::Linear),
                ("ep", Some("round_robin")) => sizes.expert_parallel = Some(Placement::RoundRobin),
                ("ep", Some(_)) => {
                    return Err(
                        "`ep` takes no size: experts are spread over all dp * pcp * tp ranks; \
                                write ep, ep=linear or ep=round_robin"
                            .to_owned(),
                    );
                }
                ("sp", None) => sizes.sequence_parallel_moe = true,
                ("draft", None) => sizes.model = EngineModel::Draft,
                ("tp", Some(size)) => sizes.tp = number(size)?,
                ("dp", Some(size)) => sizes.dp = number(size)?,
                ("pcp", Some(size)) => sizes.pcp = number(size)?,
                ("pp", Some(size)) if number(size)? == 1 => {}
                ("pp", Some(_)) => {
                    return Err("an engine with pipeline stages is not supported".to_owned());
                }
                ("tp" | "dp" | "pcp" | "pp", None) => {
                    return Err(format!("`{part}` is not name=size, as in tp=4,dp=2"));
                }
                (other, _) => return Err(unknown(other, "tp, dp, pcp, ep, sp, draft")),
            }
        }
        Ok(Self(sizes))
    }
}

impl fmt::Display for TargetSizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EngineSizes { tp, dp, pcp, .. } = self.0;
        write!(f, "TP{tp}")?;
        for (name, size) in [("PCP", pcp), ("DP", dp)] {
            if size > 1 {
                write!(f, " {name}{size}")?;
            }
        }
        match self.0.expert_parallel {
            None => {}
            Some(Placement::Linear) => f.write_str(" EP")?,
            Some(Placement::RoundRobin) => f.write_str(" EP round robin")?,
        }
        if self.0.sequence_parallel_moe {
            f.write_str(" SP")?;
        }
        if self.0.model == EngineModel::Draft { f.write_str(" draft model") } else { Ok(()) }
    }
}

fn number(text: &str) -> Result<u32, String> {
    let size = text.trim().parse().ok().filter(|size| (1..=4096).contains(size));
    size.ok_or_else(|| format!("`{text}` is not a size between 1 and 4096"))
}

fn unknown(name: &str, known: &str) -> String {
    format!("`{name}` is not a size this command knows: {known}")
}

/// The greatest common divisor.
fn divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_written() {
        for (text, shown, world) in [
            ("tp=4,pp=2", "TP4 PP2", 8),
            ("tp=2, pp=1,ep=2,etp=1", "TP2 EP2", 2),
            // As many copies as the experts' groups need.
            ("ep=4,tp=2", "TP2 DP2 EP4", 4),
            ("tp=1,ep=2,etp=3,vpp=2,pp=2", "TP1 PP2 VPP2 DP6 EP2 ETP3", 12),
            ("tp=2,dp=3", "TP2 DP3", 6),
            ("tp=2,mtp=1", "TP2 MTP1", 2),
        ] {
            let sizes: SourceSizes = text.parse().unwrap();
            assert_eq!((sizes.to_string().as_str(), sizes.world()), (shown, world), "{text}");
            assert_eq!(sizes.argument().parse(), Ok(sizes));
            assert_eq!(sizes.ranks(12).unwrap().len(), world as usize, "{text}");
        }
        for (text, shown, world) in [
            ("tp=2", "TP2", 2),
            ("tp=2,dp=2,ep", "TP2 DP2 EP", 4),
            ("tp=2,pp=1,pcp=2,dp=3,ep=linear,sp", "TP2 PCP2 DP3 EP SP", 12),
            ("ep=round_robin", "TP1 EP round robin", 1),
            ("tp=2,ep,draft", "TP2 EP draft model", 2),
        ] {
            let sizes: TargetSizes = text.parse().unwrap();
            assert_eq!((sizes.to_string().as_str(), sizes.world()), (shown, world), "{text}");
            assert_eq!(sizes.argument().parse(), Ok(sizes));
            assert_eq!(sizes.ranks().unwrap().len(), world as usize, "{text}");
        }
        for text in ["", "tp", "tp=", "tp=0", "tp=4097", "tp=-1", "cp=2", "ep"] {
            assert!(text.parse::<SourceSizes>().is_err(), "{text}");
        }
        for text in ["", "tp", "pp", "tp=0", "pp=2", "ep=2", "sp=1", "etp=2", "x"] {
            assert!(text.parse::<TargetSizes>().is_err(), "{text}");
        }
    }
}
