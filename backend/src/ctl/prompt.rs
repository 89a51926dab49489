//! The prompt: commands from a terminal, with completion, and events as they come; or, where stdin is no terminal, one
//! command each line.
//!
//! Called by [`super::main`] without a command. A thread reads what the daemon says; history lives as long as the prompt,
//! since command lines may hold secrets.

use std::borrow::Cow;
use std::io::{BufRead as _, IsTerminal as _};
use std::sync::mpsc::{Receiver, Sender, channel};

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::MemHistory;
use rustyline::validate::Validator;
use rustyline::{Config, Context, Editor, ExternalPrinter, Helper};
use serde_json::Value;

use super::client::{self, Client};
use super::failure::{Failure, Outcome};
use super::output;
use super::schema::Schema;
use super::words::{self, Arguments};

/// Commands of the prompt itself.
const OWN: [&str; 3] = ["help", "quit", "exit"];
/// Longest line, bytes.
const MAX_LINE: usize = 1 << 20;

/// Reads commands until there are no more.
///
/// # Errors
/// The connection broke; in a script, the first command that fails.
pub fn run(mut client: Client, json: bool) -> Outcome {
    let schema = Schema::ask(&mut client)?;
    if std::io::stdin().is_terminal() {
        interactive(client, schema, json)
    } else {
        script(client, &schema, json)
    }
}

/// What a line asks for.
enum Line {
    Nothing,
    End,
    Help(Option<String>),
    Command(String, Option<Value>),
}

fn read(line: &str, schema: &Schema) -> Result<Line, Failure> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(Line::Nothing);
    }
    if line.starts_with('{') {
        // A command as it goes over the wire.
        let message = qmp::json::parse(line).map_err(Failure::Usage)?;
        let name = message.get("execute").and_then(Value::as_str);
        let name = name.ok_or_else(|| Failure::Usage("expected {\"execute\": NAME, ...}".to_owned()))?;
        return Ok(Line::Command(name.to_owned(), message.get("arguments").cloned()));
    }
    let (all, _) = words::split(line);
    let Some((name, rest)) = all.split_first() else { return Ok(Line::Nothing) };
    match name.as_str() {
        // `quit` ends the daemon only if it is said in full: {"execute": "quit"}, or `ringblk ctl quit`.
        "quit" | "exit" if rest.is_empty() => return Ok(Line::End),
        "help" | "?" => return Ok(Line::Help(rest.first().cloned())),
        _ => {}
    }
    let arguments = match words::parse(rest)? {
        Arguments::None => None,
        Arguments::Json(value) => Some(value),
        Arguments::Words(tree) => Some(schema.arguments(name, tree).map_err(Failure::Usage)?),
    };
    Ok(Line::Command(name.clone(), arguments))
}

fn help(schema: &Schema, command: Option<&str>) -> Result<String, Failure> {
    match command {
        Some(command) => schema.help(command).map_err(Failure::Usage),
        None => {
            let mut text = String::from(
                "COMMAND [key=value ... | {JSON}]   a command; TAB completes\n\
                 help COMMAND                       its arguments\n\
                 exit                               leave, the daemon goes on ({\"execute\": \"quit\"} ends it)\n\n",
            );
            for name in schema.commands() {
                text.push_str(name);
                text.push('\n');
            }
            Ok(text)
        }
    }
}

fn event_line(event: &Value, json: bool) -> String {
    if json {
        return event.to_string();
    }
    let name = event.get("event").and_then(Value::as_str).unwrap_or("event");
    let data = event.get("data").map(|d| output::clean(&d.to_string())).unwrap_or_default();
    format!("* {} {data}", output::clean(name))
}

fn script(mut client: Client, schema: &Schema, json: bool) -> Outcome {
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if line.len() > MAX_LINE {
            return Err(Failure::Usage(format!("a line of more than {MAX_LINE} bytes")));
        }
        match read(&line, schema)? {
            Line::Nothing => {}
            Line::End => break,
            Line::Help(command) => output::bytes(help(schema, command.as_deref())?.as_bytes())?,
            Line::Command(name, arguments) => {
                let value = client.execute(&name, arguments)?;
                for event in client.take_events() {
                    output::bytes(format!("{}\n", event_line(&event, json)).as_bytes())?;
                }
                output::value(&value, json)?;
            }
        }
    }
    Ok(())
}

/// What completes the line.
struct Completion {
    schema: Schema,
}

impl Completion {
    /// Where the word at the end of `line` begins, and what it may become.
    fn candidates(&self, line: &str) -> (usize, Vec<String>) {
        let (mut all, open) = words::split(line);
        let partial = if open { all.pop().unwrap_or_default() } else { String::new() };
        // Quotes would make the word longer than it looks; there is nothing to complete in them.
        let Some(start) = line.len().checked_sub(partial.len()).filter(|s| line.get(*s..) == Some(&partial))
        else {
            return (line.len(), Vec::new());
        };
        let names = || OWN.iter().copied().chain(self.schema.commands());
        let found = match all.split_first() {
            None => names().filter(|c| c.starts_with(&partial)).map(|c| format!("{c} ")).collect(),
            Some((first, [])) if first == "help" => {
                self.schema.commands().filter(|c| c.starts_with(&partial)).map(str::to_owned).collect()
            }
            Some((command, others)) => self.schema.complete(command, others, &partial),
        };
        (start, found)
    }
}

impl Completer for Completion {
    type Candidate = String;

    fn complete(&self, line: &str, pos: usize, _: &Context<'_>) -> rustyline::Result<(usize, Vec<String>)> {
        Ok(self.candidates(line.get(..pos).unwrap_or(line)))
    }
}

impl Hinter for Completion {
    type Hint = String;
}

impl Highlighter for Completion {
    fn highlight_prompt<'b, 's: 'b, 'p: 'b>(&'s self, prompt: &'p str, _: bool) -> Cow<'b, str> {
        Cow::Borrowed(prompt)
    }
}

impl Validator for Completion {}

impl Helper for Completion {}

/// Takes what the daemon says until it says no more: answers to whoever waits, events to the terminal.
fn listen(
    mut messages: client::Messages,
    answers: &Sender<Result<Value, Failure>>,
    mut printer: impl ExternalPrinter,
    json: bool,
) {
    loop {
        match messages.next() {
            Ok(message) if message.get("event").is_some() => {
                // A terminal that is gone ends the prompt by itself.
                let _ = printer.print(format!("{}\n", event_line(&message, json)));
            }
            Ok(message) => {
                if answers.send(Ok(message)).is_err() {
                    return;
                }
            }
            Err(failure) => {
                let _ = answers.send(Err(failure));
                return;
            }
        }
    }
}

fn wait(answers: &Receiver<Result<Value, Failure>>, id: u64) -> Result<Value, Failure> {
    loop {
        let gone = || Failure::Lost("the daemon closed the connection".to_owned());
        let message = answers.recv().map_err(|_| gone())??;
        if let Some(answer) = client::answer(message, id) {
            return answer;
        }
    }
}

fn interactive(mut client: Client, schema: Schema, json: bool) -> Outcome {
    let broken = |e: ReadlineError| Failure::Lost(format!("the terminal: {e}"));
    let config = Config::builder().completion_type(rustyline::CompletionType::List).build();
    let mut editor: Editor<Completion, MemHistory> =
        Editor::with_history(config, MemHistory::new()).map_err(broken)?;
    editor.set_helper(Some(Completion { schema }));
    output::bytes(format!("{}; help, TAB, exit\n", output::clean(client.version())).as_bytes())?;
    let printer = editor.create_external_printer().map_err(broken)?;
    let messages = client.reader()?;
    let (sender, answers) = channel();
    std::thread::spawn(move || listen(messages, &sender, printer, json));
    loop {
        let line = match editor.readline("ringblk> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(e) => return Err(broken(e)),
        };
        let _ = editor.add_history_entry(line.as_str());
        let Some(helper) = editor.helper() else { return Ok(()) };
        let outcome = match read(&line, &helper.schema) {
            Ok(Line::Nothing) => Ok(()),
            Ok(Line::End) => return Ok(()),
            Ok(Line::Help(command)) => {
                help(&helper.schema, command.as_deref()).and_then(|text| output::bytes(text.as_bytes()))
            }
            Ok(Line::Command(name, arguments)) => client
                .send(&name, arguments)
                .and_then(|id| wait(&answers, id))
                .and_then(|value| output::value(&value, json)),
            Err(e) => Err(e),
        };
        match outcome {
            Ok(()) => {}
            Err(failure @ (Failure::Lost(_) | Failure::Output(_))) => return Err(failure),
            Err(failure) => failure.tell(json),
        }
    }
}

#[cfg(test)]
pub(super) fn candidates(schema: Schema, line: &str) -> (usize, Vec<String>) {
    Completion { schema }.candidates(line)
}
