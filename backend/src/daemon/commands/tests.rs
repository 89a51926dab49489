//! The table as a whole: its schema is sound, and the committed reference is the one it generates.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use super::*;

fn all() -> Rc<CommandTable<State>> {
    table(&graph::Registry::new(drivers::ALL.iter().copied()))
}

#[test]
fn the_schema_has_no_problems() {
    assert_eq!(all().schema().problems(), &[] as &[String]);
}

/// Compares a page of the reference with what is generated now; `RINGBLK_BLESS=1` writes it.
fn assert_fresh(page: &str, generated: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference").join(page);
    if std::env::var_os("RINGBLK_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    assert!(committed == generated, "docs/reference/{page} is stale: run the tests with RINGBLK_BLESS=1");
}

#[test]
fn the_reference_is_fresh() {
    assert_fresh("qmp.md", &all().reference_markdown());
}

#[test]
fn the_command_line_reference_is_fresh() {
    let mut page = String::from(
        "# Command line\n\nGenerated from the program's own help; do not edit. Options of nodes, exports and objects are those \
         of the commands in [qmp.md](qmp.md), as dotted keys or as JSON.\n",
    );
    let mut section = |title: &str, text: &str| {
        page.push_str(&format!("\n## `{title}`\n\n```text\n{}\n```\n", text.trim_end()));
    };
    section("ringblk --help", &crate::process::cli::options::help_text());
    let topics = drivers::ALL
        .iter()
        .map(|d| ("blockdev", d.name))
        .chain([("export", "vhost-user-blk"), ("object", "iothread")]);
    for (option, subject) in topics {
        let topic = crate::process::cli::HelpTopic { option, subject: Some(subject.to_owned()) };
        let text = crate::daemon::help::text(&topic).unwrap();
        section(&format!("ringblk --{option} {subject},help"), &text);
    }
    assert_fresh("command-line.md", &page);
}
