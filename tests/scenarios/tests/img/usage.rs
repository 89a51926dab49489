//! Arguments that make no sense: refused with a line that says what to do, and nothing is touched.

use crate::{Folder, corpus, text};

#[test]
fn the_format_is_never_guessed() {
    let Some(folder) = Folder::new() else { return };
    corpus::raw(&folder);
    let commands: &[&[&str]] = &[
        &["check", "sparse.raw"],
        &["map", "sparse.raw"],
        &["measure", "sparse.raw"],
        &["resize", "sparse.raw", "1M"],
        &["snapshot", "-l", "sparse.raw"],
        &["convert", "sparse.raw", "copy"],
        &["convert", "-n", "--target-image-opts", "-f", "raw", "sparse.raw", "file.filename=dense.raw"],
        &["bitmap", "--add", "sparse.raw", "b"],
        &["map", "--image-opts", "file.filename=sparse.raw"],
    ];
    for args in commands {
        let line = folder.refused(1, args);
        assert!(
            line.contains("not guessed") && (line.contains("-f") || line.contains("driver=")),
            "{args:?}: {line}"
        );
    }
    let line = folder.refused(2, &["compare", "-f", "raw", "sparse.raw", "sparse.raw"]);
    assert!(line.contains("not guessed"), "{line}");
}

#[test]
fn arguments_that_do_not_go_together_are_refused() {
    let Some(folder) = Folder::new() else { return };
    corpus::raw(&folder);
    let cases: &[(&[&str], &str)] = &[
        (&["info", "-f", "raw", "--image-opts", "x"], "mutually exclusive"),
        (&["info", "-f", "nope", "sparse.raw"], "Unknown driver 'nope'"),
        (&["info", "-f", "raw", "nbd://host/x"], "Unknown protocol 'nbd'"),
        (&["convert", "-f", "raw", "sparse.raw"], "file name"),
        (&["convert", "-f", "raw", "-T", "some", "sparse.raw", "copy"], "Invalid source cache option"),
        (&["convert", "-f", "raw", "-S", "3", "sparse.raw", "copy"], "multiples of 512"),
        (&["convert", "-f", "raw", "-m", "99", "sparse.raw", "copy"], "Must be between 1 and 16"),
        (&["convert", "-f", "raw", "-c", "sparse.raw", "copy"], "Compression not supported"),
        (&["convert", "-f", "raw", "--target-is-zero", "sparse.raw", "copy"], "requires use of -n"),
        (&["convert", "-f", "raw", "--target-image-opts", "sparse.raw", "copy"], "requires use of -n"),
        (&["convert", "-f", "raw", "--skip-broken-bitmaps", "sparse.raw", "copy"], "requires --bitmaps"),
        (&["convert", "-f", "raw", "--bitmaps", "sparse.raw", "copy"], "lacks bitmap support"),
        (&["convert", "-f", "raw", "-O", "qcow2", "-B", "dense.raw", "sparse.raw", "copy"], "backing format"),
        (&["convert", "-f", "raw", "-O", "nope", "sparse.raw", "copy"], "Unknown file format 'nope'"),
        (
            &["convert", "-c", "-O", "qcow2", "-o", "preallocation=full", "-f", "raw", "sparse.raw", "copy"],
            "Compression and preallocation",
        ),
        (&["snapshot", "-c", "a", "-d", "b", "-f", "raw", "sparse.raw"], "Cannot mix"),
        (&["bitmap", "-f", "raw", "sparse.raw", "b"], "at least one"),
        (&["bitmap", "--add", "-f", "raw", "sparse.raw"], "bitmap name"),
        (&["bitmap", "--clear", "-g", "64k", "-f", "raw", "sparse.raw", "b"], "--add"),
        (&["measure"], "Either --size"),
        (&["measure", "--size", "1M", "-f", "raw", "sparse.raw"], "cannot be used together"),
        (&["resize", "-f", "raw", "sparse.raw", "1M"], "--shrink"),
        (&["map", "-f", "raw", "--start-offset", "x", "sparse.raw"], "--start-offset"),
        (&["info", "--object", "nonsense,id=x", "-f", "raw", "sparse.raw"], "--object"),
    ];
    for (args, words) in cases {
        let _ = std::fs::remove_file(folder.path().join("copy"));
        let line = folder.refused(1, args);
        // Whether a format compresses is seen when an image of it is open.
        assert!(!folder.path().join("copy").exists() || args.contains(&"-c"), "{args:?}");
        assert!(line.contains(words), "{args:?}: {line}");
        let theirs = folder.run("qemu-img", args);
        assert_eq!(theirs.status.code(), Some(1), "{args:?}: {}", text(&theirs.stdout));
    }
}

#[test]
fn unknown_commands_and_options_have_the_status_of_qemu_img() {
    let Some(folder) = Folder::new() else { return };
    let cases: &[&[&str]] = &[
        &["nope"],
        &["info"],
        &["info", "--nope", "x"],
        &["info", "-f"],
        &["info", "--output=xml", "x"],
        &["info", "a", "b"],
    ];
    for args in cases {
        let (ours, theirs) = (folder.img(args), folder.run("qemu-img", args));
        assert_eq!(ours.status.code(), theirs.status.code(), "{args:?}");
        assert!(!ours.stderr.is_empty() && ours.stdout.is_empty(), "{args:?}");
    }
    for args in
        [&["--help"][..], &["--version"], &["create", "--help"], &["create", "-f", "qcow2", "-o", "help"]]
    {
        let output = folder.img(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{args:?}");
    }
}
