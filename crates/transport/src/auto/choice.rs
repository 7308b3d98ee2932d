//! Which of two transports reads from a peer: a function of facts, so that a table can test it.

/// What decides, before anything is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) near: Ends,
    pub(super) far: Ends,
    /// Whether the peer registered memory that the near transport does not handle.
    pub(super) beyond_near: bool,
}

/// Which ends of a way there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ends {
    Both,
    /// The peer has none of that kind.
    Ours,
    /// We have none.
    Theirs,
    Neither,
}

impl Ends {
    pub(super) fn of(ours: bool, theirs: bool) -> Self {
        match (ours, theirs) {
            (true, true) => Self::Both,
            (true, false) => Self::Ours,
            (false, true) => Self::Theirs,
            (false, false) => Self::Neither,
        }
    }
}

/// Why the near transport is not even tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotNear {
    /// We have none.
    Ours,
    /// The peer has none.
    Theirs,
    /// It registered memory that only the far one handles.
    Beyond,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Try the near one; if it finds no way, the far one.
    NearThenFar,
    /// Try the near one, there is no other.
    Near,
    /// Take the far one.
    Far(NotNear),
    /// There is none.
    None(NotNear),
}

/// The near transport wherever it may reach the peer, for it is the faster one by far; one peer, one transport.
pub(super) fn choose(facts: Facts) -> Choice {
    let far = facts.far == Ends::Both;
    let not_near = match facts.near {
        Ends::Both if !facts.beyond_near && far => return Choice::NearThenFar,
        // Where there is no other, a part of the peer's memory is better than none.
        Ends::Both if !far => return Choice::Near,
        Ends::Both => NotNear::Beyond,
        Ends::Ours => NotNear::Theirs,
        Ends::Theirs | Ends::Neither => NotNear::Ours,
    };
    if far { Choice::Far(not_near) } else { Choice::None(not_near) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_facts_has_one_answer() {
        use Ends::{Both, Neither, Ours, Theirs};
        // near, far -> what to do, without and with memory beyond the near one
        let table = [
            (Both, Both, Choice::NearThenFar, Choice::Far(NotNear::Beyond)),
            (Both, Ours, Choice::Near, Choice::Near),
            (Both, Theirs, Choice::Near, Choice::Near),
            (Both, Neither, Choice::Near, Choice::Near),
            (Ours, Both, Choice::Far(NotNear::Theirs), Choice::Far(NotNear::Theirs)),
            (Ours, Ours, Choice::None(NotNear::Theirs), Choice::None(NotNear::Theirs)),
            (Ours, Theirs, Choice::None(NotNear::Theirs), Choice::None(NotNear::Theirs)),
            (Ours, Neither, Choice::None(NotNear::Theirs), Choice::None(NotNear::Theirs)),
            (Theirs, Both, Choice::Far(NotNear::Ours), Choice::Far(NotNear::Ours)),
            (Theirs, Ours, Choice::None(NotNear::Ours), Choice::None(NotNear::Ours)),
            (Theirs, Theirs, Choice::None(NotNear::Ours), Choice::None(NotNear::Ours)),
            (Theirs, Neither, Choice::None(NotNear::Ours), Choice::None(NotNear::Ours)),
            (Neither, Both, Choice::Far(NotNear::Ours), Choice::Far(NotNear::Ours)),
            (Neither, Ours, Choice::None(NotNear::Ours), Choice::None(NotNear::Ours)),
            (Neither, Theirs, Choice::None(NotNear::Ours), Choice::None(NotNear::Ours)),
            (Neither, Neither, Choice::None(NotNear::Ours), Choice::None(NotNear::Ours)),
        ];
        for (near, far, within, beyond) in table {
            for (beyond_near, expected) in [(false, within), (true, beyond)] {
                let facts = Facts { near, far, beyond_near };
                assert_eq!(choose(facts), expected, "{facts:?}");
            }
        }
    }

    #[test]
    fn ends_are_told_apart() {
        let ends = [(true, true), (true, false), (false, true), (false, false)];
        let found = ends.map(|(ours, theirs)| Ends::of(ours, theirs));
        assert_eq!(found, [Ends::Both, Ends::Ours, Ends::Theirs, Ends::Neither]);
    }
}
