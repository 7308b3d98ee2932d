use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;

use refit::planner::{Band, Dtype, ElementMap, LayoutBuilder, Param, RankLayout};
use refit::transport::local::Network;
use refit::{HEADER_BYTES, Publication, TargetOptions};
use refit_tests::ranks;

use super::{each, sealed};

/// Numbers are spelt alike whatever their width, so all are 64 bits here.
type Band_ = (u64, Range<u64>, Range<u64>, u64, u64, u64);
type Param_ = (String, Dtype, u64, u64, ElementMap, Vec<Band_>, Vec<(Range<u64>, Range<u64>)>);
type Layout_ = (u64, Vec<(String, u64, u64)>, Vec<Param_>);
type Place_ = (u64, Option<u64>);
type Body = (String, Vec<u8>, Layout_, (u128, Place_), Vec<Place_>, Vec<(u64, u64, Option<u64>)>);

/// Every number of a publication but its incarnation, which nobody computes with.
fn numbers(body: &mut Body) -> Vec<&mut u64> {
    fn of_range(range: &mut Range<u64>) -> [&mut u64; 2] {
        [&mut range.start, &mut range.end]
    }
    let (_, _, (rank, tensors, params), (_, header), places, regions) = body;
    let mut all = vec![rank];
    tensors.iter_mut().for_each(|(_, rows, cols)| all.extend([rows, cols]));
    for (_, _, rows, cols, _, bands, fills) in params {
        all.extend([rows, cols]);
        for (tensor, rows, cols, at_row, at_col, step) in bands {
            all.push(tensor);
            all.extend(of_range(rows).into_iter().chain(of_range(cols)));
            all.extend([at_row, at_col, step]);
        }
        fills.iter_mut().for_each(|(rows, cols)| {
            all.extend(of_range(rows).into_iter().chain(of_range(cols)));
        });
    }
    for (address, cuda) in places.iter_mut().chain([header]) {
        all.push(address);
        all.extend(cuda);
    }
    for (address, len, cuda) in regions {
        all.extend([address, len]);
        all.extend(cuda);
    }
    all
}

/// Bands beside, below and apart from each other, and zeros.
fn layout() -> RankLayout {
    let mut layout = LayoutBuilder::new(0);
    let (a, b) = (layout.tensor("a", 16, 8).unwrap(), layout.tensor("b", 4, 8).unwrap());
    let mixed = Param::new("mixed", Dtype::Bf16, 12, 8)
        .band(Band::new(a, 0..4, 0..8).row_step(2))
        .band(Band::new(b, 0..2, 0..8).at(8, 0))
        .fill(10..12, 0..8);
    layout.param(mixed).unwrap();
    layout.param(Param::new("plain", Dtype::F32, 16, 8).band(Band::new(a, 0..16, 0..8))).unwrap();
    layout.param(Param::new("rest", Dtype::Bf16, 4, 8).band(Band::new(b, 0..4, 0..8))).unwrap();
    layout.build()
}

/// What the documentation of `Publication::decode` promises, in numbers that do not wrap.
fn check(publication: &Publication) {
    let wide = |number: u64| u128::from(number);
    let mut spans: BTreeMap<Option<u32>, Vec<(u128, u128)>> = BTreeMap::new();
    for region in publication.regions() {
        let (start, end) = (wide(region.address), wide(region.address) + wide(region.len));
        assert!(end <= wide(u64::MAX), "a region leaves the address space");
        let of_kind = spans.entry(region.cuda).or_default();
        assert!(of_kind.last().is_none_or(|last| last.1 <= start), "regions overlap");
        of_kind.push((start, end));
    }
    let registered = |cuda: Option<u32>, start: u128, len: u128| {
        let mut at = start;
        for &(from, to) in spans.get(&cuda).into_iter().flatten() {
            if from <= at && at < to {
                at = to;
            }
        }
        len == 0 || at >= start + len
    };
    let header = publication.header().place;
    assert!(registered(header.cuda, wide(header.address), HEADER_BYTES as u128));
    for param in publication.layout().params() {
        let bytes = wide(param.rows()) * wide(param.cols()) * wide(param.dtype().size());
        assert!(bytes < 1 << 63 && bytes == wide(param.bytes()));
        let place = publication.place(param.name()).unwrap();
        assert!(registered(place.cuda, wide(place.address), bytes), "`{}`", param.name());
        let apart = place.cuda != header.cuda
            || wide(place.address) + bytes <= wide(header.address)
            || wide(header.address) + HEADER_BYTES as u128 <= wide(place.address);
        assert!(apart || bytes == 0, "the header is `{}`'s", param.name());
        for (rows, cols) in param.fill_boxes() {
            assert!(rows.start < rows.end && rows.end <= param.rows());
            assert!(cols.start < cols.end && cols.end <= param.cols());
        }
    }
    for (param, tensor, band) in publication.layout().bands() {
        let (rows, cols) = (band.logical_rows(), band.logical_cols());
        assert!(rows.start < rows.end && rows.end <= tensor.rows);
        assert!(cols.start < cols.end && cols.end <= tensor.cols);
        let (row, col) = band.origin();
        let last = wide(row) + (wide(rows.end - rows.start) - 1) * wide(band.step());
        assert!(last < wide(param.rows()), "a band of `{}`", param.name());
        assert!(wide(col) + wide(cols.end - cols.start) <= wide(param.cols()));
    }
}

/// What decodes is also read: whatever it says, bytes come from registered memory and land in the target, or it is refused.
#[test]
fn p05_publications_at_the_corners() {
    let network = Network::new();
    let source = ranks::source(&ranks::agent(&network, "source"), &layout());
    let bytes = source.publication().unwrap().encode();
    let body: Body = postcard::from_bytes(&bytes[40..]).unwrap();
    let honest = sealed(&bytes, &postcard::to_allocvec(&body).unwrap());
    assert_eq!(honest, bytes, "the mirror spells otherwise");
    let engine = ranks::agent(&network, "engine");
    let (decoded, read) = (Cell::new(0), Cell::new(0));
    each(numbers(&mut body.clone()).len(), |replaced| {
        let mut body = body.clone();
        replaced.iter().for_each(|&(at, value)| *numbers(&mut body)[at] = value);
        let bytes = sealed(&bytes, &postcard::to_allocvec(&body).unwrap());
        let Ok(publication) = Publication::decode(&bytes) else { return };
        decoded.set(decoded.get() + 1);
        check(&publication);
        let mut wanted = LayoutBuilder::new(0);
        let (a, b) = (wanted.tensor("a", 16, 8).unwrap(), wanted.tensor("b", 4, 8).unwrap());
        wanted.param(Param::new("a", Dtype::F32, 16, 8).band(Band::new(a, 0..16, 0..8))).unwrap();
        wanted.param(Param::new("b", Dtype::Bf16, 4, 8).band(Band::new(b, 0..4, 0..8))).unwrap();
        let (target, _, canaries) =
            ranks::target(&engine, &wanted.build(), TargetOptions::default());
        let pulled = target.prepare(&[publication]).map_err(drop).and_then(|prepared| {
            prepared.pull().map_err(drop)?.wait(ranks::soon()).map_err(drop)?.land().map_err(drop)
        });
        read.set(read.get() + u32::from(pulled.is_ok()));
        canaries.check();
    });
    println!("{} decoded, {} were read", decoded.get(), read.get());
    assert!(decoded.get() > read.get() && read.get() > 0, "{decoded:?} decoded, {read:?} read");
}
