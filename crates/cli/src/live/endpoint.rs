//! Figures for Prometheus, over HTTP.

use std::fmt;
use std::net::SocketAddr;
use std::thread;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use tiny_http::{Header, Method, Request, Response, Server};

use super::figures::{Figures, Shared};
use crate::error::CliError;

/// What [`encode`] writes.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers GET /metrics at an address until the process ends, and gives back which it is.
pub(super) fn serve(at: SocketAddr, rank: Labels, figures: Shared) -> Result<SocketAddr, CliError> {
    let refused = |why: String| CliError::Metrics { at, why };
    let server = Server::http(at).map_err(|error| refused(error.to_string()))?;
    let bound = server.server_addr().to_ip().unwrap_or(at);
    let registry = registry(rank, figures);
    let serve = move || {
        for request in server.incoming_requests() {
            if let Err(error) = answer(request, &registry) {
                tracing::debug!(%error, "a scrape ended early");
            }
        }
    };
    thread::Builder::new()
        .name("metrics".to_owned())
        .spawn(serve)
        .map_err(CliError::system("start a thread"))?;
    Ok(bound)
}

/// Which rank the figures are of.
#[derive(Clone, Debug)]
pub(super) struct Labels {
    pub(super) side: &'static str,
    pub(super) job: String,
    pub(super) name: String,
    pub(super) rank: u32,
}

fn registry(Labels { side, job, name, rank }: Labels, figures: Shared) -> Registry {
    let labels = [
        ("side".into(), side.into()),
        ("job".into(), job.into()),
        ("name".into(), name.into()),
        ("rank".into(), rank.to_string().into()),
    ];
    let mut registry = Registry::with_prefix_and_labels("refit", labels.into_iter());
    registry.register_collector(Box::new(figures));
    registry
}

fn answer(request: Request, registry: &Registry) -> std::io::Result<()> {
    let path = request.url().split('?').next().unwrap_or_default();
    if *request.method() != Method::Get || path != "/metrics" {
        return request.respond(Response::from_string("GET /metrics\n").with_status_code(404));
    }
    let mut text = String::new();
    if encode(&mut text, registry).is_err() {
        return request.respond(Response::from_string("").with_status_code(500));
    }
    let response = Response::from_string(text);
    match Header::from_bytes("Content-Type", CONTENT_TYPE) {
        Ok(header) => request.respond(response.with_header(header)),
        Err(()) => request.respond(response),
    }
}

impl Collector for Shared {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        Page(encoder).write(&self.snapshot())
    }
}

/// A page of metrics. The encoder puts `refit_` before every name, and `_total` behind those of counters.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn gauge(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: u64) -> fmt::Result {
        let gauge = ConstGauge::new(value);
        let metric = self.0.encode_descriptor(name, help, unit, gauge.metric_type())?;
        gauge.encode(metric)
    }

    fn count(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: u64) -> fmt::Result {
        let counter = ConstCounter::new(value);
        let metric = self.0.encode_descriptor(name, help, unit, counter.metric_type())?;
        counter.encode(metric)
    }

    fn write(&mut self, figures: &Figures) -> fmt::Result {
        let Figures { version, parameter_bytes, verified_bytes, failures, .. } = *figures;
        let Figures { service, relay, pulls, pool, .. } = figures;
        let bytes = Some(&Unit::Bytes);
        if let Some(version) = version {
            self.gauge("version", "The version on offer, or the live one", None, version)?;
        }
        self.gauge("parameters", "Size of the rank's parameters", bytes, parameter_bytes)?;
        self.count("verified", "What was compared and right", bytes, verified_bytes)?;
        self.count("failures", "Steps that failed and were tried again", None, failures)?;

        let sum = |a: u64, b: u64| a.saturating_add(b);
        self.count(
            "commits",
            "Versions that were offered",
            None,
            sum(service.commits, relay.commits),
        )?;
        let waits = sum(service.waits, relay.waits);
        self.count("reader_waits", "Times readers were waited for before writing", None, waits)?;
        let waited = service.waited.saturating_add(relay.waited).as_secs_f64();
        let waited = ConstCounter::new(waited);
        let help = "Time spent waiting for readers before writing";
        let metric = self.0.encode_descriptor(
            "reader_wait",
            help,
            Some(&Unit::Seconds),
            waited.metric_type(),
        )?;
        waited.encode(metric)?;
        let late = sum(service.waits_late, relay.waits_late);
        let help = "Waits for readers that ended at the deadline, with some left";
        self.count("reader_waits_late", help, None, late)?;
        let released = sum(service.leases_released, relay.leases_released);
        let help = "Leases that were waited for and given back, or gone with their readers";
        self.count("leases_released", help, None, released)?;
        let expired = sum(service.leases_expired, relay.leases_expired);
        self.count(
            "leases_expired",
            "Leases that ran out before they were given back",
            None,
            expired,
        )?;

        self.count("refits", "Versions that were read whole", None, service.refits)?;
        self.count(
            "installs",
            "Versions that were installed with a replica",
            None,
            service.installs,
        )?;
        self.count(
            "rejoins",
            "Times a rank came back after its session had ended",
            None,
            service.rejoins,
        )?;
        self.count("aborts", "Rounds of the replica that were aborted", None, service.aborts)?;
        self.count(
            "crowded",
            "Groups passed over because enough others read them",
            None,
            service.crowded,
        )?;
        let retries = &service.retries;
        self.labelled(
            ("retries", "Attempts to read that failed", None, "cause"),
            [
                ("torn", retries.torn),
                ("stale", retries.stale),
                ("vanished", retries.vanished),
                ("late", retries.late),
                ("damaged", retries.damaged),
                ("refused", retries.refused),
                ("failed", retries.failed),
                ("lost", retries.lost),
            ],
        )?;

        self.count("wire", "What crossed the wire", bytes, pulls.wire_bytes)?;
        self.count("needed", "What of it was needed", bytes, pulls.needed_bytes)?;
        self.count("reads", "Reads that were posted", None, pulls.reads)?;
        self.labelled(
            (
                "stage",
                "Time spent in a stage of pulls that ended well",
                Some(&Unit::Seconds),
                "stage",
            ),
            [
                ("transfer_planning", pulls.plan.as_secs_f64()),
                ("setup_registration", pulls.setup.as_secs_f64()),
                ("wire_transfer", pulls.pull.as_secs_f64()),
                ("transformation", pulls.land.as_secs_f64()),
            ],
        )?;

        self.gauge("pool", "Memory of the pool", bytes, pool.bytes)?;
        self.gauge("pool_leased", "Memory of the pool that is in use", bytes, pool.leased_bytes)?;
        let help = "Memory that an abandoned read may still write";
        self.gauge("pool_quarantined", help, bytes, pool.quarantined_bytes)?;
        let help =
            "Memory that silent peers keep, that of agents which others took over from included";
        self.gauge("quarantined", help, bytes, service.quarantined_bytes)?;
        self.count("pool_quarantines", "Times memory was quarantined", None, pool.quarantines)?;
        self.count("pool_registrations", "Pieces of memory registered", None, pool.registrations)?;
        let undone = pool.deregistrations;
        self.count("pool_deregistrations", "Registrations undone", None, undone)
    }

    fn labelled<N, const COUNT: usize>(
        &mut self,
        (name, help, unit, label): (&str, &str, Option<&Unit>, &str),
        values: [(&str, N); COUNT],
    ) -> fmt::Result
    where
        ConstCounter<N>: EncodeMetric,
    {
        let kind = prometheus_client::metrics::MetricType::Counter;
        let mut metric = self.0.encode_descriptor(name, help, unit, kind)?;
        for (value, count) in values {
            ConstCounter::new(count).encode(metric.encode_family(&[(label, value)])?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_ends_in_total_and_every_size_names_its_unit() {
        let figures = Shared::default();
        figures.update(|figures| {
            figures.version = Some(7);
            figures.service.retries.torn = 3;
            figures.pulls.pull = std::time::Duration::from_millis(1500);
        });
        let labels = Labels { side: "target", job: "j".into(), name: "engine".into(), rank: 1 };
        let mut text = String::new();
        encode(&mut text, &registry(labels, figures)).unwrap();
        let of = r#"side="target",job="j",name="engine",rank="1""#;
        for line in [
            format!("refit_version{{{of}}} 7"),
            format!(r#"refit_retries_total{{{of},cause="torn"}} 3"#),
            format!(r#"refit_stage_seconds_total{{{of},stage="wire_transfer"}} 1.5"#),
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in:\n{text}");
        }
        let kinds: Vec<_> = text.lines().filter_map(|it| it.strip_prefix("# TYPE ")).collect();
        assert!(kinds.len() > 20, "{text}");
        for kind in kinds {
            let (name, kind) = kind.split_once(' ').unwrap();
            let name =
                if kind == "counter" { format!("{name}_total{{") } else { format!("{name}{{") };
            assert!(text.lines().any(|it| it.starts_with(&name)), "{name}:\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
