//! The cut-over of one rank, as a state machine without a clock, a store or memory.
//!
//! It is asked what to [do next](Machine::next), given a view of the replica, and told what came of it. Views may be old, and
//! may come twice; they never go back, and never lack what this rank has written itself.

use crate::message::{Decision, Health, Outcome, Prepared, RankState};

use super::view::View;

/// One rank of a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    rank: u32,
    ranks: u32,
    incarnation: u128,
    /// The version of the live parameters.
    installed: Option<u64>,
    /// The version that is whole in staging memory.
    staged: Option<u64>,
    phase: Phase,
    /// What was written last.
    reported: Option<RankState>,
    /// What the caller waits for, and whether it still does.
    goal: Goal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Bound to nothing.
    Free,
    /// Bound to keep what is staged until this round is decided.
    Bound(Prepared),
    /// Live parameters are being written.
    Installing(u64),
    /// They are a mix, for good.
    Invalid,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    /// A version from this one on.
    Reach(u64),
    /// To leave no round undecided that this rank is bound in.
    Leave,
}

/// What a rank does next.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Write this, then say so ([`Machine::reported`]) and look again.
    Report(RankState),
    /// Stage a version from `at_least` on, `prefer` if it can be had; then [`Machine::staged`] or [`Machine::not_staged`].
    /// What was staged before is given up.
    Stage {
        /// None below.
        at_least: u64,
        /// What the others have, or will have.
        prefer: Option<u64>,
    },
    /// Write this unless the round is decided already, and look again.
    Decide(Decision),
    /// Make the staged version live; then [`Machine::installed`] or [`Machine::failed`].
    Install(u64),
    /// Look again when something has changed.
    Wait,
    /// All ranks have installed this.
    Done(u64),
    /// There is nothing left to do: time is up, and this rank is bound to nothing.
    Left,
    /// The live parameters are a mix. Only a new life of this rank serves again.
    Invalid,
    /// Another life of this rank is there. This one must not serve or write.
    Superseded,
    /// What this rank had written is gone: its session has ended. It may come back as another life
    /// ([`Machine::reborn`]).
    Vanished,
}

impl Machine {
    /// A rank that has installed nothing.
    #[must_use]
    pub fn new(rank: u32, ranks: u32, incarnation: u128) -> Self {
        Self {
            rank,
            ranks,
            incarnation,
            installed: None,
            staged: None,
            phase: Phase::Free,
            reported: None,
            goal: Goal::Leave,
        }
    }

    /// Another life of this rank, whose last one ended with its session: with what it has staged, and as if it had installed
    /// nothing.
    ///
    /// What is staged stays, because a version names bytes for ever and nobody else writes them. What is installed must not
    /// be claimed: a life in between may have gone further, and a rank's installed versions never go back. A mix
    /// stays a mix.
    pub fn reborn(&mut self, incarnation: u128) {
        self.incarnation = incarnation;
        self.installed = None;
        self.reported = None;
        self.goal = Goal::Leave;
        if self.phase != Phase::Invalid {
            self.phase = Phase::Free;
        }
    }

    /// From now on it tries to reach a version from this one on.
    pub fn want(&mut self, at_least: u64) {
        self.goal = Goal::Reach(at_least);
    }

    /// From now on it only gets out of what it is bound to.
    pub fn give_up(&mut self) {
        self.goal = Goal::Leave;
    }

    /// What it has staged, if that may be shown to others.
    #[must_use]
    pub fn staged_version(&self) -> Option<u64> {
        self.staged
    }

    /// What it has installed.
    #[must_use]
    pub fn installed_version(&self) -> Option<u64> {
        self.installed
    }

    /// What it has to tell the others.
    #[must_use]
    pub fn state(&self) -> RankState {
        let (installed, prepared, health) = match self.phase {
            Phase::Free => (self.installed, None, Health::Whole),
            Phase::Bound(prepared) => (self.installed, Some(prepared), Health::Whole),
            Phase::Installing(_) => (None, None, Health::Installing),
            Phase::Invalid => (None, None, Health::Invalid),
        };
        let Self { rank, ranks, incarnation, .. } = *self;
        RankState { rank, ranks, incarnation, installed, prepared, health }
    }

    /// Whether what it has written is not there any more.
    #[must_use]
    pub fn has_vanished(&self, view: &View) -> bool {
        self.reported.is_some() && !view.ranks.contains_key(&self.rank)
    }

    /// The version that this rank may answer for, given what it sees: all ranks have installed it, and it has not begun to
    /// write another.
    #[must_use]
    pub fn serving(&self, view: &View) -> Option<u64> {
        let installed = match self.phase {
            Phase::Free | Phase::Bound(_) => self.installed?,
            Phase::Installing(_) | Phase::Invalid => return None,
        };
        let ours = view.ranks.get(&self.rank)?.incarnation == self.incarnation;
        view.installed_by_all(self.ranks).filter(|&version| ours && version == installed)
    }

    /// What to do next, as far as this view shows.
    pub fn next(&mut self, view: &View) -> Step {
        let other = |state: &RankState| state.incarnation != self.incarnation;
        if view.ranks.get(&self.rank).is_some_and(other) {
            return Step::Superseded;
        }
        // It waits for nobody then: nobody sees it.
        if self.has_vanished(view) {
            return Step::Vanished;
        }
        if let Phase::Bound(prepared) = self.phase
            && view.round() > prepared.round
        {
            // Decided, one way or the other. What is staged stays until it is given up for something else.
            self.phase = Phase::Free;
        }
        let next = match self.phase {
            Phase::Free => self.free(view),
            Phase::Bound(prepared) => self.bound(view, prepared),
            Phase::Installing(version) => Step::Install(version),
            Phase::Invalid => Step::Invalid,
        };
        // Others learn where this rank stands before it does anything.
        let state = self.state();
        if self.reported == Some(state) { next } else { Step::Report(state) }
    }

    fn free(&mut self, view: &View) -> Step {
        let standing = view.standing().map(|standing| standing.version);
        let behind = standing.filter(|&version| self.installed.is_none_or(|it| it < version));
        if let Some(version) = behind
            && self.staged == Some(version)
        {
            // Committed: what is staged has to become live, whatever time it is.
            self.phase = Phase::Installing(version);
            return Step::Install(version);
        }
        let Goal::Reach(wanted) = self.goal else { return Step::Left };
        let others = view.newest_prepared(self.rank);
        let least = [Some(wanted), behind, others].into_iter().flatten().max().unwrap_or(wanted);
        if self.installed.is_some_and(|installed| installed >= least) {
            return match view.installed_by_all(self.ranks) {
                Some(version) if self.installed == Some(version) => Step::Done(version),
                _ => Step::Wait,
            };
        }
        match self.staged {
            // The standing version is handled above, and an older one cannot be committed.
            Some(version) if version >= least && standing.is_none_or(|it| it < version) => {
                let prepared = Prepared { round: view.round(), version };
                self.phase = Phase::Bound(prepared);
                self.bound(view, prepared)
            }
            _ => {
                let prefer = others.max(behind).filter(|&version| version >= least);
                Step::Stage { at_least: least, prefer }
            }
        }
    }

    fn bound(&self, view: &View, Prepared { round, version }: Prepared) -> Step {
        let before = view.standing();
        let decide = |outcome| Step::Decide(Decision { round, outcome, before });
        if view.prepared_by_all(self.ranks, round, version) {
            return decide(Outcome::Commit(version));
        }
        // What this rank or another wants is newer, or nothing is wanted any more.
        let overtaken = view.newest_prepared(self.rank).is_some_and(|newest| newest > version);
        match self.goal {
            Goal::Reach(wanted) if wanted <= version && !overtaken => Step::Wait,
            _ => decide(Outcome::Abort),
        }
    }

    /// This was written.
    pub fn reported(&mut self, state: RankState) {
        self.reported = Some(state);
    }

    /// A version is being staged: what was staged before is not whole any more.
    pub fn staging(&mut self) {
        self.staged = None;
    }

    /// A version is whole in staging memory.
    pub fn staged(&mut self, version: u64) {
        self.staged = Some(version);
    }

    /// Staging failed.
    pub fn not_staged(&mut self) {
        self.staged = None;
    }

    /// The version asked for is live and whole.
    pub fn installed(&mut self) {
        if let Phase::Installing(version) = self.phase {
            self.installed = Some(version);
            self.phase = Phase::Free;
        }
    }

    /// Installing failed: the live parameters may be a mix.
    pub fn failed(&mut self) {
        if let Phase::Installing(_) = self.phase {
            self.installed = None;
            self.phase = Phase::Invalid;
        }
    }
}
