//! The front end against a device in this process that does nothing: its own limit.
//!
//! Called by people who doubt that a figure is the backend's. The device runs on its own thread and processor.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use client::loopback::Loopback;
use client::session::Guest;

use crate::drive::{self, Load};
use crate::{Result, host, say};

/// Command line of `selftest`.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    /// Processor of the front end.
    #[arg(long, default_value_t = 0)]
    front_cpu: usize,
    /// Processor of the device.
    #[arg(long, default_value_t = 1)]
    back_cpu: usize,
    #[command(flatten)]
    load: Load,
}

/// The `selftest` command.
pub fn main(arguments: &Arguments) -> Result<()> {
    let load = &arguments.load;
    let mut guest = Guest::new(&drive::layout(load))?;
    for queue in &mut guest.queues {
        queue.set_event_idx(!load.no_event_idx);
    }
    let mut devices = guest
        .queues
        .iter()
        .map(|queue| Loopback::new(&guest.memory, queue))
        .collect::<client::Result<Vec<_>>>()?;
    let mut queues = drive::prepare(&mut guest, load)?;
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    let cpu = arguments.back_cpu;
    let device = std::thread::spawn(move || {
        let pinned = host::pin(&[cpu]).map_err(|error| error.to_string());
        while !seen.load(Ordering::Relaxed) {
            for device in &mut devices {
                if device.poll() == 0 {
                    std::hint::spin_loop();
                }
            }
        }
        pinned
    });
    host::pin(&[arguments.front_cpu])?;
    let outcome = drive::drive(&mut queues, load, 1 << 30, None);
    stop.store(true, Ordering::Relaxed);
    device.join().map_err(|_| "the device thread ended early")??;
    let outcome = outcome?;
    let [p50, _, p99, ..] = outcome.latency_ns;
    // Little's law on the median: what the pair does while neither side is off its processor.
    let in_flight = f64::from(load.depth) * f64::from(load.queues);
    say(format!(
        "{:.2} M requests/s over the window, {:.2} M while undisturbed (p50 {p50:.0} ns, p99 {p99:.0} ns)",
        outcome.iops() / 1e6,
        in_flight / p50 * 1e3,
    ));
    drive::check(&outcome)
}
