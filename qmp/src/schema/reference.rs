//! The reference page: commands, events and types in Markdown, out of the doc comments of the structs that parse. Called
//! by the build of the documentation, and by the test that finds the checked-in page stale.

use std::collections::HashSet;
use std::fmt::Write;

use super::{CommandInfo, EventInfo, Member, ObjectType, Schema, Shape, TypeRef};

/// The page's text.
pub(crate) fn markdown(schema: &Schema, commands: &[CommandInfo], events: &[EventInfo]) -> String {
    let mut page = Page { schema, out: String::new(), listed: HashSet::new(), todo: Vec::new() };
    let mut commands: Vec<_> = commands.iter().collect();
    commands.sort_by(|a, b| a.name.cmp(&b.name));
    let mut events: Vec<_> = events.iter().collect();
    events.sort_by(|a, b| a.name.cmp(&b.name));
    page.line("# QMP reference");
    page.line("");
    page.line("Generated from the structures that parse the commands; do not edit.");
    page.line("");
    page.line("## Commands");
    for c in commands {
        page.heading(&c.name, &c.doc);
        page.fields("Arguments", c.args);
        if schema.get(c.returns).shape != Shape::Object(ObjectType::default()) {
            let name = page.name(c.returns);
            page.line(&format!("Returns: {name}"));
            page.line("");
        }
    }
    if !events.is_empty() {
        page.line("");
        page.line("## Events");
        for e in events {
            page.heading(&e.name, &e.doc);
            page.fields("Data", e.data);
        }
    }
    page.line("");
    page.line("## Types");
    while let Some(ty) = page.todo.pop() {
        page.describe(ty);
    }
    let mut out = page.out;
    while out.contains("\n\n\n") {
        out = out.replace("\n\n\n", "\n\n");
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

struct Page<'a> {
    schema: &'a Schema,
    out: String,
    listed: HashSet<TypeRef>,
    todo: Vec<TypeRef>,
}

impl Page<'_> {
    fn line(&mut self, text: &str) {
        self.out.push_str(text.trim_end());
        self.out.push('\n');
    }

    fn heading(&mut self, name: &str, doc: &str) {
        self.line("");
        self.line(&format!("### {name}"));
        self.line("");
        if !doc.is_empty() {
            self.line(doc);
            self.line("");
        }
    }

    /// How a type is called in a table; what needs a description of its own is put on the list.
    fn name(&mut self, ty: TypeRef) -> String {
        let def = self.schema.get(ty);
        match &def.shape {
            Shape::String => "string".to_owned(),
            Shape::Int(int) if int.size => "size".to_owned(),
            Shape::Int(int) => match int.name.as_str() {
                "" | "integer" => "integer".to_owned(),
                other => other.strip_prefix("an ").unwrap_or(other).trim_end_matches("_t").to_owned(),
            },
            Shape::Number => "number".to_owned(),
            Shape::Bool => "boolean".to_owned(),
            Shape::Null => "null".to_owned(),
            Shape::Any | Shape::Undefined => "any".to_owned(),
            Shape::Array(element) => format!("array of {}", self.name(*element)),
            Shape::Enum(values) if values.iter().all(|v| v.doc.is_empty()) && values.len() <= 8 => {
                values.iter().map(|v| format!("`{}`", v.name)).collect::<Vec<_>>().join(" \\| ")
            }
            Shape::Enum(_) | Shape::Object(_) | Shape::Alternate(_) => {
                if self.listed.insert(ty) {
                    self.todo.insert(0, ty);
                }
                let name = if def.name.is_empty() { "empty object" } else { &def.name };
                format!("[{name}](#{})", anchor(name))
            }
        }
    }

    fn fields(&mut self, title: &str, ty: TypeRef) {
        match &self.schema.get(ty).shape {
            Shape::Object(object) if object.members.is_empty() => {}
            Shape::Object(object) if object.union.is_none() => {
                self.table(title, &object.members);
            }
            _ => {
                let name = self.name(ty);
                self.line(&format!("{title}: {name}"));
                self.line("");
            }
        }
    }

    fn table(&mut self, title: &str, members: &[Member]) {
        self.line(&format!("| {title} | Type | |"));
        self.line("|---|---|---|");
        for m in members {
            let ty = self.name(m.ty);
            let mut text = m.doc.replace('\n', " ").replace('|', "\\|");
            if m.optional {
                let default = match &m.default {
                    Some(value) if !value.is_object() => format!("default `{value}`"),
                    _ => "optional".to_owned(),
                };
                text = if text.is_empty() { default } else { format!("{text} ({default})") };
            }
            self.line(&format!("| `{}` | {ty} | {text} |", m.name));
        }
        self.line("");
    }

    fn describe(&mut self, ty: TypeRef) {
        let def = self.schema.get(ty);
        let name = if def.name.is_empty() { "empty object" } else { &def.name };
        self.heading(name, &def.doc);
        match &def.shape {
            Shape::Enum(values) => {
                for v in values {
                    let doc = if v.doc.is_empty() { String::new() } else { format!(": {}", v.doc) };
                    self.line(&format!("* `{}`{doc}", v.name));
                }
                self.line("");
            }
            Shape::Alternate(members) => {
                let names: Vec<String> = members.iter().map(|m| self.name(*m)).collect();
                self.line(&format!("One of: {}", names.join(", ")));
                self.line("");
            }
            Shape::Object(object) => {
                if !object.members.is_empty() {
                    self.table("Member", &object.members);
                }
                if let Some(union) = &object.union {
                    for (case, variant, doc) in &union.variants {
                        let mut title = String::new();
                        // Writing to a string cannot fail.
                        let _ = write!(title, "#### {}: {case}", union.tag);
                        self.line(&title);
                        self.line("");
                        if !doc.is_empty() {
                            self.line(doc);
                            self.line("");
                        }
                        self.fields("Member", *variant);
                    }
                }
            }
            _ => {}
        }
    }
}

/// GitHub's anchor of a heading.
fn anchor(name: &str) -> String {
    name.to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | ' '))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}
