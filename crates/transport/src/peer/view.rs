//! Where a peer's allocations are in this process.

use std::collections::BTreeMap;

use super::blob::{Allocation, Handle};

/// One allocation of a peer. `M` keeps it mapped.
#[derive(Clone, Debug)]
pub(super) struct Place<M> {
    /// One past its last address in the peer's process.
    end: u64,
    /// Its first address in this one.
    at: u64,
    handle: Handle,
    mapping: M,
}

/// The allocations of a peer, by their first address in its process.
#[derive(Debug)]
pub(super) struct View<M>(BTreeMap<u64, Place<M>>);

impl<M: Clone> View<M> {
    pub(super) fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// What a peer published last, with the places of this view where an allocation is the same, and those that `open`
    /// finds for the rest.
    pub(super) fn renew<E>(
        &self,
        allocations: &[Allocation],
        mut open: impl FnMut(&Allocation) -> Result<(u64, M), E>,
    ) -> Result<Self, E> {
        let mut places = BTreeMap::new();
        for allocation in allocations {
            // Blobs with allocations that leave the address space are not decoded.
            let end = allocation.base.saturating_add(allocation.len);
            let known = self
                .0
                .get(&allocation.base)
                .filter(|place| place.end == end && place.handle == allocation.handle);
            let place = match known {
                Some(place) => place.clone(),
                None => {
                    let (at, mapping) = open(allocation)?;
                    Place { end, at, handle: allocation.handle, mapping }
                }
            };
            places.insert(allocation.base, place);
        }
        Ok(Self(places))
    }

    /// The allocation that holds the byte at this address of the peer.
    pub(super) fn find(&self, address: u64) -> Option<Found<'_, M>> {
        let (&base, place) = self.0.range(..=address).next_back()?;
        (address < place.end).then(|| Found {
            address: place.at + (address - base),
            room: place.end - address,
            base,
            mapping: &place.mapping,
        })
    }
}

/// A byte of a peer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found<'a, M> {
    /// Its address in this process.
    pub(super) address: u64,
    /// How many bytes from it on lie in the same allocation; at least 1.
    pub(super) room: u64,
    /// Which allocation it is.
    pub(super) base: u64,
    pub(super) mapping: &'a M,
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn allocation(base: u64, len: u64, handle: u8) -> Allocation {
        Allocation { handle: [handle; 64], base, len }
    }

    fn at(view: &View<u8>, address: u64) -> Option<(u64, u64, u8)> {
        view.find(address).map(|found| (found.address, found.room, *found.mapping))
    }

    #[test]
    fn addresses_are_translated_within_their_allocation() {
        let list = [allocation(100, 50, 1), allocation(150, 10, 2), allocation(300, 1, 3)];
        let view: View<u8> = View::new()
            .renew(&list, |there| Ok::<_, Infallible>((there.base * 1000, there.handle[0])))
            .unwrap();
        assert_eq!(at(&view, 100), Some((100_000, 50, 1)));
        assert_eq!(at(&view, 149), Some((100_049, 1, 1)));
        assert_eq!(at(&view, 150), Some((150_000, 10, 2)));
        assert_eq!(at(&view, 300), Some((300_000, 1, 3)));
        for outside in [0, 99, 160, 299, 301, u64::MAX] {
            assert_eq!(at(&view, outside), None, "{outside}");
        }
    }

    #[test]
    fn only_what_is_new_is_opened() {
        let mut opened = Vec::new();
        let mut open = |there: &Allocation| {
            opened.push((there.base, there.handle[0]));
            Ok::<_, Infallible>((0, there.handle[0]))
        };
        let first = View::new()
            .renew(
                &[allocation(100, 50, 1), allocation(200, 50, 2), allocation(300, 50, 3)],
                &mut open,
            )
            .unwrap();
        // The first stays, the second was freed and allocated again, the third went, the fourth is new.
        let second = first
            .renew(
                &[allocation(100, 50, 1), allocation(200, 50, 9), allocation(400, 50, 4)],
                &mut open,
            )
            .unwrap();
        assert_eq!(opened, [(100, 1), (200, 2), (300, 3), (200, 9), (400, 4)]);
        assert_eq!(at(&second, 200).unwrap().2, 9);
        assert!(at(&second, 300).is_none() && at(&first, 300).is_some());
    }

    #[test]
    fn a_failure_leaves_the_view_as_it_was() {
        let view =
            View::new().renew(&[allocation(100, 50, 1)], |_| Ok::<_, ()>((7, 1_u8))).unwrap();
        assert!(view.renew(&[allocation(100, 50, 1), allocation(200, 1, 2)], |_| Err(())).is_err());
        assert_eq!(at(&view, 100), Some((7, 50, 1)));
    }
}
