//! The recipes in `docs/recipes`, executed: each command of their `console` blocks in turn, in one folder per recipe, and
//! what it prints compared with what the page says it prints.
//!
//! In a block a line that begins with `$ ` is a command (continued after a trailing `\`), what follows up to the next one
//! is its output, standard error included. A line that is `...` stands for any lines, `...` inside a line for any text.
//! A command that is to fail ends in `# fails`, which the shell takes for a comment.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ringblk_scenarios::rig;

/// One command and what it is to print.
struct Step {
    command: String,
    expected: Vec<String>,
}

fn steps(page: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let (mut inside, mut continued) = (false, false);
    for line in page.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
            continued = false;
        } else if inside && continued {
            let step = steps.last_mut().unwrap();
            step.command.push('\n');
            step.command.push_str(line);
            continued = line.ends_with('\\');
        } else if let (true, Some(command)) = (inside, line.strip_prefix("$ ")) {
            continued = line.ends_with('\\');
            steps.push(Step { command: command.to_owned(), expected: Vec::new() });
        } else if inside {
            steps.last_mut().expect("output before any command").expected.push(line.to_owned());
        }
    }
    steps
}

/// Whether a line fits a pattern in which `...` stands for any text.
fn line_fits(pattern: &str, line: &str) -> bool {
    let parts: Vec<&str> = pattern.split("...").collect();
    let (first, rest) = parts.split_first().unwrap();
    let Some(mut line) = line.strip_prefix(first) else { return false };
    let Some((last, middle)) = rest.split_last() else { return line.is_empty() };
    for part in middle {
        let Some(at) = line.find(part) else { return false };
        line = &line[at + part.len()..];
    }
    line.ends_with(last)
}

/// Whether all lines fit all patterns, of which `...` stands for any lines.
fn fits(patterns: &[String], lines: &[&str]) -> bool {
    match (patterns.split_first(), lines.split_first()) {
        (None, None) => true,
        (None, Some(_)) => false,
        (Some((p, more)), _) if p == "..." => (0..=lines.len()).any(|n| fits(more, &lines[n..])),
        (Some(_), None) => false,
        (Some((p, more)), Some((line, rest))) => line_fits(p, line) && fits(more, rest),
    }
}

/// Ends what a recipe leaves running, whatever happened.
struct Folder(tempfile::TempDir);

impl Drop for Folder {
    fn drop(&mut self) {
        for entry in std::fs::read_dir(self.0.path()).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|e| e == "pid")
                && let Ok(pid) = std::fs::read_to_string(entry.path())
            {
                let _ = Command::new("kill").arg(pid.trim()).stderr(Stdio::null()).status();
            }
        }
    }
}

fn run(page: &Path) {
    let text = std::fs::read_to_string(page).unwrap();
    let steps = steps(&text);
    assert!(!steps.is_empty(), "{}: no commands", page.display());
    let folder = Folder(tempfile::tempdir().unwrap());
    let binaries = rig::ringblk().canonicalize().unwrap().parent().unwrap().to_path_buf();
    let path = format!("{}:{}", binaries.display(), std::env::var("PATH").unwrap());
    for step in &steps {
        let out = Command::new("sh")
            .args(["-c", &format!("exec 2>&1\n{}", step.command)])
            .current_dir(folder.0.path())
            .env("PATH", &path)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&out.stdout).into_owned();
        let lines: Vec<&str> = printed.lines().collect();
        let said = format!("{}: {}\nprinted:\n{printed}", page.display(), step.command);
        assert!(fits(&step.expected, &lines), "{said}the page says:\n{}", step.expected.join("\n"));
        assert_eq!(out.status.success(), !step.command.ends_with("# fails"), "{said}{}", out.status);
    }
}

#[test]
fn every_recipe_prints_what_its_page_says() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/recipes");
    let mut pages: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    pages.retain(|p| p.extension().is_some_and(|e| e == "md"));
    pages.sort();
    assert!(!pages.is_empty(), "no recipes");
    pages.iter().for_each(|page| run(page));
}

#[test]
fn the_comparison_can_fail() {
    let patterns = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    assert!(fits(&patterns("a\n...\nz"), &["a", "b", "c", "z"]));
    assert!(fits(&patterns("a ... c"), &["a b c"]));
    assert!(!fits(&patterns("a\n...\nz"), &["a", "b"]));
    assert!(!fits(&patterns("a ... d"), &["a b c"]));
    assert!(!fits(&patterns(""), &["a"]));
    let steps = steps("text\n```console\n$ one \\\n  two\nout\n$ three # fails\n```\n$ no\n");
    assert_eq!(steps.len(), 2);
    assert_eq!((steps[0].command.as_str(), steps[0].expected.len()), ("one \\\n  two", 1));
}
