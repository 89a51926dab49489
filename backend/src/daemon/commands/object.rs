//! Objects and iothreads.

use qmp::Commands;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::State;
use crate::daemon::objects::{self, IoThreadInfo, ObjectOptions, ObjectPropertyInfo};

/// `object-del`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct ObjectDel {
    /// The object.
    id: String,
}

/// `qom-list`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct QomList {
    /// `/objects`, `/objects/ID` or `ID`.
    path: String,
}

/// `qom-get`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct QomGet {
    /// `/objects/ID` or `ID`.
    path: String,
    /// The property's name.
    property: String,
}

/// `qom-set`
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct QomSet {
    /// `/objects/ID` or `ID`.
    path: String,
    /// The property's name.
    property: String,
    /// Its new value.
    value: Value,
}

pub fn register(commands: &mut Commands<State>) {
    commands.register(
        "object-add",
        "Creates an object.",
        |daemon: State, options: ObjectOptions| async move {
            match options {
                ObjectOptions::Iothread(o) => daemon.add_iothread(o),
                ObjectOptions::Secret(o) => daemon.add_secret(o).await,
                ObjectOptions::ThrottleGroup(o) => daemon.add_group(&o),
            }
        },
    );
    commands.register(
        "object-del",
        "Removes an object that nobody uses.",
        |daemon: State, a: ObjectDel| async move { daemon.object_del(&a.id).await },
    );
    commands
        .register("qom-list", "Lists the properties of an object.", |daemon: State, a: QomList| async move {
            let list: Vec<ObjectPropertyInfo> = daemon.objects.borrow().list(&a.path)?;
            Ok(list)
        })
        .concurrent();
    commands
        .register("qom-get", "Reads a property of an object.", |daemon: State, a: QomGet| async move {
            daemon.objects.borrow().get(&a.path, &a.property)
        })
        .concurrent();
    commands.register("qom-set", "Sets a property of an object.", |daemon: State, a: QomSet| async move {
        daemon.objects.borrow().set(&a.path, &a.property, &a.value)
    });
    commands
        .register_query(
            "query-iothreads",
            "Tells of all iothreads and how busy they have been.",
            |daemon: State| async move {
                let list: Vec<IoThreadInfo> = daemon.iothreads().iter().map(objects::info).collect();
                Ok(list)
            },
        )
        .concurrent();
}
