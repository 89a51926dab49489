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
    info: CommandInfo,
    concurrent: bool,
    handler: Handler<S>,
}

impl<S> std::fmt::Debug for Command<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Command").field("name", &self.info.name).finish_non_exhaustive()
    }
}

impl<S> Command<S> {
    /// Lets the command run while another session's command is still waiting for something. For queries and whatever else
    /// never waits itself; all others run one at a time, as in QEMU.
    pub fn concurrent(&mut self) -> &mut Self {
        self.concurrent = true;
        self
    }
}

/// What only the closed table can tell its own built-in commands.
#[derive(Debug, Default)]
struct Catalogue {
    names: OnceCell<Value>,
    introspection: OnceCell<Value>,
}

/// The registry while it is being filled. `S` is the state handlers work on: cheap to clone, usually an `Rc`.
#[derive(Debug)]
pub struct Commands<S> {
    schema: SchemaBuilder,
    commands: Vec<Command<S>>,
    events: Vec<EventInfo>,
    version: Version,
    catalogue: Rc<Catalogue>,
}

impl<S: Clone + 'static> Commands<S> {
    /// A registry with the built-in commands: `qmp_capabilities`, `query-version`, `query-commands`, `query-qmp-schema`
    /// and `quit`, which calls `quit` and is answered first.
    pub fn new(version: Version, quit: impl Fn(&S) + 'static) -> Self {
        let mut commands = Commands {
            schema: SchemaBuilder::new(),
            commands: Vec::new(),
            events: Vec::new(),
            version,
            catalogue: Rc::default(),
        };
        builtin::register(&mut commands, quit);
        commands
    }

    /// The types, for unions and alternates that only exist at run time.
    pub fn schema(&mut self) -> &mut SchemaBuilder {
        &mut self.schema
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
        let args = self.schema.object_from::<Args>();
        let returns = self.schema.returns::<Ret>();
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
        self.add(name, doc, args, returns, Rc::new(handler))
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

    /// Adds a command whose arguments are a type made by hand. The handler gets a value that passed the type's check.
    pub fn register_value<F, Fut>(
        &mut self,
        name: &str,
        doc: &str,
        args: TypeRef,
        returns: TypeRef,
        handler: F,
    ) -> &mut Command<S>
    where
        F: Fn(S, Value) -> Fut + 'static,
        Fut: Future<Output = Result<Value, QmpError>> + 'static,
    {
        self.add(name, doc, args, returns, Rc::new(move |state, value| Box::pin(handler(state, value))))
    }

    fn add(
        &mut self,
        name: &str,
        doc: &str,
        args: TypeRef,
        returns: TypeRef,
        handler: Handler<S>,
    ) -> &mut Command<S> {
        let info = CommandInfo { name: name.to_owned(), doc: doc.to_owned(), args, returns };
        let command = Command { info, concurrent: false, handler };
        let index = match self.commands.iter().position(|c| c.info.name == name) {
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
        if self.events.iter().any(|e| e.name == E::NAME) {
            return;
        }
        let data = self.schema.returns::<E>();
        self.events.push(EventInfo { name: E::NAME.to_owned(), doc: E::DOC.to_owned(), data });
    }

    /// Closes the registry.
    pub fn finish(self) -> Rc<CommandTable<S>> {
        let infos: Vec<CommandInfo> = self.commands.iter().map(|c| c.info.clone()).collect();
        let schema = self.schema.finish();
        let names = infos.iter().map(|c| json!({"name": c.name})).collect();
        // Set once, here: the registry is consumed.
        let _ = self.catalogue.names.set(Value::Array(names));
        let _ = self.catalogue.introspection.set(introspect::introspect(&schema, &infos, &self.events));
        let greeting = json!({"QMP": {"version": self.version.to_value(), "capabilities": []}});
        let commands = self.commands.into_iter().map(|c| (c.info.name.clone(), c)).collect();
        Rc::new(CommandTable {
            schema,
            commands,
            infos,
            events: self.events,
            greeting,
            catalogue: self.catalogue,
        })
    }
}

/// Arguments of a command that has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoArguments {}

/// The closed registry.
#[derive(Debug)]
pub struct CommandTable<S> {
    schema: Schema,
    commands: HashMap<String, Command<S>>,
    infos: Vec<CommandInfo>,
    events: Vec<EventInfo>,
    greeting: Value,
    catalogue: Rc<Catalogue>,
}

impl<S: Clone + 'static> CommandTable<S> {
    /// The types of all commands and events.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// The commands in the order they were registered.
    pub fn commands(&self) -> &[CommandInfo] {
        &self.infos
    }

    /// Whether the event was announced.
    pub fn has_event(&self, name: &str) -> bool {
        self.events.iter().any(|e| e.name == name)
    }

    /// The first message of a session.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// The answer to `query-qmp-schema`.
    pub fn introspection(&self) -> &Value {
        self.catalogue.introspection.get().unwrap_or(&Value::Null)
    }

    /// The reference page in Markdown.
    pub fn reference_markdown(&self) -> String {
        reference::markdown(&self.schema, &self.infos, &self.events)
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
        let args = self.schema.check(command.info.args, Value::Object(arguments), Syntax::Json)?;
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
        let command = self.get(name)?;
        let args = options::parse_as(&self.schema, command.info.args, text, &Dialect::implied(implied))?;
        Ok(run(command.handler.clone(), state, args))
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
