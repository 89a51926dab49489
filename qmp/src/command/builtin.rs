//! The commands every process has: negotiation, version, introspection, quit. Registered by [`super::Commands::new`].

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Commands, NoArguments};
use crate::error::QmpError;
use crate::schema::SchemaBuilder;

/// Optional parts of the protocol a client may switch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum QMPCapability {
    /// Out-of-band execution. Not offered: no command waits for another one that it would have to overtake.
    Oob,
}

/// Arguments of `qmp_capabilities`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Capabilities {
    /// What to switch on; must be among what the greeting offers.
    enable: Option<Vec<QMPCapability>>,
}

/// Result of `query-version`: describes what is written by `Version::to_value`.
#[derive(Serialize, JsonSchema)]
struct VersionInfo {
    /// The release of QEMU whose QMP is spoken.
    qemu: VersionTriple,
    /// Name and version of this program.
    package: String,
}

#[derive(Serialize, JsonSchema)]
struct VersionTriple {
    /// Major version.
    major: u32,
    /// Minor version.
    minor: u32,
    /// Micro version.
    micro: u32,
}

/// Element of the result of `query-commands`.
#[derive(Serialize, JsonSchema)]
struct CommandName {
    /// The command.
    name: String,
}

/// One command, event or type (QEMU qapi/introspect.json). Type names carry no meaning.
#[derive(Serialize, JsonSchema)]
struct SchemaInfo {
    /// Name; of a type: how others refer to it.
    name: String,
    /// `unstable`: may change without notice.
    #[serde(skip_serializing_if = "Option::is_none")]
    features: Option<Vec<String>>,
    #[serde(flatten)]
    meta: SchemaMeta,
}

#[derive(Serialize, JsonSchema)]
#[serde(tag = "meta-type", rename_all = "lowercase", rename_all_fields = "kebab-case")]
#[expect(dead_code, reason = "describes what schema::introspect writes")]
enum SchemaMeta {
    /// A predefined type.
    Builtin {
        /// Its JSON type.
        json_type: JSONType,
    },
    /// A choice of words.
    Enum {
        /// The words.
        members: Vec<SchemaInfoEnumMember>,
        /// The words again, as older clients expect them.
        values: Vec<String>,
    },
    /// A list.
    Array {
        /// Type of the elements.
        element_type: String,
    },
    /// Named members.
    Object {
        /// Those that are always there.
        members: Vec<SchemaInfoObjectMember>,
        /// The member that selects a variant.
        #[serde(skip_serializing_if = "Option::is_none")]
        tag: Option<String>,
        /// The further members by value of the tag.
        #[serde(skip_serializing_if = "Option::is_none")]
        variants: Option<Vec<SchemaInfoObjectVariant>>,
    },
    /// One of several types, told apart by the JSON type.
    Alternate {
        /// The types.
        members: Vec<SchemaInfoAlternateMember>,
    },
    /// A command.
    Command {
        /// Type of its arguments.
        arg_type: String,
        /// Type of its result.
        ret_type: String,
    },
    /// An event.
    Event {
        /// Type of its data.
        arg_type: String,
    },
}

#[derive(Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[expect(dead_code, reason = "describes what schema::introspect writes")]
enum JSONType {
    String,
    Number,
    Int,
    Boolean,
    Null,
    Object,
    Array,
    Value,
}

#[derive(Serialize, JsonSchema)]
struct SchemaInfoEnumMember {
    /// The word.
    name: String,
}

#[derive(Serialize, JsonSchema)]
struct SchemaInfoObjectMember {
    /// The member.
    name: String,
    /// Its type.
    #[serde(rename = "type")]
    ty: String,
    /// Present, and null, if the member is optional.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    default: Option<Value>,
    /// `unstable`: may change without notice.
    #[serde(skip_serializing_if = "Option::is_none")]
    features: Option<Vec<String>>,
}

#[derive(Serialize, JsonSchema)]
struct SchemaInfoObjectVariant {
    /// Value of the tag.
    case: String,
    /// The object type that holds the further members.
    #[serde(rename = "type")]
    ty: String,
}

#[derive(Serialize, JsonSchema)]
struct SchemaInfoAlternateMember {
    /// The type.
    #[serde(rename = "type")]
    ty: String,
}

pub(super) fn register<S: Clone + 'static>(commands: &mut Commands<S>, quit: impl Fn(&S) + 'static) {
    commands.register(
        "qmp_capabilities",
        "Ends the negotiation with which a session begins; no other command is accepted before it.",
        |_: S, args: Capabilities| async move {
            match args.enable.as_deref() {
                Some([QMPCapability::Oob, ..]) => Err(QmpError::generic("Capability oob not available")),
                _ => Ok(()),
            }
        },
    );
    let none = |b: &mut SchemaBuilder| b.object_from::<NoArguments>();

    let version = commands.version.to_value();
    let returns = |b: &mut SchemaBuilder| b.returns::<VersionInfo>();
    commands
        .register_value("query-version", "The version of this process.", none, returns, move |_, _| {
            std::future::ready(Ok(version.clone()))
        })
        .concurrent();

    let catalogue = commands.catalogue.clone();
    let returns = |b: &mut SchemaBuilder| b.returns::<Vec<CommandName>>();
    commands
        .register_value("query-commands", "The names of all commands.", none, returns, move |_, _| {
            std::future::ready(Ok(catalogue.names()))
        })
        .concurrent();

    let catalogue = commands.catalogue.clone();
    let returns = |b: &mut SchemaBuilder| b.returns::<Vec<SchemaInfo>>();
    commands
        .register_value(
            "query-qmp-schema",
            "The commands, events and types of this process. Generated from the structures that parse them.",
            none,
            returns,
            move |_, _| std::future::ready(Ok(catalogue.introspection())),
        )
        .concurrent();

    let returns = SchemaBuilder::empty;
    commands.register_value(
        "quit",
        "Ends the process in an orderly way: exports are closed, requests finished, data flushed.",
        none,
        returns,
        move |state: S, _| {
            quit(&state);
            std::future::ready(Ok(Value::Null))
        },
    );
}
