//! Tests of the command line.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use clap::CommandFactory;

use super::cli::Cli;

/// What has to be said besides the arguments.
const HEAD: &str = "# ringblk img

Generated from the program's own help; do not edit. Images are opened in one process with the drivers of the daemon; arguments, \
output and exit status are those of qemu-img 10, and JSON has the same members.

What differs on purpose:

* **The format is never guessed.** Every image that is opened needs its format: `-f FORMAT`, or `driver=` with \
`--image-opts`. Only `info` looks at the first bytes of a local file when no format is given, and does nothing with the \
answer but report it. A guest can write what it likes to the beginning of a raw disk.
* `info` opens nothing but the image itself: no backing file, no data file, no key is needed. `--backing-chain` opens the \
images below one after the other, in the formats their names are stored with.
* Messages on stderr begin with `ringblk img:` and are one line; some say more than qemu-img's.
* `create` looks at all options before it says that it is formatting, and removes a new file again if it fails.
* `map`, `measure` and `compare` always look for holes in the file inside of allocated clusters; qemu-img does so for images \
that it takes for preallocated. `map` tells no place for clusters that were zeroed and keep theirs.
* `compare -s` tells places apart that have data, zeroes or nothing of their own; flags of the host file play no part.
* `convert` never offloads the copy to the host (`-C` is accepted), and new raw files have no block set aside at their \
beginning. With `--salvage`, what could not be read is listed range by range on stderr.
* `bitmap --list` is ours.
* `amend`, `bench`, `commit`, `dd` and `rebase` do not exist here.
* With `-p` on a terminal there is a bar; elsewhere qemu-img's percentages.
";

#[test]
fn the_arguments_are_sound() {
    Cli::command().debug_assert();
}

#[test]
fn the_reference_is_fresh() {
    let mut page = HEAD.to_owned();
    let mut command = Cli::command();
    command.build();
    let mut section = |title: &str, text: &str| {
        // Empty lines carry blanks.
        let lines: Vec<_> = text.trim_end().lines().map(str::trim_end).collect();
        page.push_str(&format!("\n## `{title}`\n\n```text\n{}\n```\n", lines.join("\n")));
    };
    section("ringblk img --help", &command.render_long_help().to_string());
    for sub in command.get_subcommands_mut() {
        section(&format!("ringblk img {} --help", sub.get_name()), &sub.render_long_help().to_string());
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/img.md");
    if std::env::var_os("RINGBLK_BLESS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    assert!(committed == page, "docs/reference/img.md is stale: run the tests with RINGBLK_BLESS=1");
}
