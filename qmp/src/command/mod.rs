//! The registry of commands: name, argument and result types, handler. Filled by the families' modules and by the
//! binary at start, then closed into a [`CommandTable`] that sessions and the command line call.
//!
//! Must not know sessions or any command but the built-in ones.

mod builtin;
#[cfg(test)]
mod tests;

use std::cell::OnceCell;
use std::collections::HashMap;
use std::pin::Pin;
use std::rc::Rc;

use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::error::QmpError;
use crate::event::Event;
use crate::keyval::Dialect;
use crate::options;
use crate::schema::{CommandInfo, EventInfo, Schema, SchemaBuilder, Syntax, TypeRef, introspect, reference};

/// A command that is being executed. It belongs to the main thread; its waker may be used from any.
pub type HandlerFuture = Pin<Box<dyn Future<Output = Result<Value, QmpError>>>>;

type Handler<S> = Rc<dyn Fn(S, Value) -> HandlerFuture>;

/// Makes a type. Called when the type is first needed: converting all of them would be half of the process's start.
type TypeFn = Rc<dyn Fn(&mut SchemaBuilder) -> TypeRef>;

/// What the process says it is, in the greeting and in `query-version`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// The release of QEMU whose QMP is spoken.
    pub qemu: (u32, u32, u32),
    /// Name and version of this program.
    pub package: String,
}

impl Default for Version {
    fn default() -> Self {
        Version { qemu: (10, 0, 2), package: format!("ringblk {}", env!("CARGO_PKG_VERSION")) }
    }
}

impl Version {
    /// `VersionInfo` on the wire.
    pub fn to_value(&self) -> Value {
        let (major, minor, micro) = self.qemu;
        json!({"qemu": {"major": major, "minor": minor, "micro": micro}, "package": self.package})
    }
}

/// One registered command.
pub struct Command<S> {
    decl: Rc<Declaration>,
    concurrent: bool,
    handler: Handler<S>,
    /// Its argument type, in a schema of its own.
    own: OnceCell<(Schema, TypeRef)>,
}

/// A command as it was registered.
struct Declaration {
    name: String,
    doc: String,
    args: TypeFn,
    returns: TypeFn,
}

impl<S> std::fmt::Debug for Command<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Command").field("name", &self.decl.name).finish_non_exhaustive()
    }
}

impl<S> Command<S> {
    fn args(&self) -> (&Schema, TypeRef) {
        let (schema, args) = self.own.get_or_init(|| {
            let mut builder = SchemaBuilder::new();
            let args = (self.decl.args)(&mut builder);
            (builder.finish(), args)
        });
        (schema, *args)
    }

    /// Lets the command run while another session's command is still waiting for something. For queries and whatever else
    /// never waits itself; all others run one at a time, as in QEMU.
    pub fn concurrent(&mut self) -> &mut Self {
        self.concurrent = true;
        self
    }
}

/// All types of a process, made when somebody asks for them.
#[derive(Default)]
struct Types {
    commands: Vec<Rc<Declaration>>,
    events: Vec<(&'static str, &'static str, TypeFn)>,
    full: OnceCell<Full>,
}

impl std::fmt::Debug for Types {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Types").field("commands", &self.commands.len()).finish_non_exhaustive()
    }
}

struct Full {
    schema: Schema,
    commands: Vec<CommandInfo>,
    events: Vec<EventInfo>,
    introspection: Value,
}

impl Types {
    fn full(&self) -> &Full {
        self.full.get_or_init(|| {
            let mut b = SchemaBuilder::new();
            let commands: Vec<CommandInfo> = self
                .commands
                .iter()
                .map(|d| CommandInfo {
                    name: d.name.clone(),
                    doc: d.doc.clone(),
                    args: (d.args)(&mut b),
                    returns: (d.returns)(&mut b),
                })
                .collect();
            let events: Vec<EventInfo> = self
                .events
                .iter()
                .map(|(name, doc, data)| EventInfo {
                    name: (*name).to_owned(),
                    doc: (*doc).to_owned(),
                    data: data(&mut b),
                })
                .collect();
            let schema = b.finish();
            let introspection = introspect::introspect(&schema, &commands, &events);
            Full { schema, commands, events, introspection }
        })
    }
}

/// What only the closed table can tell its own built-in commands.
#[derive(Debug, Default)]
struct Catalogue {
    types: OnceCell<Rc<Types>>,
}

impl Catalogue {
    fn names(&self) -> Value {
        let names = self.types.get().map(|t| t.commands.iter().map(|d| json!({"name": d.name})).collect());
        Value::Array(names.unwrap_or_default())
    }

    fn introspection(&self) -> Value {
        self.types.get().map(|t| t.full().introspection.clone()).unwrap_or_default()
    }
}

/// The registry while it is being filled. `S` is the state handlers work on: cheap to clone, usually an `Rc`.
#[derive(Debug)]
pub struct Commands<S> {
    commands: Vec<Command<S>>,
    types: Types,
    version: Version,
    catalogue: Rc<Catalogue>,
}

impl<S: Clone + 'static> Commands<S> {
    /// A registry with the built-in commands: `qmp_capabilities`, `query-version`, `query-commands`, `query-qmp-schema`
    /// and `quit`, which calls `quit` and is answered first.
    pub fn new(version: Version, quit: impl Fn(&S) + 'static) -> Self {
        let mut commands =
            Commands { commands: Vec::new(), types: Types::default(), version, catalogue: Rc::default() };
        builtin::register(&mut commands, quit);
        commands
    }

    /// Adds a command whose arguments and result are structs; see [`crate::schema::builder`] for what these may use. `()`
    /// as result is the empty object.
    pub fn register<Args, Ret, F, Fut>(&mut self, name: &str, doc: &str, handler: F) -> &mut Command<S>
    where
        Args: DeserializeOwned + JsonSchema,
        Ret: Serialize + JsonSchema,
        F: Fn(S, Args) -> Fut + 'static,
        Fut: Future<Output = Result<Ret, QmpError>> + 'static,
    {
        let handler = move |state: S, value: Value| -> HandlerFuture {
            let args = match options::from_checked::<Args>(value) {
                Ok(args) => args,
                Err(e) => return Box::pin(std::future::ready(Err(e))),
            };
            let future = handler(state, args);
            Box::pin(async move {
                let value = future.await?;
                serde_json::to_value(value)
                    .map_err(|e| QmpError::generic(format!("Cannot write the answer: {e}")))
            })
        };
        let args = |b: &mut SchemaBuilder| b.object_from::<Args>();
        let returns = |b: &mut SchemaBuilder| b.returns::<Ret>();
        self.add(name, doc, Rc::new(args), Rc::new(returns), Rc::new(handler))
    }

    /// Adds a command without arguments.
    pub fn register_query<Ret, F, Fut>(&mut self, name: &str, doc: &str, handler: F) -> &mut Command<S>
    where
        Ret: Serialize + JsonSchema,
        F: Fn(S) -> Fut + 'static,
        Fut: Future<Output = Result<Ret, QmpError>> + 'static,
    {
        self.register(name, doc, move |state: S, _: NoArguments| handler(state))
    }

    /// Adds a command whose arguments are a type made by hand: a union or an alternate that only exists at run time. Each of
    /// the two functions is called with an empty builder and with one that holds the other commands' types; what it refers
    /// to by name it defines. The handler gets a value that passed the type's check.
    pub fn register_value<F, Fut>(
        &mut self,
        name: &str,
        doc: &str,
        args: impl Fn(&mut SchemaBuilder) -> TypeRef + 'static,
        returns: impl Fn(&mut SchemaBuilder) -> TypeRef + 'static,
        handler: F,
    ) -> &mut Command<S>
    where
        F: Fn(S, Value) -> Fut + 'static,
        Fut: Future<Output = Result<Value, QmpError>> + 'static,
    {
        let handler = move |state, value| -> HandlerFuture { Box::pin(handler(state, value)) };
        self.add(name, doc, Rc::new(args), Rc::new(returns), Rc::new(handler))
    }

    fn add(
        &mut self,
        name: &str,
        doc: &str,
        args: TypeFn,
        returns: TypeFn,
        handler: Handler<S>,
    ) -> &mut Command<S> {
        let decl = Rc::new(Declaration { name: name.to_owned(), doc: doc.to_owned(), args, returns });
        let command = Command { decl, concurrent: false, handler, own: OnceCell::new() };
        let index = match self.commands.iter().position(|c| c.decl.name == name) {
            Some(index) => index,
            None => {
                self.commands.push(command);
                let last = self.commands.len() - 1;
                return &mut self.commands[last];
            }
        };
        log::error!("command {name} is registered twice; the later one counts");
        self.commands[index] = command;
        &mut self.commands[index]
    }

    /// Announces an event this process can send. One that was not announced is not delivered.
    pub fn event<E: Event>(&mut self) {
        if self.types.events.iter().any(|(name, _, _)| *name == E::NAME) {
            return;
        }
        self.types.events.push((E::NAME, E::DOC, Rc::new(|b: &mut SchemaBuilder| b.returns::<E>())));
    }

    /// Closes the registry.
    pub fn finish(mut self) -> Rc<CommandTable<S>> {
        self.types.commands = self.commands.iter().map(|c| c.decl.clone()).collect();
        let types = Rc::new(self.types);
        // Set once, here: the registry is consumed.
        let _ = self.catalogue.types.set(types.clone());
        let greeting = json!({"QMP": {"version": self.version.to_value(), "capabilities": []}});
        let commands = self.commands.into_iter().map(|c| (c.decl.name.clone(), c)).collect();
        Rc::new(CommandTable { commands, types, greeting })
    }
}

/// Arguments of a command that has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoArguments {}

/// The closed registry.
#[derive(Debug)]
pub struct CommandTable<S> {
    commands: HashMap<String, Command<S>>,
    types: Rc<Types>,
    greeting: Value,
}

impl<S: Clone + 'static> CommandTable<S> {
    /// The types of all commands and events.
    pub fn schema(&self) -> &Schema {
        &self.types.full().schema
    }

    /// The commands in the order they were registered.
    pub fn commands(&self) -> &[CommandInfo] {
        &self.types.full().commands
    }

    /// Whether the event was announced.
    pub fn has_event(&self, name: &str) -> bool {
        self.types.events.iter().any(|(n, _, _)| *n == name)
    }

    /// The first message of a session.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// The answer to `query-qmp-schema`.
    pub fn introspection(&self) -> &Value {
        &self.types.full().introspection
    }

    /// The reference page in Markdown.
    pub fn reference_markdown(&self) -> String {
        let full = self.types.full();
        reference::markdown(&full.schema, &full.commands, &full.events)
    }

    /// Whether the command may run beside another; `false` for names that do not exist.
    pub fn is_concurrent(&self, name: &str) -> bool {
        self.commands.get(name).is_some_and(|c| c.concurrent)
    }

    /// Starts a command with JSON arguments. Nothing happens before the future is polled.
    ///
    /// # Errors
    /// The command does not exist, or the arguments do not fit its type.
    pub fn call(
        &self,
        state: S,
        name: &str,
        arguments: Map<String, Value>,
    ) -> Result<HandlerFuture, QmpError> {
        let command = self.get(name)?;
        let (schema, ty) = command.args();
        let args = schema.check(ty, Value::Object(arguments), Syntax::Json)?;
        Ok(run(command.handler.clone(), state, args))
    }

    /// Starts a command with the text of a command line option: keyval syntax whose first key may be left out, or JSON.
    ///
    /// # Errors
    /// As [`CommandTable::call`], and what is wrong with the text.
    pub fn call_option(
        &self,
        state: S,
        name: &str,
        text: &str,
        implied: &str,
    ) -> Result<HandlerFuture, QmpError> {
        let args = self.option_arguments(name, text, implied)?;
        Ok(run(self.get(name)?.handler.clone(), state, args))
    }

    /// The arguments that [`CommandTable::call_option`] would call the command with: for tools that add to them.
    ///
    /// # Errors
    /// As there.
    pub fn option_arguments(&self, name: &str, text: &str, implied: &str) -> Result<Value, QmpError> {
        let command = self.get(name)?;
        let dialect = Dialect::implied(implied);
        if command.own.get().is_none() {
            let mut builder = SchemaBuilder::about(text);
            let ty = (command.decl.args)(&mut builder);
            // Of the whole type nothing more is wanted on a command line that has no mistakes.
            if !builder.is_narrowed() {
                // Nobody else sets it: one thread, and no call in between.
                let _ = command.own.set((builder.finish(), ty));
            } else if let Ok(value) = options::parse_as(&builder.finish(), ty, text, &dialect) {
                return Ok(value);
            }
        }
        let (schema, ty) = command.args();
        options::parse_as(schema, ty, text, &dialect)
    }

    fn get(&self, name: &str) -> Result<&Command<S>, QmpError> {
        self.commands.get(name).ok_or_else(|| QmpError::command_not_found(name))
    }
}

/// Calls the handler inside the future, so that no part of it runs before it is polled; no result is an empty object.
fn run<S: 'static>(handler: Handler<S>, state: S, args: Value) -> HandlerFuture {
    Box::pin(async move {
        Ok(match handler(state, args).await? {
            Value::Null => Value::Object(Map::new()),
            value => value,
        })
    })
}
