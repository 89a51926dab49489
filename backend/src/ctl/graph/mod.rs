//! `ringblk ctl graph`: the running graph as text, for graphviz, or as a drawing.
//!
//! Called by [`super::main`]. What is drawn is a [`model::Picture`]; where it comes from is `fetch`'s business.
//!
//! | file | subject |
//! |---|---|
//! | `model` | nodes, users, edges, rates |
//! | `fetch` | asking for them: `query-block-graph`, or what QEMU has |
//! | `text`, `dot`, `svg` | drawing |
//! | `layout` | which box stands where |

pub mod dot;
pub mod fetch;
pub mod layout;
pub mod model;
pub mod svg;
pub mod text;

use std::io::IsTerminal as _;
use std::time::Duration;

use super::cli::GraphArgs;
use super::client::Client;
use super::failure::Outcome;
use super::output;
use model::Picture;

/// Time between the two samples of one drawing, seconds.
const ONCE: f64 = 0.2;
/// Time between drawings, seconds.
const WATCH: f64 = 1.0;
/// Back to the top left, and away with what is below.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Draws.
///
/// # Errors
/// The daemon does not say, or nobody reads.
pub fn run(client: &mut Client, args: &GraphArgs, json: bool) -> Outcome {
    let interval = args.interval.unwrap_or(if args.watch { WATCH } else { ONCE });
    let mut before = fetch::picture(client)?;
    loop {
        let picture = if interval > 0.0 {
            std::thread::sleep(Duration::from_secs_f64(interval));
            let mut now = fetch::picture(client)?;
            now.rate(&before);
            before.clone_from(&now);
            now
        } else {
            before.clone()
        };
        let drawing = draw(&picture, args, json);
        match args.watch && std::io::stdout().is_terminal() {
            true => output::bytes(format!("{CLEAR}{drawing}").as_bytes())?,
            false => output::bytes(drawing.as_bytes())?,
        }
        if !args.watch {
            return Ok(());
        }
        if interval <= 0.0 {
            // Not as fast as it can.
            std::thread::sleep(Duration::from_secs_f64(WATCH));
            before = fetch::picture(client)?;
        }
    }
}

fn draw(picture: &Picture, args: &GraphArgs, json: bool) -> String {
    if args.svg {
        svg::draw(picture)
    } else if args.dot {
        dot::draw(picture)
    } else if json {
        format!("{}\n", picture.json())
    } else {
        text::draw(picture)
    }
}
