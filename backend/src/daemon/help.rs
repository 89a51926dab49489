//! `--blockdev help`, `--object iothread,help` and the like: made from the structs that parse.
//!
//! Called by `main` instead of a start.

use graph::{CommonOptions, Registry};
use schemars::{JsonSchema, schema_for};
use serde_json::Value;

use super::objects::IoThreadProperties;
use super::secret::SecretProperties;
use super::throttle::ThrottleGroupProperties;
use crate::export::options::VhostUserBlkOptions;
use crate::process::cli::HelpTopic;
use crate::process::help;

fn schema<T: JsonSchema>() -> Value {
    schema_for!(T).to_value()
}

/// The text.
///
/// # Errors
/// There is no such driver or type.
pub fn text(topic: &HelpTopic) -> Result<String, String> {
    let registry = Registry::new(drivers::ALL.iter().copied());
    let unknown = |s: &str| format!("--{}: there is no '{s}'; see --{} help", topic.option, topic.option);
    match (topic.option, topic.subject.as_deref()) {
        ("blockdev", None) => {
            let entries: Vec<(&str, &str)> = registry.iter().map(|d| (d.name, "")).collect();
            Ok(help::list("Drivers (see --blockdev DRIVER,help)", entries))
        }
        ("blockdev", Some(name)) => {
            let def = registry.get(name).ok_or_else(|| unknown(name))?;
            let own = help::members(name, &(def.schema)().to_value());
            Ok(own + &help::members("Every node's", &schema::<CommonOptions>()))
        }
        ("export", None) => Ok(help::list("Export types (see --export TYPE,help)", [("vhost-user-blk", "")])),
        ("export", Some(name @ "vhost-user-blk")) => {
            Ok(help::members(name, &schema::<VhostUserBlkOptions>()))
        }
        ("object", None) => {
            let types = [("iothread", ""), ("secret", ""), ("throttle-group", "")];
            Ok(help::list("Object types (see --object TYPE,help)", types))
        }
        ("object", Some(name @ "iothread")) => Ok(help::members(name, &schema::<IoThreadProperties>())),
        ("object", Some(name @ "secret")) => Ok(help::members(name, &schema::<SecretProperties>())),
        ("object", Some(name @ "throttle-group")) => {
            Ok(help::members(name, &schema::<ThrottleGroupProperties>()))
        }
        (_, Some(name)) => Err(unknown(name)),
        (option, None) => Err(format!("--{option}: no help is available")),
    }
}
