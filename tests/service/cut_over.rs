//! P11: one replica never serves two versions. Random schedules over the state machine of a cut-over: ranks crash, come
//! back and see old views, writes arrive late, twice or out of order, staging and installing fail.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions, not what they call")]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use refit_service::message::{Decision, Health, Outcome, RankState};
use refit_service::rendezvous::Revision;
use refit_service::replica::{Machine, Step, View};

/// Something that happens.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// A rank looks at the store, and sees it as it was up to so long ago.
    Look { rank: usize, behind: u8 },
    /// A rank does what it is to do next, and it works or not.
    Act { rank: usize, works: bool },
    /// A rank's next write is under way when it crashes: it may arrive at any time, or never.
    CrashWriting { rank: usize },
    /// A rank ends.
    Crash { rank: usize },
    /// The store drops what a crashed rank wrote under its session.
    Expire { rank: usize },
    /// The store takes a rank that lives for dead. It finds out when it looks or writes.
    LoseSession { rank: usize },
    /// It comes back as another life.
    Rejoin { rank: usize },
    /// A crashed or invalid rank is started again.
    Restart { rank: usize },
    /// A write that was under way arrives. Decisions may do so again and again.
    Arrive { which: u8 },
    /// The trainer commits the next version; the one before may or may not be had any more.
    Publish,
    /// A rank is told to reach the newest version.
    Want { rank: usize },
    /// A rank's time is up.
    GiveUp { rank: usize },
    /// Somebody removes decisions that are superfluous.
    Prune,
}

fn event(ranks: usize) -> impl Strategy<Value = Event> {
    let rank = 0..ranks;
    prop_oneof![
        12 => (rank.clone(), 0..6_u8).prop_map(|(rank, behind)| Event::Look { rank, behind }),
        24 => (rank.clone(), prop::bool::weighted(0.93))
            .prop_map(|(rank, works)| Event::Act { rank, works }),
        1 => rank.clone().prop_map(|rank| Event::CrashWriting { rank }),
        1 => rank.clone().prop_map(|rank| Event::Crash { rank }),
        2 => rank.clone().prop_map(|rank| Event::Expire { rank }),
        2 => rank.clone().prop_map(|rank| Event::LoseSession { rank }),
        3 => rank.clone().prop_map(|rank| Event::Rejoin { rank }),
        3 => rank.clone().prop_map(|rank| Event::Restart { rank }),
        2 => any::<u8>().prop_map(|which| Event::Arrive { which }),
        1 => Just(Event::Publish),
        4 => rank.clone().prop_map(|rank| Event::Want { rank }),
        1 => rank.prop_map(|rank| Event::GiveUp { rank }),
        1 => Just(Event::Prune),
    ]
}

/// One rank's process.
#[derive(Debug)]
struct Process {
    machine: Machine,
    incarnation: u128,
    /// The moment that it sees.
    sees: usize,
    /// The version of its live parameters as they really are; `None` while they are a mix or the engine's own.
    live: Option<u64>,
    /// What its staging memory really holds.
    shadow: Option<u64>,
    /// Whether its session has ended: nothing arrives that it writes under that.
    lost: bool,
}

#[derive(Debug)]
struct World {
    ranks: u32,
    /// What the store held, moment by moment.
    history: Vec<View>,
    processes: Vec<Option<Process>>,
    /// Decisions that were written, of processes that live or not: they may arrive again.
    late: Vec<Decision>,
    incarnations: u128,
    newest: u64,
    /// The first decision of every round, whatever was pruned since.
    decided: BTreeMap<u64, Decision>,
    /// By round and version: which life of which rank has bound itself.
    bound: BTreeMap<(u64, u64), BTreeMap<u32, u128>>,
    /// By rank: the newest version that it has ever installed.
    reached: Vec<u64>,
    serves: BTreeSet<u64>,
}

impl World {
    fn new(ranks: usize) -> Self {
        let mut world = Self {
            ranks: u32::try_from(ranks).unwrap(),
            history: vec![View::default()],
            processes: (0..ranks).map(|_| None).collect(),
            late: Vec::new(),
            incarnations: 0,
            newest: 1,
            decided: BTreeMap::new(),
            bound: BTreeMap::new(),
            reached: vec![0; ranks],
            serves: BTreeSet::new(),
        };
        (0..ranks).for_each(|rank| world.restart(rank));
        world
    }

    fn now(&self) -> &View {
        self.history.last().unwrap()
    }

    fn write(&mut self, change: impl FnOnce(&mut View, &mut BTreeMap<u64, Decision>)) {
        let mut next = self.now().clone();
        // What is there, by round; the view keeps the latest and the numbers.
        let mut there: BTreeMap<u64, Decision> = next
            .rounds
            .iter()
            .map(|round| (*round, self.decided[round]))
            .chain(next.latest.map(|latest| (latest.round, latest)))
            .collect();
        change(&mut next, &mut there);
        next.rounds = there.keys().copied().collect();
        next.latest = there.into_values().next_back();
        next.revision = Revision(next.revision.0 + 1);
        self.history.push(next);
    }

    /// What a rank says of itself reaches the store.
    fn arrives(&mut self, state: RankState) {
        if let Some(prepared) = state.prepared {
            let bound = self.bound.entry((prepared.round, prepared.version)).or_default();
            bound.insert(state.rank, state.incarnation);
        }
        self.write(|view, _| {
            view.ranks.insert(state.rank, state);
        });
    }

    /// A decision reaches the store: the first of its round stays.
    fn decide(&mut self, decision: Decision) {
        if self.now().rounds.contains(&decision.round) {
            return;
        }
        let again = self.decided.contains_key(&decision.round);
        if !again {
            self.decided.insert(decision.round, decision);
            if let Outcome::Commit(version) = decision.outcome {
                assert!(
                    decision.before.is_none_or(|before| before.version < version),
                    "{decision:?} goes back"
                );
                // Every rank had bound itself, and those that have not died since hold the version still.
                let none = BTreeMap::new();
                let bound = self.bound.get(&(decision.round, version)).unwrap_or(&none);
                assert_eq!(
                    bound.len(),
                    self.processes.len(),
                    "{decision:?}, and not all were bound"
                );
                for process in self.processes.iter().flatten() {
                    let state = process.machine.state();
                    if bound[&state.rank] == process.incarnation {
                        assert_eq!(process.shadow, Some(version), "bound to what is not staged");
                    }
                }
            }
        }
        // One that was pruned and arrives again is written as it was sent: another outcome, even.
        let kept = if again { decision } else { self.decided[&decision.round] };
        self.write(|_, there| {
            there.insert(kept.round, kept);
        });
        let latest = self.now().latest.unwrap();
        assert_eq!(latest, self.decided[&latest.round], "a late decision counts");
    }

    fn restart(&mut self, rank: usize) {
        let number = u32::try_from(rank).unwrap();
        if self.processes[rank].is_some() || self.now().ranks.contains_key(&number) {
            return;
        }
        self.incarnations += 1;
        let incarnation = self.incarnations;
        let mut machine = Machine::new(number, self.ranks, incarnation);
        let state = machine.state();
        self.write(|view, _| {
            view.ranks.insert(number, state);
        });
        machine.reported(state);
        let sees = self.history.len() - 1;
        self.processes[rank] =
            Some(Process { machine, incarnation, sees, live: None, shadow: None, lost: false });
    }

    /// A rank that lives and has lost its session takes its place again.
    fn rejoin(&mut self, rank: usize) {
        let lost = self.processes[rank].as_ref().is_some_and(|process| process.lost);
        if !lost {
            return;
        }
        self.incarnations += 1;
        let incarnation = self.incarnations;
        let mut process = self.processes[rank].take().unwrap();
        process.machine.reborn(incarnation);
        let state = process.machine.state();
        let number = u32::try_from(rank).unwrap();
        assert!(!self.now().ranks.contains_key(&number), "two lives of a rank at once");
        self.write(|view, _| {
            view.ranks.insert(number, state);
        });
        process.machine.reported(state);
        (process.incarnation, process.lost) = (incarnation, false);
        process.sees = self.history.len() - 1;
        self.processes[rank] = Some(process);
    }

    fn act(&mut self, rank: usize, works: bool) -> Option<Step> {
        let newest = self.newest;
        let sees = self.processes[rank].as_ref()?.sees;
        let view = self.history[sees].clone();
        let process = self.processes[rank].as_mut()?;
        let step = process.machine.next(&view);
        match step.clone() {
            // The write is refused, and the rank told so: it has to join again.
            Step::Report(_) if process.lost => {}
            Step::Report(state) => {
                process.machine.reported(state);
                if state.health == Health::Installing {
                    // From here on its parameters may be half written.
                    process.live = None;
                }
                self.arrives(state);
                self.see_now(rank);
            }
            Step::Stage { at_least, prefer } => {
                process.machine.staging();
                process.shadow = None;
                // The newest version can be had, and what others hold mostly.
                let version = prefer.filter(|_| works).unwrap_or(newest);
                if works && version >= at_least {
                    process.shadow = Some(version);
                    process.machine.staged(version);
                } else {
                    process.machine.not_staged();
                }
            }
            Step::Decide(decision) => {
                self.late.push(decision);
                self.decide(decision);
                self.see_now(rank);
            }
            Step::Install(version) => {
                assert_eq!(process.shadow, Some(version), "installs what is not staged");
                let committed = |decision: &Decision| decision.outcome == Outcome::Commit(version);
                assert!(self.decided.values().any(committed), "installs what nobody decided");
                process.live = works.then_some(version);
                if works {
                    process.machine.installed();
                    assert!(self.reached[rank] <= version, "went back");
                    self.reached[rank] = version;
                } else {
                    process.machine.failed();
                }
            }
            Step::Done(version) => assert_eq!(process.live, Some(version)),
            Step::Superseded => panic!("two lives of a rank at once"),
            Step::Vanished => assert!(process.lost, "what it wrote is there"),
            _ => {}
        }
        Some(step)
    }

    /// Who has written sees what it wrote.
    fn see_now(&mut self, rank: usize) {
        let last = self.history.len() - 1;
        if let Some(process) = &mut self.processes[rank] {
            process.sees = last;
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Look { rank, behind } => {
                let last = self.history.len() - 1;
                if let Some(process) = &mut self.processes[rank] {
                    process.sees = process.sees.max(last.saturating_sub(behind.into()));
                }
            }
            Event::Act { rank, works } => drop(self.act(rank, works)),
            Event::CrashWriting { rank } => {
                let Some(process) = &self.processes[rank] else { return };
                let (view, lost) = (self.history[process.sees].clone(), process.lost);
                let step = self.processes[rank].take().unwrap().machine.next(&view);
                match step {
                    Step::Report(_) if lost => {}
                    // Under a session, so it arrives before the session ends or never.
                    Step::Report(state) => self.arrives(state),
                    Step::Decide(decision) => self.late.push(decision),
                    _ => {}
                }
            }
            Event::Crash { rank } => self.processes[rank] = None,
            Event::Expire { rank } => {
                let number = u32::try_from(rank).unwrap();
                if self.processes[rank].is_none() && self.now().ranks.contains_key(&number) {
                    self.write(|view, _| {
                        view.ranks.remove(&number);
                    });
                }
            }
            Event::LoseSession { rank } => {
                let number = u32::try_from(rank).unwrap();
                if let Some(process) = &mut self.processes[rank]
                    && !process.lost
                {
                    process.lost = true;
                    self.write(|view, _| {
                        view.ranks.remove(&number);
                    });
                }
            }
            Event::Rejoin { rank } => self.rejoin(rank),
            Event::Restart { rank } => {
                let invalid = |process: &Process| process.machine.state().health == Health::Invalid;
                if self.processes[rank].as_ref().is_some_and(invalid) {
                    self.processes[rank] = None;
                    self.happen(Event::Expire { rank });
                }
                self.restart(rank);
            }
            Event::Arrive { which } => {
                if !self.late.is_empty() {
                    let decision = self.late[usize::from(which) % self.late.len()];
                    self.decide(decision);
                }
            }
            Event::Publish => self.newest += 1,
            Event::Want { rank } => {
                let newest = self.newest;
                if let Some(process) = &mut self.processes[rank] {
                    process.machine.want(newest);
                }
            }
            Event::GiveUp { rank } => {
                if let Some(process) = &mut self.processes[rank] {
                    process.machine.give_up();
                }
            }
            Event::Prune => {
                let latest = self.now().latest.map_or(0, |latest| latest.round);
                self.write(|_, there| there.retain(|round, _| *round >= latest.saturating_sub(1)));
            }
        }
        self.check();
    }

    /// What must hold at every moment.
    fn check(&mut self) {
        self.serves.clear();
        for process in self.processes.iter().flatten() {
            let view = &self.history[process.sees];
            let state = process.machine.state();
            assert_eq!(state.incarnation, process.incarnation);
            if let Some(version) = process.machine.serving(view) {
                assert_eq!(process.live, Some(version), "serves what is not live and whole");
                self.serves.insert(version);
            }
            if let Some(installed) = state.installed {
                assert_eq!(
                    process.live,
                    Some(installed),
                    "says that it has installed what it has not"
                );
            }
        }
        assert!(self.serves.len() <= 1, "serves {:?} at once", self.serves);
    }

    /// Everything works again: all ranks get to the newest version.
    fn recover(&mut self) {
        let ranks = self.processes.len();
        self.newest += 1;
        for rank in 0..ranks {
            self.happen(Event::Expire { rank });
            self.happen(Event::Rejoin { rank });
            self.happen(Event::Restart { rank });
            self.happen(Event::Want { rank });
        }
        let goal = self.newest;
        for _ in 0..200 {
            let mut done = 0;
            for rank in 0..ranks {
                self.happen(Event::Look { rank, behind: 0 });
                done += usize::from(self.act(rank, true) == Some(Step::Done(goal)));
                self.check();
            }
            if done == ranks {
                (0..ranks).for_each(|rank| self.happen(Event::Look { rank, behind: 0 }));
                assert_eq!(self.serves, BTreeSet::from([goal]));
                return;
            }
        }
        panic!("the ranks do not get to version {goal}: {self:#?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4_000, max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn one_replica_never_serves_two_versions(
        (ranks, events) in (2..=4_usize)
            .prop_flat_map(|ranks| (Just(ranks), prop::collection::vec(event(ranks), 0..250)))
    ) {
        let mut world = World::new(ranks);
        for event in events {
            world.happen(event);
        }
        world.recover();
    }
}

/// Schedules above are worth something only if versions do get installed in them.
#[test]
fn a_plain_schedule_commits_at_once() {
    for ranks in 1..=4 {
        let mut world = World::new(ranks);
        world.recover();
        assert_eq!(world.decided.len(), 1);
        assert_eq!(world.reached, vec![2; ranks]);
        world.recover();
        assert_eq!(world.decided.len(), 2);
    }
}

/// Whatever is given up before the decision, every rank keeps and serves the old version.
#[test]
fn a_failure_before_the_decision_changes_nothing() {
    let mut world = World::new(3);
    world.recover();
    let old = world.newest;
    world.happen(Event::Publish);
    for rank in 0..3 {
        world.happen(Event::Want { rank });
    }
    // Two ranks stage and bind themselves; the third cannot stage.
    for _ in 0..4 {
        for rank in 0..2 {
            world.happen(Event::Look { rank, behind: 0 });
            world.happen(Event::Act { rank, works: true });
        }
        world.happen(Event::Act { rank: 2, works: false });
    }
    for rank in 0..3 {
        world.happen(Event::GiveUp { rank });
    }
    for _ in 0..6 {
        for rank in 0..3 {
            world.happen(Event::Look { rank, behind: 0 });
            world.happen(Event::Act { rank, works: true });
            assert_eq!(world.serves, BTreeSet::from([old]));
        }
    }
    let aborted = world.decided.values().filter(|it| it.outcome == Outcome::Abort).count();
    assert_eq!(aborted, 1);
    world.recover();
}
