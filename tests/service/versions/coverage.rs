//! P12: a source that lacks anything of what a target needs is refused before a byte moves.

use std::collections::BTreeMap;
use std::ops::Range;

use refit::planner::{Band, Dtype, LayoutBuilder, Param, RankLayout};
use refit::translate::{Family, ModelConfig, Moe};
use refit::{Source, TargetOptions};
use refit_service::puller::Cause;
use refit_service::rank::{Direct, Unattended};
use refit_service::reader::{ReaderOptions, Wanted};
use refit_service::source::{GroupRank, LiveSource, SourceOptions};
use refit_tests::oracle::{self, Buffers};
use refit_tests::{models, ranks};

use super::fleet::{Fleet, Local, millis, soon, unique};

/// What is done to one parameter of a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Remove,
    /// The tensor that it is a part of gets another name.
    Rename,
    /// Half of the first row of its first band is not there; all of it, where that is one element.
    HalfRow,
}

/// A layout with one parameter changed.
fn changed(layout: &RankLayout, index: usize, change: Change) -> RankLayout {
    let param = &layout.params()[index];
    let parts = || layout.bands().filter(|(held, _, _)| held.name() == param.name());
    let renamed: Vec<&str> = parts().map(|(_, tensor, _)| tensor.name.as_ref()).collect();
    let mut made = LayoutBuilder::new(layout.rank());
    let mut ids = BTreeMap::new();
    for tensor in layout.tensors() {
        let other = change == Change::Rename && renamed.contains(&tensor.name.as_ref());
        let name = if other { format!("{}.old", tensor.name) } else { tensor.name.to_string() };
        ids.insert(tensor.name.clone(), made.tensor(&name, tensor.rows, tensor.cols).unwrap());
    }
    for (at, held) in layout.params().iter().enumerate() {
        match change {
            Change::Remove if at == index => {}
            Change::HalfRow if at == index => {
                let whole = Param::new(held.name().clone(), held.dtype(), held.rows(), held.cols());
                let whole = whole.map(held.element_map());
                let whole =
                    held.fill_boxes().fold(whole, |param, (rows, cols)| param.fill(rows, cols));
                let bands = parts().enumerate().flat_map(|(number, (_, tensor, band))| {
                    let part = |rows: Range<u64>, cols: Range<u64>| {
                        let (row, col) = band.origin();
                        let down = (rows.start - band.logical_rows().start) * band.step();
                        let right = cols.start - band.logical_cols().start;
                        let part = Band::new(ids[&tensor.name], rows.clone(), cols.clone());
                        let part = part.at(row + down, col + right).row_step(band.step());
                        (!rows.is_empty() && !cols.is_empty()).then_some(part)
                    };
                    let (rows, cols) = (band.logical_rows(), band.logical_cols());
                    let (second, middle) = (rows.start + 1, cols.start.midpoint(cols.end + 1));
                    if number > 0 {
                        [part(rows, cols), None]
                    } else {
                        [part(rows.start..second, middle..cols.end), part(second..rows.end, cols)]
                    }
                });
                made.param(whole.bands(bands.flatten())).unwrap();
            }
            _ => {
                made.param(held.clone()).unwrap();
            }
        }
    }
    made.build()
}

fn held(target: &Direct<Local, Unattended>) -> Buffers {
    let params = target.params().unwrap();
    params.map(|(name, memory)| (name.to_owned(), memory.host_bytes().unwrap().to_vec())).collect()
}

/// Offers these layouts as a group, and reads them: what this target holds afterwards, or why it refused.
fn read(fleet: &Fleet, layouts: &[RankLayout], wanted: &RankLayout) -> Result<Buffers, Cause> {
    let group = format!("g{}", unique());
    let mut sources: Vec<_> = layouts
        .iter()
        .map(|layout| {
            let agent = fleet.agent(&format!("{group}-{}", layout.rank()));
            let source: Source<Local> = ranks::source(&agent, layout);
            let size = u32::try_from(layouts.len()).unwrap();
            let place = GroupRank { group: group.clone(), rank: layout.rank(), ranks: size };
            LiveSource::join(fleet.seat(), place, source, SourceOptions::default(), soon()).unwrap()
        })
        .collect();
    for source in &mut sources {
        source.begin_update(soon()).unwrap().commit(1).unwrap();
    }
    let agent = fleet.agent(&format!("engine-{group}"));
    let (target, _, canaries) = ranks::target(&agent, wanted, TargetOptions::default());
    let mut direct = Direct::new(target, Unattended);
    let before = held(&direct);
    let mut reader = fleet.reader("engine", ReaderOptions::default());
    let mut patience = 40;
    let answer = loop {
        let read = reader.refresh(&mut direct, &Wanted::default(), millis(patience));
        let Err(refused) = read else { break Ok(held(&direct)) };
        let mut causes = refused.attempts.iter().map(|attempt| attempt.failure.cause);
        let cause = causes.rfind(|&cause| cause != Cause::Late);
        match cause {
            // Until it has been tried, and the target is back from that, however busy the machine is.
            None if patience < 40_000 => patience *= 2,
            cause => {
                assert_eq!(held(&direct), before, "bytes have moved: {refused}");
                break Err(cause.unwrap_or(Cause::Late));
            }
        }
    };
    canaries.check();
    answer
}

/// A small model of four experts in each of two layers.
fn experts() -> ModelConfig {
    let mut config = models::tiny();
    config.family = Family::Qwen3Moe;
    config.moe = Some(Moe::new(4, 24));
    config
}

#[test]
fn p12_whatever_is_missing_is_refused_before_a_byte_moves() {
    let fleet = Fleet::new();
    for (config, of_experts) in [(models::tiny(), 0), (experts(), 2 * 4 * 2)] {
        let whole = models::source(&config, 1, 1, 1).remove(0);
        let wanted = models::target(&config, 1).remove(0);
        let right = oracle::wanted(&wanted, std::slice::from_ref(&whole));
        assert_eq!(read(&fleet, std::slice::from_ref(&whole), &wanted).unwrap(), right);
        let expert = |name: &str| name.contains(".experts.");
        let found = whole.params().iter().filter(|param| expert(param.name())).count();
        assert_eq!(found, of_experts, "an expert has no parameters of its own");
        for index in 0..whole.params().len() {
            for change in [Change::Remove, Change::Rename, Change::HalfRow] {
                let layout = changed(&whole, index, change);
                let name = whole.params()[index].name();
                assert_eq!(
                    read(&fleet, &[layout], &wanted),
                    Err(Cause::Refused),
                    "{change:?} {name}"
                );
            }
        }
    }
}

/// What nobody has asked for is left alone, and what nobody has is not made up.
#[test]
fn p12_unknown_parameters_are_left_alone_or_refused() {
    let fleet = Fleet::new();
    let whole = models::source(&models::tiny(), 1, 1, 1).remove(0);
    let wanted = models::target(&models::tiny(), 1).remove(0);
    let more = |layout: &RankLayout| {
        let mut made = LayoutBuilder::new(layout.rank());
        for tensor in layout.tensors() {
            made.tensor(&tensor.name, tensor.rows, tensor.cols).unwrap();
        }
        for param in layout.params() {
            made.param(param.clone()).unwrap();
        }
        let tensor = made.tensor("unknown", 3, 5).unwrap();
        let param = Param::new("unknown", Dtype::Bf16, 3, 5).band(Band::new(tensor, 0..3, 0..5));
        made.param(param).unwrap();
        made.build()
    };
    let right = oracle::wanted(&wanted, std::slice::from_ref(&whole));
    assert_eq!(read(&fleet, &[more(&whole)], &wanted).unwrap(), right);
    assert_eq!(read(&fleet, &[whole], &more(&wanted)), Err(Cause::Refused));
}

/// A shard that one rank of two lacks is missing, unless the other has it as well.
#[test]
fn p12_a_missing_shard_is_refused_unless_there_is_a_copy() {
    let fleet = Fleet::new();
    let whole = models::source(&models::tiny(), 2, 1, 1);
    let wanted = models::target(&models::tiny(), 1).remove(0);
    let right = oracle::buffers(&wanted);
    let (mut refused, mut read_elsewhere) = (0, 0);
    for rank in 0..2 {
        for index in 0..whole[rank].params().len() {
            let mut layouts = whole.clone();
            layouts[rank] = changed(&whole[rank], index, Change::Remove);
            match read(&fleet, &layouts, &wanted) {
                Err(cause) => {
                    assert_eq!(cause, Cause::Refused);
                    refused += 1;
                }
                Ok(held) => {
                    assert_eq!(held, right);
                    read_elsewhere += 1;
                }
            }
        }
    }
    assert!(
        refused > 0 && read_elsewhere > 0,
        "{refused} refused, {read_elsewhere} read elsewhere"
    );
}
