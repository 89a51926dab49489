//! Surgery on the running graph: reopening nodes, overlays, children that come and go. What they do is the graph's.

use graph::Registry;
use qmp::schema::SchemaBuilder;
use qmp::{Commands, QmpError};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::State;
use super::block::blockdev_options;
use crate::daemon::errors::block;

/// A node and its options: a union over the drivers, which only the registry knows.
#[derive(Clone, Deserialize)]
pub struct BlockdevOptions(pub Map<String, Value>);

impl JsonSchema for BlockdevOptions {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "BlockdevOptions".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        // Found by its name: `blockdev_options` has defined it.
        schemars::json_schema!({})
    }
}

/// `blockdev-reopen`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockdevReopen {
    /// The nodes, each with all its options.
    options: Vec<BlockdevOptions>,
}

pub fn register(commands: &mut Commands<State>, registry: &Registry) {
    let all = registry.clone();
    commands.register_value(
        "blockdev-reopen",
        "Gives nodes other options while they are in use: all of the list, or, if one is refused, none. An option that is \
         absent returns to its default. Children are given by name and may be others than before; `backing: null` takes the \
         backing file away. What cannot change is refused by name. A format's `file` can only become a node that shows the \
         same image (a filter above it, or below).",
        move |schema: &mut SchemaBuilder| {
            blockdev_options(schema, &all);
            schema.object_from::<BlockdevReopen>()
        },
        SchemaBuilder::empty,
        |daemon: State, arguments| async move {
            let a: BlockdevReopen =
                serde_json::from_value(arguments).map_err(|e| QmpError::generic(e.to_string()))?;
            let list: Vec<Value> = a.options.into_iter().map(|o| Value::Object(o.0)).collect();
            daemon.ready_graph()?;
            daemon.graph.blockdev_reopen(&list).await.map_err(block)?;
            Ok(Value::Null)
        },
    );
}
