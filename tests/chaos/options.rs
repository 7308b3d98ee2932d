//! The command line.

use crate::processes::Lane;

pub(crate) const HELP: &str = "\
chaos [--trials N] [--schedules N] [--flat N] [--neighbours N] [--lane cma|tcp|both] [--seed S] [--json FILE]

Real processes over real NIXL that are killed, stopped and restarted; every byte that is installed is verified.
A part whose number is 0 is left out.

  --trials N      faults, shared out among the lanes (default: 1000)
  --schedules N   reads on each lane from a writer that writes meanwhile (default: 1000)
  --flat N        refits on each lane during which nothing may grow (default: 10000)
  --neighbours N  times on each lane that a peer of one model is stopped beside another's (default: 20)
  --lane LANE     which of UCX's ways: cma, tcp, or both (default: both)
  --seed S        of everything that is left to chance (default: 1)
  --json FILE     where to write the numbers
";

#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) trials: u64,
    pub(crate) schedules: u64,
    pub(crate) flat: u64,
    pub(crate) neighbours: u64,
    pub(crate) lanes: Vec<Lane>,
    pub(crate) seed: u64,
    pub(crate) json: Option<String>,
}

impl Options {
    /// None when help is asked for; the error is a hint for the user.
    pub(crate) fn parse(args: Vec<String>) -> Result<Option<Self>, String> {
        let mut all = Self {
            trials: 1_000,
            schedules: 1_000,
            flat: 10_000,
            neighbours: 20,
            lanes: vec![Lane::Cma, Lane::Tcp],
            seed: 1,
            json: None,
        };
        let mut args = args.into_iter();
        while let Some(name) = args.next() {
            if name == "--help" || name == "-h" {
                return Ok(None);
            }
            let value =
                args.next().ok_or_else(|| format!("`{name}` needs a value, or is not known"))?;
            let number =
                || value.parse::<u64>().map_err(|_| format!("`{name} {value}`: not a number"));
            match name.as_str() {
                "--trials" => all.trials = number()?,
                "--schedules" => all.schedules = number()?,
                "--flat" => all.flat = number()?,
                "--neighbours" => all.neighbours = number()?,
                "--seed" => all.seed = number()?,
                "--json" => all.json = Some(value),
                "--lane" => {
                    all.lanes = match value.as_str() {
                        "cma" => vec![Lane::Cma],
                        "tcp" => vec![Lane::Tcp],
                        "both" => vec![Lane::Cma, Lane::Tcp],
                        _ => return Err(format!("`--lane {value}`: cma, tcp or both")),
                    }
                }
                _ => return Err(format!("`{name}` is not known; see --help")),
            }
        }
        Ok(Some(all))
    }
}
