//! Every pair of programs on one image: whoever is there first, whoever comes second.

use std::path::Path;

use super::peer::{How, Peer, Program, User, run};
use ringblk_scenarios::rig;

const fn user(name: &'static str, program: Program, how: How, share: bool) -> User {
    User { name, program, how, share }
}

/// The users, in the order of the tables.
const USERS: [User; 12] = [
    user("ringblk export", Program::Ringblk, How::Write, false),
    user("ringblk export, share-rw", Program::Ringblk, How::Write, true),
    user("ringblk reader", Program::Ringblk, How::Read, false),
    user("ringblk reader, share-rw", Program::Ringblk, How::Read, true),
    user("ringblk overlay", Program::Ringblk, How::Overlay, false),
    user("ringblk overlay, share-rw", Program::Ringblk, How::Overlay, true),
    user("QSD export", Program::StorageDaemon, How::Write, false),
    user("QSD reader", Program::StorageDaemon, How::Read, false),
    user("QSD overlay", Program::StorageDaemon, How::Overlay, false),
    user("QEMU disk", Program::System, How::Write, false),
    user("QEMU disk, share-rw", Program::System, How::Write, true),
    user("QEMU disk, read-only", Program::System, How::Read, false),
];

/// Tools, by the words of the table: program and arguments, `IMAGE`, `FORMAT`, `OVERLAY` (on the image) and `OUT` filled in.
const TOOLS: [(&str, &str); 14] = [
    ("qemu-img info", "qemu-img info -f FORMAT IMAGE"),
    ("qemu-img info -U", "qemu-img info -U -f FORMAT IMAGE"),
    ("qemu-img check", "qemu-img check -f FORMAT IMAGE"),
    ("qemu-img convert", "qemu-img convert -f FORMAT -O raw IMAGE OUT"),
    ("qemu-img convert -U", "qemu-img convert -U -f FORMAT -O raw IMAGE OUT"),
    ("qemu-img resize", "qemu-img resize -f FORMAT IMAGE 1M"),
    ("qemu-img commit into it", "qemu-img commit -f qcow2 OVERLAY"),
    ("qemu-io, reading", "qemu-io -r -f FORMAT -c read IMAGE"),
    ("qemu-io, writing", "qemu-io -f FORMAT -c write IMAGE"),
    ("ringblk img info", "ringblk img info -f FORMAT IMAGE"),
    ("ringblk img info -U", "ringblk img info -U -f FORMAT IMAGE"),
    ("ringblk img check", "ringblk img check -f FORMAT IMAGE"),
    ("ringblk img convert", "ringblk img convert -f FORMAT -O raw IMAGE OUT"),
    ("ringblk img resize", "ringblk img resize -f FORMAT IMAGE 1M"),
];

/// `+` allowed, `-` refused, `.` not for this format: the users as second, then the tools, for each user as first.
const RAW: [&str; 12] = [
    "- - - + - + - + + - - -  + + . - + - - + - + + . - -",
    "- + - + - + + + + - + -  + + . - + + + + + + + . - +",
    "- - + + + + - + + - - +  + + . + + - - + - + + . + -",
    "+ + + + + + + + + + + +  + + . + + + + + + + + . + +",
    "- - + + + + - + + - - +  + + . + + - - + - + + . + -",
    "+ + + + + + + + + + + +  + + . + + + + + + + + . + +",
    "- + - + - + + + + - + -  + + . - + + + + + + + . - +",
    "+ + + + + + + + + + + +  + + . + + + + + + + + . + +",
    "+ + + + + + + + + + + +  + + . + + + + + + + + . + +",
    "- - - + - + - + + - - -  + + . - + - - + - + + . - -",
    "- + - + - + + + + - + -  + + . - + + + + + + + . - +",
    "- - + + + + - + + - - +  + + . + + - - + - + + . + -",
];
const QCOW2: [&str; 12] = [
    "- - - - - - - - - - - -  - + - - + - - - - - + - - -",
    "- - - - - - - - - - - -  - + - - + - - - - - + - - -",
    "- - + + + + - + + - - +  + + + + + - - + - + + + + -",
    "- - + + + + - + + - - +  + + + + + - - + - + + + + -",
    "- - + + + + - + + - - +  + + + + + - - + - + + + + -",
    "- - + + + + - + + - - +  + + + + + - - + - + + + + -",
    "- - - - - - - - - - - -  - + - - + - - - - - + - - -",
    "- - + + + + - + + - - +  + + + + + - - + - + + + + -",
    "- - + + + + - + + - - +  + + + + + - - + - + + + + -",
    "- - - - - - - - - - - -  - + - - + - - - - - + - - -",
    "- - - - - - - - - - - -  - + - - + - - - - - + - - -",
    "- - + + + + - + + - - +  + + + + + - - + - + + + + -",
];

/// One cell of a line.
fn cell(line: &str, at: usize) -> &str {
    line.split_whitespace().nth(at).unwrap()
}

/// Runs a tool on the image; `+`, `-`, `.` as in the tables.
fn tool(words: &str, format: &str, image: &Path, folder: &Path) -> &'static str {
    if words.contains(" check ") && format == "raw" {
        return ".";
    }
    let overlay = folder.join("commit.overlay");
    let fill = |word: &str| match word {
        "IMAGE" => image.display().to_string(),
        "OUT" => folder.join("out").display().to_string(),
        "OVERLAY" => overlay.display().to_string(),
        "FORMAT" => format.to_owned(),
        "read" => "read 0 512".to_owned(),
        "write" => "write 0 512".to_owned(),
        word => word.to_owned(),
    };
    let words: Vec<String> = words.split(' ').map(fill).collect();
    let program = match words[0].as_str() {
        "ringblk" => rig::ringblk().display().to_string(),
        other => other.to_owned(),
    };
    let arguments: Vec<&str> = words[1..].iter().map(String::as_str).collect();
    match run(&program, &arguments) {
        Ok(()) => "+",
        Err(text) => {
            assert!(text.contains("lock"), "{words:?} fails for another reason: {text}");
            "-"
        }
    }
}

fn check(format: &str, table: &[&str]) {
    let programs = [Program::Ringblk, Program::StorageDaemon, Program::System];
    let mut firsts: Vec<Peer> = programs.iter().filter_map(|p| Peer::start(*p)).collect();
    let mut seconds: Vec<Peer> = programs.iter().filter_map(|p| Peer::start(*p)).collect();
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    let tools = run("qemu-img", &["create", "-q", "-f", format, image.to_str().unwrap(), "1M"]).is_ok();
    let overlay = folder.path().join("commit.overlay");
    let (image_path, overlay) = (image.to_str().unwrap(), overlay.to_str().unwrap());
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", image_path, "-F", format, overlay]).unwrap();
    let mut wrong = Vec::new();
    for (first, line) in USERS.iter().zip(table) {
        let Some(holder) = firsts.iter_mut().find(|p| p.program == first.program) else { continue };
        let using = holder.use_image(first, format, &image).unwrap_or_else(|e| panic!("{}: {e}", first.name));
        for (at, second) in USERS.iter().enumerate() {
            let Some(comer) = seconds.iter_mut().find(|p| p.program == second.program) else { continue };
            let found = match comer.use_image(second, format, &image) {
                Ok(using) => {
                    comer.release(using);
                    "+"
                }
                Err(text) => {
                    assert!(text.contains("lock"), "{} fails for another reason: {text}", second.name);
                    if second.program == Program::Ringblk {
                        assert!(text.contains("Way out: "), "{text}");
                    }
                    "-"
                }
            };
            if found != cell(line, at) {
                wrong.push(format!("{format}: {} beside {}: {found}", second.name, first.name));
            }
        }
        for (at, (name, words)) in TOOLS.iter().enumerate() {
            if !tools && !words.starts_with("ringblk") {
                continue;
            }
            let found = tool(words, format, &image, folder.path());
            if found != cell(line, USERS.len() + at) {
                wrong.push(format!("{format}: {name} beside {}: {found}", first.name));
            }
        }
        holder.release(using);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn pairs_on_a_raw_image_are_allowed_or_refused_as_the_table_says() {
    check("raw", &RAW);
}

#[test]
fn pairs_on_a_qcow2_image_are_allowed_or_refused_as_the_table_says() {
    check("qcow2", &QCOW2);
}

#[test]
fn the_reference_page_has_the_tables() {
    let page = include_str!("../../../../docs/reference/permissions.md");
    let mut missing = Vec::new();
    for table in [RAW, QCOW2] {
        for (user, line) in USERS.iter().zip(table) {
            let cells: Vec<&str> = line.split_whitespace().collect();
            let (users, tools) = cells.split_at(USERS.len());
            for part in [users, tools] {
                let line = format!("| {} | {} |", user.name, part.join(" | "));
                if !page.contains(&line) {
                    missing.push(line);
                }
            }
        }
    }
    assert!(missing.is_empty(), "docs/reference/permissions.md lacks\n{}", missing.join("\n"));
    for name in USERS.iter().map(|u| u.name).chain(TOOLS.iter().map(|t| t.0)) {
        assert!(page.contains(name), "docs/reference/permissions.md does not know '{name}'");
    }
}
