//! Draws a chart: horizontal bars, grouped by pair of sizes, a panel for each model.
//!
//! Readable on light and on dark pages: the colours follow the page.

use std::fmt::Write as _;

use super::read::{Bar, Chart, Group, Kind, Panel, Series};

const WIDTH: f64 = 900.0;
const MARGIN: f64 = 24.0;
/// Where bars start: right of the names of the pairs.
const LEFT: f64 = 130.0;
/// The longest bar; the rest is for the number behind it.
const LONGEST: f64 = 590.0;
const BAR: f64 = 15.0;
const BAR_GAP: f64 = 3.0;
const GROUP_GAP: f64 = 16.0;
/// Legend entries in a row.
const COLUMNS: usize = 3;
const LEGEND_ROW: f64 = 20.0;

/// What has a colour, and which on light pages and on dark ones. Bars of one transport are shades of one colour.
const COLOURS: [(&str, &str, &str, &str); 16] = [
    (".page", "fill", "#ffffff", "#0d1117"),
    ("text", "fill", "#1f2328", "#e6edf3"),
    ("text.soft,text.tick", "fill", "#59636e", "#9198a1"),
    (".grid", "stroke", "#e1e5ea", "#262c36"),
    (".refit0", "fill", "#1f5fbf", "#6ea8ff"),
    (".pull0", "fill", "#7fa9e6", "#3a68ad"),
    (".refit1", "fill", "#0f766b", "#45c4b0"),
    (".pull1", "fill", "#6fbcb1", "#23776b"),
    (".refit2", "fill", "#6b3fb5", "#b593f5"),
    (".pull2", "fill", "#ab91dc", "#684b9e"),
    (".ceiling", "fill", "#b4bbc4", "#565f6b"),
    (".peer0", "fill", "#c2570c", "#f0883e"),
    (".peer1", "fill", "#b3316d", "#f277ad"),
    (".peer2", "fill", "#8a6a00", "#d6ad3c"),
    (".peer3", "fill", "#5c6b1f", "#a9bd55"),
    (".peer4", "fill", "#7d4c3a", "#c99580"),
];
const TRANSPORT_COLOURS: usize = 3;
const PEER_COLOURS: usize = 5;

/// The picture, as the text of an SVG file.
pub(super) fn draw(chart: &Chart) -> String {
    let mut body = Body::default();
    let title = "Weights refitted, GB/s of all engine ranks together";
    body.y = MARGIN + 16.0;
    body.text(MARGIN, "title", "start", title);
    for machine in &chart.machines {
        body.y += 20.0;
        body.text(MARGIN, "soft", "start", machine);
    }
    body.y += 14.0;
    body.legend(&chart.series);
    for panel in &chart.panels {
        body.panel(panel, &chart.series);
    }
    body.y += MARGIN - 8.0;
    let height = body.y;

    let mut svg = String::new();
    push(
        &mut svg,
        format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
             viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-labelledby=\"title desc\">\n"
        ),
    );
    let models: Vec<_> = chart.panels.iter().map(|panel| panel.model.as_str()).collect();
    let title = format!("{title}: {}", models.join(", "));
    push(&mut svg, format_args!("<title id=\"title\">{}</title>\n", Escaped(&title)));
    let files = chart.files.join(", ");
    push(&mut svg, format_args!("<desc id=\"desc\">{DRAWN_FROM}{}</desc>\n", Escaped(&files)));
    style(&mut svg);
    push(&mut svg, format_args!("<rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\"/>\n"));
    svg.push_str(&body.svg);
    svg.push_str("</svg>\n");
    svg
}

/// What stands before the names of the files, so that a picture can be drawn again.
pub(super) const DRAWN_FROM: &str = "Drawn by `refit chart` from ";

/// Plain rules, for both kinds of page: programs that turn pictures into other pictures know no variables.
fn style(svg: &mut String) {
    svg.push_str("<style>\ntext{font:13px system-ui,-apple-system,\"Segoe UI\",sans-serif}\n");
    svg.push_str("text.title{font-size:17px;font-weight:600}\n");
    svg.push_str("text.model{font-size:15px;font-weight:600}\n");
    svg.push_str("text.pair{font-weight:600}\n");
    svg.push_str("text.number{font-size:12px;font-variant-numeric:tabular-nums}\n");
    svg.push_str("text.tick{font-size:11px}\n");
    for (selector, property, light, _) in COLOURS {
        push(svg, format_args!("{selector}{{{property}:{light}}}\n"));
    }
    svg.push_str("@media(prefers-color-scheme:dark){\n");
    for (selector, property, _, dark) in COLOURS {
        push(svg, format_args!("{selector}{{{property}:{dark}}}\n"));
    }
    svg.push_str("}\n</style>\n");
}

/// What has been drawn so far, and how far down.
#[derive(Debug, Default)]
struct Body {
    svg: String,
    y: f64,
}

impl Body {
    /// A line of text on the baseline `y`.
    fn text(&mut self, x: f64, class: &str, anchor: &str, text: &str) {
        let y = self.y;
        push(
            &mut self.svg,
            format_args!(
                "<text class=\"{class}\" x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{}</text>\n",
                Escaped(text)
            ),
        );
    }

    fn legend(&mut self, series: &[Series]) {
        // A row for each transport, then the others.
        let mut series: Vec<&Series> = series.iter().collect();
        series.sort_by_key(|series| is_peer(series.kind));
        #[allow(clippy::cast_precision_loss, reason = "a handful of columns")]
        let column = (WIDTH - 2.0 * MARGIN) / COLUMNS as f64;
        for row in series.chunks(COLUMNS) {
            let mut x = MARGIN;
            self.y += LEGEND_ROW;
            for series in row {
                let (class, top) = (class(series.kind), self.y - 11.0);
                push(
                    &mut self.svg,
                    format_args!(
                        "<rect class=\"{class}\" x=\"{x}\" y=\"{top}\" width=\"13\" height=\"13\" rx=\"2\"/>\n"
                    ),
                );
                self.text(x + 20.0, "legend", "start", &series.label);
                x += column;
            }
        }
    }

    fn panel(&mut self, panel: &Panel, series: &[Series]) {
        self.y += 40.0;
        self.text(MARGIN, "model", "start", &panel.model);
        for note in &panel.notes {
            self.y += 18.0;
            self.text(MARGIN, "soft", "start", note);
        }
        self.y += 22.0;

        let rates = panel.groups.iter().flat_map(|group| &group.bars).map(|bar| bar.gbps);
        let axis = Axis::new(rates.fold(0.0, f64::max));
        for tick in axis.ticks() {
            self.text(axis.place(tick), "tick", "middle", &axis.label(tick));
        }
        self.text(LEFT - 12.0, "tick", "end", "GB/s");
        self.y += 8.0;
        let top = self.y;
        // Lines first: bars lie over them.
        let bottom = panel.groups.iter().fold(top, |y, group| y + height_of(group));
        for tick in axis.ticks() {
            let x = axis.place(tick);
            push(
                &mut self.svg,
                format_args!(
                    "<line class=\"grid\" x1=\"{x}\" x2=\"{x}\" y1=\"{top}\" y2=\"{bottom}\"/>\n"
                ),
            );
        }
        for group in &panel.groups {
            self.group(group, series, &axis);
        }
    }

    fn group(&mut self, group: &Group, series: &[Series], axis: &Axis) {
        let top = self.y + GROUP_GAP / 2.0;
        self.y = top + BAR - 3.0;
        let pair = format!("{} → {}", group.source, group.target);
        self.text(LEFT - 12.0, "pair", "end", &pair);
        let mut y = top;
        let mut bars: Vec<&Bar> = group.bars.iter().collect();
        bars.sort_by_key(|bar| is_peer(series[bar.series].kind));
        for bar in bars {
            self.bar(bar, &series[bar.series], &pair, y, axis);
            y += BAR + BAR_GAP;
        }
        self.y = top - GROUP_GAP / 2.0 + height_of(group);
    }

    fn bar(&mut self, bar: &Bar, series: &Series, pair: &str, y: f64, axis: &Axis) {
        let (class, end) = (class(series.kind), axis.place(bar.gbps));
        // Rounded to what can be seen, so that the picture does not change with the last bit of a number.
        let width = tenths(end - LEFT).max(0.5);
        let number = number(bar.gbps);
        push(
            &mut self.svg,
            format_args!(
                "<rect class=\"{class}\" x=\"{LEFT}\" y=\"{y}\" width=\"{width}\" height=\"{BAR}\" rx=\"2\">\
                 <title>{}: {}, {number} GB/s</title></rect>\n",
                Escaped(pair),
                Escaped(&series.label)
            ),
        );
        let text = match bar.of_ceiling {
            Some(ratio) => format!("{number}  ({ratio:.2} of its ceiling)"),
            None => match bar.at_home {
                Some(share) => format!("{number}  ({:.0}% within one GPU)", share * 100.0),
                None => number,
            },
        };
        self.y = y + BAR - 3.0;
        self.text(tenths(end + 6.0), "number", "start", &text);
    }
}

/// What a group of bars takes, the space around it included.
fn height_of(group: &Group) -> f64 {
    let bars: f64 = group.bars.iter().map(|_| BAR + BAR_GAP).sum();
    bars - BAR_GAP + GROUP_GAP
}

/// From rates to places.
struct Axis {
    most: f64,
    step: f64,
}

impl Axis {
    /// Ticks at 1, 2 or 5 times a power of ten, about six of them.
    fn new(most: f64) -> Self {
        let most = most.max(1e-3);
        let power = 10_f64.powf((most / 6.0).log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
        let step = steps.into_iter().find(|step| most / step <= 6.0).unwrap_or(most);
        Self { most, step }
    }

    fn place(&self, gbps: f64) -> f64 {
        tenths(LEFT + gbps / self.most * LONGEST)
    }

    /// A tick as a number, with the digits that its step has.
    fn label(&self, tick: f64) -> String {
        let digits = [1.0, 0.1, 0.01, 0.001].iter().position(|&unit| self.step >= unit * 0.999);
        format!("{tick:.*}", digits.unwrap_or(4))
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        (0..=6_u8).map(|tick| f64::from(tick) * self.step).filter(|&tick| tick <= self.most)
    }
}

fn tenths(x: f64) -> f64 {
    (x * 10.0).round() / 10.0
}

/// Three digits, for people: 376, 37.6, 3.76.
fn number(gbps: f64) -> String {
    match gbps {
        0.0 => "0".to_owned(),
        large if large >= 99.95 => format!("{large:.0}"),
        middle if middle >= 9.995 => format!("{middle:.1}"),
        small => format!("{small:.2}"),
    }
}

fn is_peer(kind: Kind) -> bool {
    matches!(kind, Kind::Peer(_))
}

fn class(kind: Kind) -> String {
    match kind {
        Kind::Refit(transport) => format!("refit{}", transport % TRANSPORT_COLOURS),
        Kind::Pull(transport) => format!("pull{}", transport % TRANSPORT_COLOURS),
        Kind::Ceiling(_) => "ceiling".to_owned(),
        Kind::Peer(method) => format!("peer{}", method % PEER_COLOURS),
    }
}

/// Text from files, as XML takes it.
struct Escaped<'a>(&'a str);

impl std::fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                // Not allowed in XML, however written.
                c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => f.write_char(' ')?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

fn push(svg: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = svg.write_fmt(text);
}

#[cfg(test)]
mod tests {
    use super::super::read::tests::{bench, peers};
    use super::*;

    fn chart(files: &[String]) -> Chart {
        let mut chart = Chart::default();
        for file in files {
            chart.add("a&b.json", file).unwrap();
        }
        chart
    }

    #[test]
    fn every_rate_is_drawn_with_its_number() {
        let files = [
            bench("m", "peer", &[20.0]),
            peers("m", &[("nccl_p2p", 5.5)]),
            bench("n", "nixl", &[3.0]),
        ];
        let svg = draw(&chart(&files));
        for number in
            ["20.0  (0.50 of its ceiling)", "21.0  (0.53", ">40.0<", ">5.50<", ">3.00  (0.07"]
        {
            assert!(svg.contains(number), "{number}");
        }
        let bars = svg.lines().filter(|line| line.contains("<title>TP2 → TP1:")).count();
        assert_eq!(bars, 7);
        assert!(svg.contains("NCCL exact send and receive"));
        assert!(svg.contains("prefers-color-scheme:dark"));
        assert_eq!(svg, draw(&chart(&files)));
    }

    #[test]
    fn text_of_files_cannot_break_out() {
        let svg = draw(&chart(&[bench("</text><script>\u{1}", "peer", &[20.0])]));
        assert!(!svg.contains("<script>"));
        assert!(!svg.contains('\u{1}'));
        assert!(svg.contains("a &lt;processor&gt;, 2 cores"));
        assert!(svg.contains("a&amp;b.json"));
    }

    #[test]
    fn bars_are_as_long_as_their_rates() {
        let axis = Axis::new(400.0);
        assert_eq!(axis.place(0.0), LEFT);
        assert_eq!(axis.place(200.0), LEFT + LONGEST / 2.0);
        assert_eq!(axis.ticks().collect::<Vec<_>>(), [0.0, 100.0, 200.0, 300.0, 400.0]);
        let labels = |most| {
            let axis = Axis::new(most);
            axis.ticks().map(|tick| axis.label(tick)).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(labels(25.4), "0 5 10 15 20 25");
        assert_eq!(labels(0.45), "0.0 0.1 0.2 0.3 0.4");
        assert_eq!(labels(0.25), "0.00 0.05 0.10 0.15 0.20 0.25");
        for most in [0.0, 1e-9, 0.7, 1.0, 6.0, 7.0, 59.0, 61.0, 820.0, 1e7] {
            let count = Axis::new(most).ticks().count();
            assert!((1..=7).contains(&count), "{most}: {count} ticks");
        }
    }

    #[test]
    fn numbers_have_three_digits() {
        for (gbps, text) in [
            (0.0, "0"),
            (0.456, "0.46"),
            (9.994, "9.99"),
            (9.996, "10.0"),
            (99.94, "99.9"),
            (376.4, "376"),
        ] {
            assert_eq!(number(gbps), text);
        }
    }
}
