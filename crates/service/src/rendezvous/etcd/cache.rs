//! Values in chunks that were read lately: most are read again with every change beside them.

use std::collections::VecDeque;

use super::value::Cut;

/// Most bytes that are kept.
const MOST: u64 = 64 << 20;

/// The last values, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Cache {
    values: VecDeque<(Cut, Vec<u8>)>,
    bytes: u64,
}

impl Cache {
    pub(super) fn get(&self, cut: &Cut) -> Option<Vec<u8>> {
        self.values.iter().find(|(kept, _)| kept == cut).map(|(_, value)| value.clone())
    }

    pub(super) fn put(&mut self, cut: Cut, value: &[u8]) {
        if cut.bytes > MOST || self.values.iter().any(|(kept, _)| *kept == cut) {
            return;
        }
        self.values.push_back((cut, value.to_vec()));
        self.bytes += cut.bytes;
        while self.bytes > MOST
            && let Some((oldest, _)) = self.values.pop_front()
        {
            self.bytes -= oldest.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_bounded() {
        let mut cache = Cache::default();
        let value = vec![7; 20 << 20];
        let cuts: Vec<Cut> = (0..4).map(|id| Cut::new(id, &value)).collect();
        for cut in &cuts {
            cache.put(*cut, &value);
            cache.put(*cut, &value);
        }
        assert!(cache.get(&cuts[0]).is_none(), "it is the oldest");
        assert!(cuts[1..].iter().all(|cut| cache.get(cut).is_some_and(|kept| kept == value)));
        let large = vec![7; (64 << 20) + 1];
        cache.put(Cut::new(9, &large), &large);
        assert_eq!((cache.bytes, cache.values.len()), (60 << 20, 3));
    }
}
