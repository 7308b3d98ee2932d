//! Processes that refit one model, what they say, and whether it keeps the promises.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::child::ANEW;
use crate::processes::{Lane, Process, Role, Said};
use crate::report::Report;

/// A refit that has no answer so long behind its deadline is hung.
const HUNG: Duration = Duration::from_secs(5);

/// One answer of a target.
#[derive(Clone, Debug)]
pub(crate) struct Refit {
    pub(crate) process: usize,
    /// The salt of the model.
    pub(crate) model: u64,
    pub(crate) ok: bool,
    /// Whether it read every byte.
    pub(crate) reads: bool,
    pub(crate) began: u64,
    pub(crate) ended: u64,
    pub(crate) registrations: u64,
}

/// Sums over all worlds of a run.
#[derive(Debug, Default)]
pub(crate) struct Sums {
    pub(crate) refits: u64,
    pub(crate) errors: u64,
    pub(crate) sessions: u64,
    pub(crate) retries: u64,
    pub(crate) served: u64,
    pub(crate) anew: u64,
    pub(crate) torn: u64,
    pub(crate) mixed: u64,
    pub(crate) hangs: u64,
    pub(crate) aborts: u64,
    /// How far behind their deadlines answers came, without the time in which their process was stopped.
    pub(crate) lates: Vec<u64>,
    /// The same of those only that met a fault: errors, and refits that were tried again.
    pub(crate) met: Vec<u64>,
    /// By how much the latest answer came late, and what it was.
    pub(crate) latest: (u64, String),
    /// The first word of every kind of error, and how often it came.
    pub(crate) kinds: BTreeMap<String, u64>,
}

struct Seat {
    role: Role,
    process: Process,
    life: u64,
    /// When it last answered, or started.
    heard: Instant,
    ready: bool,
    /// Its end is wanted.
    doomed: bool,
    /// Since when it is stopped.
    stopped: bool,
    gone: bool,
}

pub(crate) struct World {
    lane: Lane,
    folder: TempDir,
    seats: Vec<Seat>,
    to: Sender<Said>,
    from: Receiver<Said>,
    refits: Vec<Refit>,
    /// By replica and version: the first time by which it was served, and the last one from which on it was.
    served: BTreeMap<u64, BTreeMap<u64, (u64, u64)>>,
}

impl World {
    /// An empty one.
    pub(crate) fn new(lane: Lane) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("logs")).unwrap();
        let (to, from) = channel();
        let (seats, refits, served) = (Vec::new(), Vec::new(), BTreeMap::new());
        Self { lane, folder, seats, to, from, refits, served }
    }

    /// Where its processes meet.
    pub(crate) fn meeting(&self) -> String {
        self.folder.path().join("store").to_str().unwrap().to_owned()
    }

    fn logs(&self) -> PathBuf {
        self.folder.path().join("logs")
    }

    /// Starts a process, and gives back its number.
    pub(crate) fn add(&mut self, role: Role) -> usize {
        let at = self.seats.len();
        let process = Process::start(&role, self.lane, &self.logs(), at, 0, self.to.clone());
        let heard = Instant::now();
        let (ready, doomed, stopped, gone) = (false, false, false, false);
        self.seats.push(Seat { role, process, life: 0, heard, ready, doomed, stopped, gone });
        at
    }

    /// Starts it again, after its end.
    pub(crate) fn restart(&mut self, at: usize) {
        let (logs, to) = (self.logs(), self.to.clone());
        let seat = &mut self.seats[at];
        seat.life += 1;
        seat.process = Process::start(&seat.role, self.lane, &logs, at, seat.life, to);
        seat.heard = Instant::now();
        (seat.ready, seat.doomed, seat.stopped, seat.gone) = (false, false, false, false);
    }

    pub(crate) fn process(&mut self, at: usize) -> &mut Process {
        &mut self.seats[at].process
    }

    pub(crate) fn targets(&self) -> Vec<usize> {
        let target = |at: &usize| matches!(self.seats[*at].role, Role::Targets(_));
        (0..self.seats.len()).filter(target).collect()
    }

    pub(crate) fn len(&self) -> usize {
        self.seats.len()
    }

    pub(crate) fn is_source(&self, at: usize) -> bool {
        matches!(self.seats[at].role, Role::Source(_))
    }

    pub(crate) fn is_gone(&self, at: usize) -> bool {
        self.seats[at].gone
    }

    /// From here on its end is no failure.
    pub(crate) fn doom(&mut self, at: usize) {
        self.seats[at].doomed = true;
    }

    pub(crate) fn stop(&mut self, at: usize) {
        self.seats[at].process.stop();
        self.seats[at].stopped = true;
    }

    pub(crate) fn resume(&mut self, at: usize) {
        self.seats[at].process.resume();
        self.seats[at].stopped = false;
        self.seats[at].heard = Instant::now();
    }

    /// Whether there are answers to [take](Self::take_refits).
    pub(crate) fn has_refits(&self) -> bool {
        !self.refits.is_empty()
    }

    /// Whether one that is gone ended by itself, and well.
    pub(crate) fn ended_in_order(&mut self, at: usize) -> bool {
        let status = self.seats[at].process.wait(Duration::ZERO);
        status.and_then(|it| it.code()).is_some_and(|code| code == 0 || code == i32::from(ANEW))
    }

    /// How it ended, and the last of what it wrote.
    pub(crate) fn last_words(&mut self, at: usize) -> String {
        let process = &mut self.seats[at].process;
        format!("{:?}: {}", process.wait(Duration::ZERO), process.last_words())
    }

    /// Answers since the last call.
    pub(crate) fn take_refits(&mut self) -> Vec<Refit> {
        std::mem::take(&mut self.refits)
    }

    /// Listens until then, or until `done`.
    pub(crate) fn listen(
        &mut self,
        until: Instant,
        sums: &mut Sums,
        report: &mut Report,
        mut done: impl FnMut(&Self) -> bool,
    ) -> bool {
        loop {
            if done(self) {
                return true;
            }
            let now = Instant::now();
            if now >= until {
                return false;
            }
            let rest = (until - now).min(Duration::from_millis(20));
            match self.from.recv_timeout(rest) {
                Ok(said) => self.heard(&said, sums, report),
                Err(RecvTimeoutError::Timeout) => self.look_for_hangs(sums, report),
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
    }

    /// All of them are there.
    pub(crate) fn wait_ready(&mut self, sums: &mut Sums, report: &mut Report) {
        let until = Instant::now() + Duration::from_secs(30);
        let all = |world: &Self| world.seats.iter().all(|seat| seat.ready || seat.gone);
        if !self.listen(until, sums, report, all) {
            report.broken("processes did not start within 30 s");
        }
    }

    fn heard(&mut self, said: &Said, sums: &mut Sums, report: &mut Report) {
        let seat = &mut self.seats[said.process];
        if seat.life != said.life {
            return;
        }
        let Some(line) = &said.line else {
            let status = seat.process.wait(Duration::from_secs(10));
            seat.gone = true;
            if !seat.doomed {
                if status.and_then(|status| status.code()) == Some(i32::from(ANEW)) {
                    sums.anew += 1;
                } else {
                    sums.aborts += 1;
                    let words = seat.process.last_words();
                    let what =
                        if matches!(seat.role, Role::Source(_)) { "source" } else { "target" };
                    report.broken(format!("a {what} that was let live ended: {status:?}: {words}"));
                }
                self.restart(said.process);
            }
            return;
        };
        seat.heard = Instant::now();
        // `refit WHAT BEGAN ENDED DUE VERSION RETRIES REGISTRATIONS MODEL READS ERROR`, and shorter ones.
        let words: Vec<&str> = line.splitn(11, ' ').collect();
        let number = |at: usize| words.get(at).and_then(|it| it.parse::<u64>().ok()).unwrap_or(0);
        match words[0] {
            "ready" => seat.ready = true,
            "session" => sums.sessions += 1,
            "torn" => {
                sums.torn += 1;
                report.broken(format!("process {}: {line}", said.process));
            }
            "serve" => {
                let (before, after, version) = (number(1), number(2), number(3));
                sums.served += 1;
                let served = self.served.entry(number(4)).or_default();
                if let Some(other) = serves(served, before, after, version) {
                    sums.mixed += 1;
                    report.broken(format!("versions {version} and {other} were served at once"));
                }
            }
            "refit" => {
                let what = words.get(1).copied().unwrap_or_default();
                let (began, ended, due) = (number(2), number(3), number(4));
                let (retries, registrations, model) = (number(6), number(7), number(8));
                let stopped = seat.process.stopped_within(began, ended);
                let late = ended.saturating_sub(due).saturating_sub(stopped);
                sums.lates.push(late);
                if what != "ok" || retries > 0 {
                    sums.met.push(late);
                }
                sums.refits += u64::from(what == "ok");
                sums.errors += u64::from(what == "error");
                sums.sessions += u64::from(what == "session");
                sums.retries += retries;
                let error = words.get(10).copied().unwrap_or_default();
                if late > sums.latest.0 {
                    let who = seat.process.id();
                    let took = ended.saturating_sub(began) / 1_000;
                    let last = format!(
                        "process {who}, {what} after {took} ms, {retries} retries: {error}"
                    );
                    sums.latest = (late, last);
                }
                if what == "error" {
                    *sums.kinds.entry(kind(error)).or_default() += 1;
                }
                let (process, ok, reads) = (said.process, what == "ok", number(9) == 1);
                self.refits.push(Refit { process, model, ok, reads, began, ended, registrations });
            }
            _ => {}
        }
    }

    fn look_for_hangs(&mut self, sums: &mut Sums, report: &mut Report) {
        for (at, seat) in self.seats.iter_mut().enumerate() {
            let Role::Targets(parts) = &seat.role else { continue };
            let Some(part) = parts.first() else { continue };
            let patience = Duration::from_millis(part.patience) + HUNG;
            let answers = part.times == 0 && seat.ready && !seat.stopped && !seat.gone;
            if answers && !seat.doomed && seat.heard.elapsed() > patience {
                sums.hangs += 1;
                let waits = wait_channels(seat.process.id());
                report.broken(format!("target {at} has not answered for {patience:?}: {waits}"));
                seat.heard = Instant::now();
            }
        }
    }

    /// Asks all to end, and sees that they do so in order.
    pub(crate) fn end(mut self, sums: &mut Sums, report: &mut Report) {
        // Targets first: a source that leaves waits for those who read.
        for sources in [false, true] {
            let mut leaving: Vec<&mut Seat> = self.seats.iter_mut().collect();
            leaving.retain(|seat| matches!(seat.role, Role::Source(_)) == sources && !seat.gone);
            for seat in &mut leaving {
                seat.process.end();
            }
            for seat in leaving {
                let status = seat.process.wait(Duration::from_secs(20));
                let code = status.and_then(|status| status.code());
                if code != Some(0) && code != Some(i32::from(ANEW)) {
                    sums.aborts += 1;
                    let words = seat.process.last_words();
                    report.broken(format!("a process did not end in order: {status:?}: {words}"));
                }
            }
        }
    }
}

/// Once any rank of a replica has served a version, none serves an older one: so never two at once. Gives back the other
/// version where that is not so.
fn serves(
    served: &mut BTreeMap<u64, (u64, u64)>,
    before: u64,
    after: u64,
    version: u64,
) -> Option<u64> {
    let newer = served.range(version + 1..).find(|(_, (first, _))| *first < before);
    let older = served.range(..version).find(|(_, (_, last))| after < *last);
    let other = newer.or(older).map(|(other, _)| *other);
    let entry = served.entry(version).or_insert((after, before));
    *entry = (entry.0.min(after), entry.1.max(before));
    while served.len() > 64 {
        served.pop_first();
    }
    other
}

/// The words of an error that do not differ from one time to the next.
fn kind(error: &str) -> String {
    let last = error.rsplit(": ").next().unwrap_or(error);
    let words =
        last.split(' ').filter(|word| !word.contains(|it: char| it.is_ascii_digit() || it == '`'));
    words.take(10).collect::<Vec<_>>().join(" ")
}

/// What the threads of a process wait for, to tell where it hangs.
fn wait_channels(id: u32) -> String {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{id}/task")) else { return String::new() };
    let name = |task: std::io::Result<std::fs::DirEntry>| {
        let path = task.ok()?.path();
        let state = std::fs::read_to_string(path.join("stat")).ok()?;
        let state = state.rsplit_once(") ")?.1.chars().next()?;
        let waits = std::fs::read_to_string(path.join("wchan")).unwrap_or_default();
        Some(format!("{state} {waits}"))
    };
    tasks.filter_map(name).collect::<Vec<_>>().join(", ")
}
