//! The commands of the control channel, by family. Each is a few lines between its argument struct and the subject that
//! does the work. The command line applies its options through the same table.

mod bitmap;
mod block;
mod export;
pub mod jobs;
mod object;
mod picture;
mod snapshot;
mod surgery;
mod transaction;
mod warm;

use std::rc::Rc;

use qmp::{CommandTable, Commands, Version};

use super::Daemon;

/// What every command works on.
pub type State = Rc<Daemon>;

/// All commands, for these drivers.
pub fn table(registry: &graph::Registry) -> Rc<CommandTable<State>> {
    let mut commands = Commands::new(Version::default(), |daemon: &State| daemon.request_quit());
    block::register(&mut commands, registry);
    export::register(&mut commands);
    object::register(&mut commands);
    jobs::register(&mut commands, registry);
    bitmap::register(&mut commands);
    snapshot::register(&mut commands);
    picture::register(&mut commands);
    surgery::register(&mut commands, registry);
    transaction::register(&mut commands);
    warm::register(&mut commands);
    commands.finish()
}

#[cfg(test)]
mod tests;
