//! How a rank's process begins and ends.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use refit::RefitError;
use refit::transport::{Transport, draw_incarnation};
use refit_service::Seats;
use refit_service::rendezvous::{JobKey, Rendezvous, Writer};
use refit_service::worker::reaper;

use super::args::Common;
use super::endpoint::{self, Labels};
use super::figures::Shared;
use super::log;
use super::voice::{Event, Voice};
use super::wakes::Wakes;
use crate::device::Home;
use crate::error::CliError;
use crate::transports::{self, TransportName};

/// How often a process that does nothing else looks whether it was told to stop.
const LOOK: Duration = Duration::from_millis(50);

/// What leaving may take beyond the wait for others.
const GRACE: Duration = Duration::from_secs(2);

/// What a process does over whichever store and transport.
pub(super) trait Work: Send + 'static {
    fn common(&self) -> &Common;

    /// What this process is called, and which side it is.
    fn labels(&self) -> Labels;

    /// The model's name at the rendezvous.
    fn model(&self) -> String;

    /// Whether others read from it.
    fn is_read(&self) -> bool;

    /// Bytes that it will register, and peers that it will connect to.
    fn demands(&self) -> (u64, u32);

    fn run<R: Rendezvous, T: Transport>(
        self,
        seats: Seats<R>,
        agents: Agents<T>,
        house: House,
    ) -> Result<(), CliError>;
}

/// Makes agents, each of an incarnation of its own.
pub(super) type Agents<T> = Box<dyn Fn() -> Result<Arc<T>, CliError> + Send>;

/// What comes with a process.
#[derive(Debug)]
pub(super) struct House {
    pub(super) home: Home,
    pub(super) wakes: Wakes,
    pub(super) figures: Shared,
    pub(super) voice: Voice,
}

/// Runs a rank on a thread of its own, and sees to it that the process ends when it is told to.
pub(super) fn run<W: Work>(
    common: &Common,
    work: impl FnOnce() -> Result<W, CliError>,
) -> Result<ExitCode, CliError> {
    let begun = || {
        log::start(common.verbose)?;
        // Before anything that takes long: a signal may come at once.
        Ok::<_, CliError>((Wakes::listen()?, work()?))
    };
    let drain = common.drain;
    let outcome = begun().and_then(|(wakes, work)| supervise(wakes, work, drain));
    match outcome {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) if error.is_usage() => Err(error),
        Err(error) => {
            eprintln!("refit: {error}");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn supervise<W: Work>(wakes: Wakes, work: W, drain: Duration) -> Result<(), CliError> {
    let stop = wakes.stop();
    let (sender, ended) = mpsc::channel();
    let begin = move || {
        let _ = sender.send(begin(wakes, work));
    };
    thread::Builder::new()
        .name("rank".to_owned())
        .spawn(begin)
        .map_err(CliError::system("start a thread"))?;
    let mut told = None;
    let outcome = loop {
        match ended.recv_timeout(LOOK) {
            Ok(outcome) => break outcome,
            Err(RecvTimeoutError::Disconnected) => {
                break Err(CliError::Mismatch("the rank panicked; see above".to_owned()));
            }
            Err(RecvTimeoutError::Timeout) if stop.is_set() => {
                let until = *told.get_or_insert_with(|| {
                    let until = Instant::now() + drain;
                    stop.of_ranks().tell(until);
                    until
                });
                if Instant::now() >= until + GRACE {
                    let bound = drain.saturating_add(GRACE);
                    eprintln!(
                        "refit: could not leave within {bound:?} (--drain): ending all the same"
                    );
                    end();
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    };
    // Ending in the middle of a read may take its peer down.
    if !reaper::wait(told.unwrap_or_else(|| Instant::now() + drain)) {
        let reaper::ReaperStats { agents, bytes, .. } = reaper::stats();
        if let Err(error) = outcome {
            eprintln!("refit: {error}");
        }
        eprintln!(
            "refit: reads of {agents} agents into {bytes} bytes were under way still after {drain:?} (--drain): their peers \
             are silent, and may not survive this"
        );
        end();
    }
    outcome
}

/// Ends the process where it stands, with reads under way: what libraries do at an exit is not for connections in use, and
/// nothing is destroyed that a read may still write into.
fn end() -> ! {
    signal_hook::low_level::exit(1)
}

fn begin<W: Work>(wakes: Wakes, work: W) -> Result<(), CliError> {
    let (common, labels, figures) = (work.common(), work.labels(), Shared::default());
    let voice = Voice { json: common.json };
    let metrics = common.metrics()?;
    let home = Home::new(common.gpu)?;
    let transport = common.transport()?;
    if let Some(at) = metrics {
        let address = endpoint::serve(at, labels.clone(), figures.clone())?;
        voice.say(&Event::Metrics { address: address.to_string() });
    }
    let name = format!("{}-{}", labels.name, labels.rank);
    let house = House { home, wakes, figures, voice };
    over(transport, work, &name, house)
}

/// Meets the others over this transport, if this build has it.
#[cfg_attr(
    not(any(feature = "nixl", feature = "cuda")),
    allow(unused_variables, reason = "there is none that crosses processes")
)]
fn over(
    transport: TransportName,
    work: impl Work,
    name: &str,
    house: House,
) -> Result<(), CliError> {
    match transport {
        #[cfg(feature = "nixl")]
        TransportName::Nixl => {
            let options = nixl_options(&work, name, &house.home);
            check(&work, &options, house.voice)?;
            let agents = move || transports::nixl_of(options.clone());
            meet(work, name, Box::new(agents), house)
        }
        #[cfg(feature = "cuda")]
        TransportName::Peer => {
            let (named, home) = (name.to_owned(), house.home.clone());
            let agents = move || transports::peer(&named, &home);
            meet(work, name, Box::new(agents), house)
        }
        #[cfg(all(feature = "cuda", feature = "nixl"))]
        TransportName::Auto => {
            let options = nixl_options(&work, name, &house.home);
            // One of the two ways is enough.
            let checked = check(&work, &options, house.voice).map_err(|error| error.to_string());
            let (named, home, voice) = (name.to_owned(), house.home.clone(), house.voice);
            let agents = move || {
                let far = checked.clone().and_then(|()| {
                    let far = transports::nixl_of(options.clone());
                    let far = far.map_err(|error| error.to_string())?;
                    Arc::into_inner(far).ok_or_else(|| "the agent is in use".to_owned())
                });
                if let Err(error) = &far {
                    voice.say(&Event::Failed { error: error.clone() });
                }
                transports::auto_of(&named, &home, far)
            };
            meet(work, name, Box::new(agents), house)
        }
        #[cfg(all(feature = "cuda", not(feature = "nixl")))]
        TransportName::Auto => {
            let (named, read, home) = (name.to_owned(), work.is_read(), house.home.clone());
            let agents = move || transports::auto(&named, read, &home);
            meet(work, name, Box::new(agents), house)
        }
        other => Err(transports::missing(other)),
    }
}

#[cfg(feature = "nixl")]
fn nixl_options(work: &impl Work, name: &str, home: &Home) -> refit::transport::nixl::NixlOptions {
    use refit::transport::nixl::Lanes;
    let lanes = match work.common().insecure_tcp.as_deref() {
        None => Lanes::Auto,
        Some("all") => Lanes::InsecureTcp { interface: None },
        Some(interface) => Lanes::InsecureTcp { interface: Some(interface.to_owned()) },
    };
    let options = transports::nixl_options(name, work.is_read(), home);
    options.with_lanes(lanes).with_publishing(work.is_read())
}

/// Tries the host before a model depends on it.
#[cfg(feature = "nixl")]
fn check(
    work: &impl Work,
    options: &refit::transport::nixl::NixlOptions,
    voice: Voice,
) -> Result<(), CliError> {
    use refit::transport::nixl::{Demands, preflight};
    let (bytes, peers) = work.demands();
    let report = preflight(&[], options, Demands::new(bytes, peers))
        .map_err(|error| CliError::Nixl(error.to_string()))?;
    voice.say(&Event::Preflight { transport: "nixl", lanes: report.lanes });
    Ok(())
}

#[cfg_attr(
    not(any(feature = "nixl", feature = "cuda")),
    allow(dead_code, reason = "without a transport that crosses processes nobody meets")
)]
fn meet<T: Transport>(
    work: impl Work,
    name: &str,
    agents: Agents<T>,
    house: House,
) -> Result<(), CliError> {
    let common = work.common();
    let (stop, voice) = (house.wakes.stop(), house.voice);
    let store = common.rendezvous.open()?;
    let key = JobKey::from_file_or_env(common.key_file.as_deref())?;
    let life = draw_incarnation(name).map_err(RefitError::from)?;
    let writer = Writer::new(&common.job, name, life)?;
    let seats = Seats::new(store, writer, key, &work.model(), common.ttl)?;
    match work.run(seats.with_stop(stop.of_ranks()), agents, house) {
        // It waited for the end of its former life, and was told not to.
        Err(error) if stop.is_set() && error.is_taken() => {
            voice.say(&Event::Leaving { reason: "told to stop" });
            voice.say(&Event::Left { unreleased: 0 });
            Ok(())
        }
        ended => ended,
    }
}
