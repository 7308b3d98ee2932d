use std::cell::Cell;

use refit::planner::{Band, Dtype, ElementMap, LayoutBuilder, Param, RankLayout};
use refit::transport::local::Network;
use refit::{DigestRequest, Failed, PackRequest, Publication, RefitError};
use refit_tests::{corners, models, ranks};

use super::{each, sealed};

type Pack = (u64, Vec<u64>, Vec<(String, (u64, u64), (u64, u64))>);
type Piece = (u64, u64, Vec<(u64, u64, u64)>, Option<(ElementMap, Dtype, Dtype)>);
type Digest = (u64, Vec<(u64, Vec<(String, Vec<Piece>)>)>);

const ROWS: u64 = 16;
const COLS: u64 = 8;

fn layout() -> RankLayout {
    let mut layout = LayoutBuilder::new(0);
    let tensor = layout.tensor("t", ROWS, COLS).unwrap();
    let band = Band::new(tensor, 0..ROWS, 0..COLS);
    layout.param(Param::new("t", Dtype::Bf16, ROWS, COLS).band(band)).unwrap();
    layout.build()
}

/// What is asked is packed within the budget, or refused.
#[test]
fn p05_requests_at_the_corners() {
    const BUDGET: u64 = 4096;
    let like = PackRequest::nothing(0).encode();
    // Two columns' halves, as a finer engine asks for, and some rows.
    let slice = |rows, cols| ("t".to_owned(), rows, cols);
    let asked: Pack = (
        0,
        vec![0, 3],
        vec![slice((0, ROWS), (0, 4)), slice((0, ROWS), (4, 8)), slice((2, 4), (0, COLS))],
    );
    fn numbers((target, ranks, slices): &mut Pack) -> Vec<&mut u64> {
        let slices = slices
            .iter_mut()
            .flat_map(|(_, rows, cols)| [&mut rows.0, &mut rows.1, &mut cols.0, &mut cols.1]);
        [target].into_iter().chain(ranks).chain(slices).collect()
    }
    let network = Network::new();
    let agent = ranks::agent(&network, "source");
    let (decoded, packed) = (Cell::new(0), Cell::new(0));
    each(numbers(&mut asked.clone()).len(), |replaced| {
        let mut asked = asked.clone();
        replaced.iter().for_each(|&(at, value)| *numbers(&mut asked)[at] = value);
        let bytes = sealed(&like, &postcard::to_allocvec(&asked).unwrap());
        let Ok(request) = PackRequest::decode(&bytes) else { return };
        decoded.set(decoded.get() + 1);
        assert_eq!(request.encode(), bytes);
        for slice in request.slices() {
            assert!(slice.rows.start < slice.rows.end && slice.cols.start < slice.cols.end);
        }
        let source = ranks::source(&agent, &layout());
        let answered = request.is_answered_by(&source.publication().unwrap());
        match source.pack(&ranks::pool(&agent), std::slice::from_ref(&request), BUDGET) {
            Ok(source) => {
                answered.unwrap();
                let publication = source.publication().unwrap();
                assert!(publication.layout().bytes() <= layout().bytes() + BUDGET);
                Publication::decode(&publication.encode()).unwrap();
                packed.set(packed.get() + 1);
            }
            Err(Failed { error, .. }) => {
                let named = matches!(error, RefitError::Pack(_) | RefitError::SlotBudget { .. });
                assert!(named, "{error}");
            }
        }
    });
    println!("{} decoded, {} were packed", decoded.get(), packed.get());
    assert!(decoded.get() > 100 && packed.get() > 0);
}

/// What is hashed lies in the parameter, or the request is refused.
#[test]
fn p05_requests_for_digests_at_the_corners() {
    let network = Network::new();
    let source = ranks::source(&ranks::agent(&network, "source"), &layout());
    let published = source.publication().unwrap();
    let sources = refit::planner::SourceLayout::new([layout()]).unwrap();
    let plan = refit::planner::plan(&sources, &layout(), &Default::default()).unwrap();
    let like = DigestRequest::new(&plan).encode();
    let held = published.layout().bytes();
    let cast = Some((ElementMap::Identity, Dtype::Bf16, Dtype::F32));
    let pieces = vec![
        (0, held, vec![], None),
        (16, 4, vec![(3, 32, 8), (2, 8, 4)], None),
        (0, 8, vec![(2, 16, 16)], cast),
    ];
    let asked: Digest = (1, vec![(0, vec![("t".to_owned(), pieces)])]);
    fn numbers((target, ranks): &mut Digest) -> Vec<&mut u64> {
        let mut all = vec![target];
        for (rank, params) in ranks {
            all.push(rank);
            for (offset, run, dims, _) in params.iter_mut().flat_map(|(_, pieces)| pieces) {
                all.extend([offset, run]);
                dims.iter_mut()
                    .for_each(|(count, source, target)| all.extend([count, source, target]));
            }
        }
        all
    }
    let (decoded, hashed) = (Cell::new(0), Cell::new(0));
    each(numbers(&mut asked.clone()).len(), |replaced| {
        let mut asked = asked.clone();
        replaced.iter().for_each(|&(at, value)| *numbers(&mut asked)[at] = value);
        let bytes = sealed(&like, &postcard::to_allocvec(&asked).unwrap());
        let Ok(request) = DigestRequest::decode(&bytes) else { return };
        decoded.set(decoded.get() + 1);
        assert_eq!(request.encode(), bytes);
        match source.digests(&request) {
            Ok(_) if asked.1[0].0 != 0 => {}
            Ok(answer) => {
                let pieces = &asked.1[0].1[0].1;
                assert_eq!(answer.values.len(), pieces.len());
                for (offset, run, dims, _) in pieces {
                    let strides: Vec<_> =
                        dims.iter().map(|&(count, stride, _)| (count, stride)).collect();
                    assert!(dims.iter().all(|(count, ..)| *count > 0) && *run > 0);
                    let end = u128::from(*offset) + corners::extent(*run, &strides);
                    assert!(end <= u128::from(held), "hashed up to byte {end} of {held}");
                }
                hashed.set(hashed.get() + 1);
            }
            Err(error) => {
                let named = matches!(
                    error,
                    RefitError::AskedOutside { .. } | RefitError::AskedTooMuch { .. }
                );
                assert!(named, "{error}");
            }
        }
    });
    println!("{} decoded, {} were hashed", decoded.get(), hashed.get());
    assert!(decoded.get() > hashed.get() && hashed.get() > 0);
    drop(models::tiny());
}
