//! Pairs of users on one node of one process, made by commands; in ringblk, in `qemu-storage-daemon` and in QEMU.

use serde_json::{Value, json};

use super::peer::{How, Peer, Program, User, run};

/// A second user, or something done to the node.
enum Second {
    User(User),
    Resize,
    /// A format over the node, as its image file.
    Format,
}

fn user(program: Program, how: How, share: bool) -> User {
    User { name: "", program, how, share }
}

/// What is tried on a node, by program; and whether it is allowed, line by line for each of the users as first.
fn table(program: Program) -> (Vec<(&'static str, Second)>, &'static [&'static str]) {
    let of = |how, share| Second::User(user(program, how, share));
    match program {
        Program::Ringblk => (
            vec![
                ("export", of(How::Write, false)),
                ("export, share-rw", of(How::Write, true)),
                ("reader", of(How::Read, false)),
                ("reader, share-rw", of(How::Read, true)),
                ("overlay", of(How::Overlay, false)),
                ("overlay, share-rw", of(How::Overlay, true)),
                ("block_resize", Second::Resize),
                ("format", Second::Format),
            ],
            &[
                "- - - + - + + -",
                "- + - + - + + -",
                "- - + + + + + -",
                "+ + + + + + + +",
                "- - + + + + - -",
                "+ + + + + + + +",
            ],
        ),
        // Its exports share everything. Not asked to resize a node below an export without a front end: 10.0 ends of it.
        Program::StorageDaemon => (
            vec![
                ("export", of(How::Write, false)),
                ("reader", of(How::Read, false)),
                ("overlay", of(How::Overlay, false)),
                ("format", Second::Format),
            ],
            &["+ + + -", "+ + + +", "+ + + +"],
        ),
        Program::System => (
            vec![
                ("disk", of(How::Write, false)),
                ("disk, share-rw", of(How::Write, true)),
                ("overlay", of(How::Overlay, false)),
                ("block_resize", Second::Resize),
                ("format", Second::Format),
            ],
            &["- - - + -", "- + - + -", "- - + - -"],
        ),
    }
}

/// Tries it; the words of a refusal. What was done is undone.
fn attempt(peer: &mut Peer, node: &str, second: &Second) -> Result<(), String> {
    match second {
        Second::User(user) => {
            let using = peer.use_node(user, node)?;
            peer.release(using);
            Ok(())
        }
        Second::Resize => {
            peer.try_command("block_resize", json!({"node-name": node, "size": 1 << 20})).map(drop)
        }
        Second::Format => {
            peer.try_command("blockdev-add", json!({"driver": "qcow2", "node-name": "over", "file": node}))?;
            peer.command("blockdev-del", json!({"node-name": "over"}));
            Ok(())
        }
    }
}

/// The graph without numbers, for comparing before and after.
fn graph(peer: &mut Peer) -> Value {
    let mut graph = peer.command("query-named-block-nodes", json!({}));
    for node in graph.as_array_mut().unwrap() {
        node.as_object_mut().unwrap().retain(|name, _| ["node-name", "ro", "drv"].contains(&name.as_str()));
    }
    graph
}

#[test]
fn pairs_on_one_node_are_allowed_or_refused_as_the_table_says() {
    for program in [Program::Ringblk, Program::StorageDaemon, Program::System] {
        let Some(mut peer) = Peer::start(program) else { continue };
        let image = peer.folder().join("image");
        let path = image.to_str().unwrap().to_owned();
        // A format's image inside: `blockdev-add` of a format over the node finds one.
        run("qemu-img", &["create", "-q", "-f", "qcow2", &path, "1M"]).unwrap();
        std::fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(1 << 20).unwrap();
        let file = json!({"driver": "file", "filename": path});
        peer.command("blockdev-add", json!({"driver": "raw", "node-name": "n", "file": file}));
        let (seconds, lines) = table(program);
        let mut wrong = Vec::new();
        for ((first, how), line) in seconds.iter().zip(lines) {
            let Second::User(first_user) = how else { continue };
            let using = peer.use_node(first_user, "n").unwrap_or_else(|e| panic!("{program:?} {first}: {e}"));
            let before = graph(&mut peer);
            for ((name, second), cell) in seconds.iter().zip(line.split(' ')) {
                let found = match attempt(&mut peer, "n", second) {
                    Ok(()) => "+",
                    Err(text) => {
                        let conflict = text.contains("onflict") || text.contains("is busy");
                        assert!(
                            conflict,
                            "{program:?}: {name} beside {first} fails for another reason: {text}"
                        );
                        if program == Program::Ringblk {
                            assert!(text.contains("Way out: "), "{text}");
                        }
                        "-"
                    }
                };
                assert_eq!(graph(&mut peer), before, "{program:?}: {name} beside {first} left something");
                if found != cell {
                    wrong.push(format!("{program:?}: {name} beside {first}: {found}"));
                }
            }
            peer.release(using);
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}
