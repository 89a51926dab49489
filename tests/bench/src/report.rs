//! Figures of a comparison as tables: medians with their spread, and ratios taken round by round.
//!
//! Called by `compare` and `probe`. It computes and formats; it measures nothing.

use std::fmt::Write;

use crate::workload::{Against, Bound, Figure, Target, Workload};

/// Median, least and most of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Median (mean of the middle two for an even count).
    pub median: f64,
    /// Least.
    pub min: f64,
    /// Most.
    pub max: f64,
}

impl Spread {
    /// Of these values; `None` of none.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let upper = sorted.get(sorted.len() / 2)?;
        let lower = sorted.get((sorted.len() - 1) / 2)?;
        Some(Self { median: f64::midpoint(*lower, *upper), min, max })
    }
}

/// Who ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contestant {
    /// qemu-storage-daemon.
    Qsd,
    /// ringblk as the workload says.
    Ringblk,
    /// ringblk with one queue, as its own reference.
    RingblkOneQueue,
    /// ringblk on the raw file, as the reference of its formats.
    RingblkRaw,
    /// The fio job with this position in the workload.
    Fio(usize),
}

/// One run's figures. Latencies in nanoseconds; fio runs report none.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Requests per second.
    pub iops: f64,
    /// Median latency.
    pub p50: Option<f64>,
    /// 99th percentile.
    pub p99: Option<f64>,
    /// Processor time per request.
    pub cpu_ns: f64,
    /// Requests per second as they would be on a quiet machine. For a backend Little's law on the median latency,
    /// which pauses of either side hardly move; for fio on cached data what a fully used processor does.
    pub undisturbed: Option<f64>,
    /// Shares of the time that front end and backend were runnable without a processor.
    pub waited: Option<(f64, f64)>,
}

impl Sample {
    fn figure(&self, figure: Figure) -> Option<f64> {
        match figure {
            Figure::Iops => Some(self.iops),
            Figure::Undisturbed => self.undisturbed,
            Figure::P50 => self.p50,
            Figure::Cpu => Some(self.cpu_ns),
        }
    }
}

/// All runs of one workload: `samples[i][round]` belongs to `contestants[i]`; `None` = that run failed.
#[derive(Clone, Debug)]
pub struct Results {
    /// Which workload.
    pub workload: Workload,
    /// Who took part.
    pub contestants: Vec<Contestant>,
    /// Their figures by round.
    pub samples: Vec<Vec<Option<Sample>>>,
}

impl Results {
    /// Name of a contestant in tables.
    pub fn name(&self, contestant: Contestant) -> String {
        match contestant {
            Contestant::Qsd => "qemu-storage-daemon".into(),
            Contestant::Ringblk if self.workload.queues > 1 => {
                format!("ringblk, {} iothreads", self.workload.queues)
            }
            Contestant::Ringblk => "ringblk".into(),
            Contestant::RingblkOneQueue => "ringblk, one queue".into(),
            Contestant::RingblkRaw => "ringblk, raw".into(),
            Contestant::Fio(job) => self.workload.fio.get(job).map_or("fio", |job| job.name()).into(),
        }
    }

    fn of(&self, contestant: Contestant) -> &[Option<Sample>] {
        let at = self.contestants.iter().position(|&other| other == contestant);
        at.and_then(|at| self.samples.get(at)).map_or(&[], Vec::as_slice)
    }

    /// The reference of one round.
    fn reference(&self, against: Against, figure: Figure, round: usize) -> Option<f64> {
        let one = |contestant| {
            self.of(contestant).get(round).copied().flatten().and_then(|sample: Sample| sample.figure(figure))
        };
        match against {
            Against::Absolute => Some(1.0),
            Against::Qsd => one(Contestant::Qsd),
            Against::OneQueue => one(Contestant::RingblkOneQueue),
            Against::OwnRaw => one(Contestant::RingblkRaw),
            Against::BestFio => {
                let all = (0..self.workload.fio.len()).filter_map(|job| one(Contestant::Fio(job)));
                match figure {
                    Figure::Iops | Figure::Undisturbed => all.max_by(f64::total_cmp),
                    Figure::P50 | Figure::Cpu => all.min_by(f64::total_cmp),
                }
            }
        }
    }

    /// Medians of the shares of time without a processor, in percent.
    fn waited(&self, contestant: Contestant) -> String {
        let shares: Vec<(f64, f64)> =
            self.of(contestant).iter().flatten().filter_map(|sample| sample.waited).collect();
        let (front, back): (Vec<f64>, Vec<f64>) = shares.into_iter().unzip();
        match (Spread::of(&front), Spread::of(&back)) {
            (Some(front), Some(back)) => {
                format!("{:.0}, {:.0}", front.median * 100.0, back.median * 100.0)
            }
            _ => "–".into(),
        }
    }

    /// ringblk's figure over the reference's, round by round.
    fn ratios(&self, figure: Figure, against: Against) -> Vec<f64> {
        self.of(Contestant::Ringblk)
            .iter()
            .enumerate()
            .filter_map(|(round, sample)| {
                let ours = (*sample)?.figure(figure)?;
                Some(ours / self.reference(against, figure, round)?)
            })
            .collect()
    }

    /// The comparisons worth a row: everything promised, and whatever else can be compared.
    fn comparisons(&self) -> Vec<(Figure, Against, Option<Target>)> {
        let mut rows: Vec<_> = self
            .workload
            .targets
            .iter()
            .map(|target| (target.figure, target.against, Some(*target)))
            .collect();
        for against in [Against::Qsd, Against::BestFio, Against::OneQueue, Against::OwnRaw] {
            for figure in [Figure::Iops, Figure::Undisturbed, Figure::P50, Figure::Cpu] {
                let known = rows.iter().any(|row| (row.0, row.1) == (figure, against));
                if !known && !self.ratios(figure, against).is_empty() {
                    rows.push((figure, against, None));
                }
            }
        }
        rows
    }

    /// Both tables of this workload in Markdown.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        // Writing to a String does not fail.
        let _ = writeln!(out, "### {} (`{}`)\n", self.workload.title, self.workload.name);
        let _ = writeln!(
            out,
            "| | requests/s | undisturbed | p50 µs | p99 µs | CPU ns per request | waited %: front, back |\n\
             |---|---|---|---|---|---|---|"
        );
        for &contestant in &self.contestants {
            let column = |pick: &dyn Fn(&Sample) -> Option<f64>, scale: f64, digits: usize| {
                let values: Vec<f64> = self
                    .of(contestant)
                    .iter()
                    .flatten()
                    .filter_map(pick)
                    .map(|value| value / scale)
                    .collect();
                Spread::of(&values).map_or("–".into(), |spread| {
                    format!("{:.digits$} ({:.digits$}..{:.digits$})", spread.median, spread.min, spread.max)
                })
            };
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} | {} |",
                self.name(contestant),
                column(&|sample| Some(sample.iops), 1.0, 0),
                column(&|sample| sample.undisturbed, 1.0, 0),
                column(&|sample| sample.p50, 1000.0, 2),
                column(&|sample| sample.p99, 1000.0, 2),
                column(&|sample| Some(sample.cpu_ns), 1.0, 0),
                self.waited(contestant),
            );
        }
        let rows = self.comparisons();
        if rows.is_empty() {
            return out;
        }
        let _ = writeln!(out, "\n| ringblk | median (per-round min..max) | target | |\n|---|---|---|---|");
        for (figure, against, target) in rows {
            let spread = Spread::of(&self.ratios(figure, against));
            let digits = if against == Against::Absolute { 0 } else { 2 };
            let value = spread.map_or("not measured".into(), |spread| {
                format!("{:.digits$} ({:.digits$}..{:.digits$})", spread.median, spread.min, spread.max)
            });
            let (bound, verdict) = match target {
                None => (String::new(), ""),
                Some(target) => (describe(target.bound), verdict(target.bound, spread)),
            };
            let _ = writeln!(out, "| {} | {value} | {bound} | {verdict} |", title(figure, against));
        }
        out
    }
}

fn title(figure: Figure, against: Against) -> String {
    let figure = match figure {
        Figure::Iops => "requests/s",
        Figure::Undisturbed => "undisturbed requests/s",
        Figure::P50 => "p50",
        Figure::Cpu => "CPU per request",
    };
    match against {
        Against::Qsd => format!("{figure} / qemu-storage-daemon"),
        Against::BestFio => format!("{figure} / best host fio"),
        Against::OneQueue => format!("{figure} / own one queue"),
        Against::OwnRaw => format!("{figure} / own raw"),
        Against::Absolute => format!("{figure}, ns"),
    }
}

fn describe(bound: Bound) -> String {
    match bound {
        Bound::AtLeast(value) => format!("≥ {value}"),
        Bound::AtMost(value) => format!("≤ {value}"),
    }
}

fn verdict(bound: Bound, spread: Option<Spread>) -> &'static str {
    match (bound, spread) {
        (_, None) => "",
        (Bound::AtLeast(value), Some(spread)) if spread.median >= value => "met",
        (Bound::AtMost(value), Some(spread)) if spread.median <= value => "met",
        _ => "missed",
    }
}

#[cfg(test)]
mod tests;
