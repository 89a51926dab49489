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

#[test]
fn the_reference_is_fresh() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/qmp.md");
    let generated = all().reference_markdown();
    if std::env::var_os("RINGBLK_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    assert!(committed == generated, "docs/reference/qmp.md is stale: run the tests with RINGBLK_BLESS=1");
}
