//! P12: a source that lacks anything of what a target needs is refused before a byte moves.

use refit::planner::{LayoutBuilder, RankLayout};
use refit::{Source, TargetOptions};
use refit_service::puller::Cause;
use refit_service::rank::{Direct, Unattended};
use refit_service::reader::{ReaderOptions, Wanted};
use refit_service::source::{GroupRank, LiveSource, SourceOptions};
use refit_tests::oracle::{self, Buffers};
use refit_tests::{models, ranks};

use super::fleet::{Fleet, Local, millis, soon, unique};

/// What is done to one parameter of a layout.
#[derive(Clone, Copy, Debug)]
enum Change {
    Remove,
    /// The tensor that it is a part of gets another name.
    Rename,
}

/// A layout with one parameter changed.
fn changed(layout: &RankLayout, index: usize, change: Change) -> RankLayout {
    let param = &layout.params()[index];
    let parts = layout.bands().filter(|(held, _, _)| held.name() == param.name());
    let renamed: Vec<&str> = parts.map(|(_, tensor, _)| tensor.name.as_ref()).collect();
    let mut made = LayoutBuilder::new(layout.rank());
    for tensor in layout.tensors() {
        let other = matches!(change, Change::Rename) && renamed.contains(&tensor.name.as_ref());
        let name = if other { format!("{}.old", tensor.name) } else { tensor.name.to_string() };
        made.tensor(&name, tensor.rows, tensor.cols).unwrap();
    }
    for (at, param) in layout.params().iter().enumerate() {
        if at != index || matches!(change, Change::Rename) {
            made.param(param.clone()).unwrap();
        }
    }
    made.build()
}

fn held(target: &Direct<Local, Unattended>) -> Buffers {
    let params = target.params().unwrap();
    params.map(|(name, memory)| (name.to_owned(), memory.host_bytes().unwrap().to_vec())).collect()
}

/// Offers these layouts as a group, and reads them: what a target of everything holds afterwards, or why it refused.
fn read(fleet: &Fleet, layouts: &[RankLayout]) -> Result<Buffers, Cause> {
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
    let wanted = models::target(&models::tiny(), 1).remove(0);
    let agent = fleet.agent(&format!("engine-{group}"));
    let (target, _, canaries) = ranks::target(&agent, &wanted, TargetOptions::default());
    let mut direct = Direct::new(target, Unattended);
    let before = held(&direct);
    let mut reader = fleet.reader("engine", ReaderOptions::default());
    let answer = match reader.refresh(&mut direct, &Wanted::default(), millis(40)) {
        Ok(_) => Ok(held(&direct)),
        Err(refused) => {
            assert_eq!(held(&direct), before, "bytes have moved: {refused}");
            Err(refused.attempts[0].failure.cause)
        }
    };
    canaries.check();
    answer
}

#[test]
fn p12_whatever_is_missing_is_refused_before_a_byte_moves() {
    let fleet = Fleet::new();
    let whole = models::source(&models::tiny(), 1, 1, 1);
    for index in 0..whole[0].params().len() {
        for change in [Change::Remove, Change::Rename] {
            let layout = changed(&whole[0], index, change);
            let name = whole[0].params()[index].name();
            assert_eq!(read(&fleet, &[layout]), Err(Cause::Refused), "{change:?} {name}");
        }
    }
}

/// A shard that one rank of two lacks is missing, unless the other has it as well.
#[test]
fn p12_a_missing_shard_is_refused_unless_there_is_a_copy() {
    let fleet = Fleet::new();
    let whole = models::source(&models::tiny(), 2, 1, 1);
    let right = oracle::buffers(&models::target(&models::tiny(), 1)[0]);
    let (mut refused, mut read_elsewhere) = (0, 0);
    for rank in 0..2 {
        for index in 0..whole[rank].params().len() {
            let mut layouts = whole.clone();
            layouts[rank] = changed(&whole[rank], index, Change::Remove);
            match read(&fleet, &layouts) {
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
