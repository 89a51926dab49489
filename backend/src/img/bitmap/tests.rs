//! Tests of bitmap.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use clap::CommandFactory;

use super::super::cli::Cli;
use super::{Action, in_order};

fn actions(text: &str) -> Vec<Action> {
    let args = ["ringblk img", "bitmap"].into_iter().chain(text.split(' ')).chain(["x", "b"]);
    let matches = Cli::command().try_get_matches_from(args).unwrap();
    in_order(matches.subcommand().unwrap().1)
}

#[test]
fn actions_keep_their_order() {
    assert_eq!(actions("--add"), [Action::Add]);
    assert_eq!(actions("--remove --add"), [Action::Remove, Action::Add]);
    let expected =
        [Action::Merge("p".to_owned()), Action::Disable, Action::Merge("q".to_owned()), Action::Enable];
    assert_eq!(actions("--merge p --disable --merge q --enable"), expected);
    assert_eq!(actions("-f qcow2"), []);
}
