//! Several tables in one launch.

use crate::divide::LIMIT;
use crate::raw::{Launch, MOST_TABLES, Placed};

/// The parameters of the launches that carry out these tables: one, where there are at most [`MOST_TABLES`] of them
/// with anything to do. `lanes` threads share a tile.
///
/// A launch takes tiles of its tables in turns. Where tables are equally long, they begin in the order given: readers
/// of the same sources do well to begin with different ones.
#[must_use]
pub fn launches(tables: &[Placed], lanes: u32) -> Vec<Launch> {
    let mut launches: Vec<Vec<Placed>> = Vec::new();
    let mut steps = 0;
    for table in tables.iter().filter(|table| table.tiles > 0) {
        match launches.last_mut() {
            // Each is below the limit, so their sum is a number.
            Some(last) if last.len() < MOST_TABLES && table.tiles < LIMIT - steps => {
                last.push(*table);
                steps += table.tiles;
            }
            _ => {
                launches.push(vec![*table]);
                steps = table.tiles;
            }
        }
    }
    launches.into_iter().map(|tables| interleaved(tables, lanes)).collect()
}

fn interleaved(mut tables: Vec<Placed>, lanes: u32) -> Launch {
    tables.sort_by_key(|table| table.tiles);
    let mut launch =
        Launch { tables: 0, steps: 0, lanes, reserved: 0, table: [Placed::default(); MOST_TABLES] };
    let mut before = 0;
    for (left, (place, table)) in (1..=tables.len()).rev().zip(launch.table.iter_mut().zip(&tables))
    {
        *place = Placed { start: launch.steps, ..*table };
        // So many rounds in which all that are left take turns. The sum is that of the tiles, in the end.
        let turns = u32::try_from(left).unwrap_or(u32::MAX);
        launch.steps += turns.saturating_mul(table.tiles - before);
        launch.tables += 1;
        before = table.tiles;
    }
    launch
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(tiles: &[u32]) -> Vec<Placed> {
        (1..)
            .zip(tiles)
            .map(|(entries, &tiles)| Placed { entries, tiles, ..Placed::default() })
            .collect()
    }

    /// The table and tile of every step, as the kernel finds them.
    fn order(launch: &Launch) -> Vec<(u64, u32)> {
        let mut exhausted = 0;
        (0..launch.steps)
            .map(|step| {
                let tables = &launch.table[..launch.tables as usize];
                while exhausted + 1 < tables.len() && tables[exhausted + 1].start <= step {
                    exhausted += 1;
                }
                let left = u32::try_from(tables.len() - exhausted).unwrap();
                let ahead = step - tables[exhausted].start;
                let before = if exhausted == 0 { 0 } else { tables[exhausted - 1].tiles };
                let table = &tables[exhausted + (ahead % left) as usize];
                (table.entries, before + ahead / left)
            })
            .collect()
    }

    #[test]
    fn tables_take_turns_until_they_are_exhausted() {
        let [launch] = &launches(&placed(&[3, 0, 1, 3]), 32)[..] else { panic!() };
        assert_eq!(order(launch), [(3, 0), (1, 0), (4, 0), (1, 1), (4, 1), (1, 2), (4, 2)]);
    }

    #[test]
    fn every_tile_has_one_step() {
        for tiles in [&[5][..], &[1, 2, 3, 4], &[7, 7, 7], &[100, 1, 1, 50], &[2; 64]] {
            let [launch] = &launches(&placed(tiles), 32)[..] else { panic!() };
            let mut order = order(launch);
            order.sort_unstable();
            let all =
                (1..).zip(tiles).flat_map(|(table, &n)| (0..n).map(move |tile| (table, tile)));
            assert_eq!(order, all.collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_one_launch_cannot_hold_goes_into_several() {
        assert_eq!(launches(&placed(&[0, 0]), 32).len(), 0);
        let many = launches(&placed(&[1; 130]), 32);
        assert_eq!(many.iter().map(|launch| launch.tables).collect::<Vec<_>>(), [64, 64, 2]);
        let large = launches(&placed(&[LIMIT - 1, 1, LIMIT - 2]), 32);
        assert_eq!(
            large.iter().map(|launch| launch.steps).collect::<Vec<_>>(),
            [LIMIT - 1, LIMIT - 1]
        );
    }
}
