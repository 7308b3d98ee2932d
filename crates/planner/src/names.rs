use alloc::string::String;
use alloc::vec::Vec;

/// Many names in one piece of memory: comparing neighbours does not wander.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    text: String,
    ends: Vec<usize>,
}

impl Names {
    pub(crate) fn push(&mut self, name: &str) {
        self.text.push_str(name);
        self.ends.push(self.text.len());
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn get(&self, index: usize) -> &str {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[start..self.ends[index]]
    }

    /// How many names from `first` on are less than `name`; sorted they must be. Quick where they are few.
    pub(crate) fn less(&self, first: usize, name: &str) -> usize {
        let below =
            |distance: usize| first + distance < self.len() && self.get(first + distance) < name;
        let mut reach = 1;
        while below(reach - 1) {
            reach *= 2;
        }
        // All of `low` are below, the one at `high` is not.
        let (mut low, mut high) = (reach / 2, reach - 1);
        while low < high {
            let middle = low + (high - low) / 2;
            if below(middle) { low = middle + 1 } else { high = middle }
        }
        low
    }
}

impl<'a> FromIterator<&'a str> for Names {
    fn from_iter<I: IntoIterator<Item = &'a str>>(names: I) -> Self {
        let mut all = Self::default();
        names.into_iter().for_each(|name| all.push(name));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_from_anywhere() {
        let sorted = ["", "a", "ab", "b", "ba", "c"];
        let names: Names = sorted.into_iter().collect();
        for first in 0..=sorted.len() {
            for name in ["", "a", "aa", "ab", "b", "bb", "c", "d"] {
                let less = sorted[first..].iter().take_while(|other| **other < name).count();
                assert_eq!(names.less(first, name), less, "`{name}` from {first} on");
            }
        }
        assert_eq!((names.get(0), names.get(5), names.len()), ("", "c", 6));
    }
}
