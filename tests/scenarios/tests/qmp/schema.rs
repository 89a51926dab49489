//! The schema is true: it names the commands there are, each argument is accepted by name and type and nothing else,
//! and what commands return and events carry has the form it says.

use std::collections::{BTreeMap, BTreeSet};

use client::{Error, Setup, blk, disk, qmp};
use ringblk_scenarios::{Rig, Wanted};
use serde_json::{Map, Value, json};

use crate::state::snapshot;

/// `query-qmp-schema`, by name.
pub struct Schema(BTreeMap<String, Value>);

impl Schema {
    pub fn read(client: &mut qmp::Client) -> Self {
        let list = client.execute("query-qmp-schema", json!({})).unwrap();
        let mut all = BTreeMap::new();
        for entity in list.as_array().unwrap() {
            let name = entity["name"].as_str().unwrap().to_owned();
            assert!(all.insert(name.clone(), entity.clone()).is_none(), "'{name}' is there twice");
        }
        Self(all)
    }

    pub fn get(&self, name: &Value) -> &Value {
        let name = name.as_str().unwrap_or_else(|| panic!("{name} is no name"));
        self.0.get(name).unwrap_or_else(|| panic!("type '{name}' is not defined"))
    }

    pub fn of_meta(&self, meta: &str) -> Vec<&Value> {
        self.0.values().filter(|e| e["meta-type"] == meta).collect()
    }

    /// Members of an object type, those of its variant for `tag` included.
    pub fn members(&self, object: &Value, case: Option<&str>) -> Vec<Value> {
        let mut members = object["members"].as_array().unwrap().clone();
        let variants = object["variants"].as_array().into_iter().flatten();
        for variant in variants.filter(|v| v["case"].as_str() == case) {
            members.extend(self.get(&variant["type"])["members"].as_array().unwrap().iter().cloned());
        }
        members
    }

    /// The cases of a union's tag; one `None` for a plain object.
    pub fn cases(&self, object: &Value) -> Vec<Option<String>> {
        let Some(tag) = object["tag"].as_str() else { return vec![None] };
        let tag = object["members"].as_array().unwrap().iter().find(|m| m["name"] == tag).unwrap();
        enumeration(self.get(&tag["type"])).into_iter().map(Some).collect()
    }

    /// An object with a value of the right type for each mandatory member.
    fn sample_object(&self, object: &Value, case: Option<&str>) -> Map<String, Value> {
        let mut out = Map::new();
        for member in self.members(object, case) {
            if member.get("default").is_none() {
                let name = member["name"].as_str().unwrap();
                out.insert(name.to_owned(), self.sample(self.get(&member["type"])));
            }
        }
        if let (Some(tag), Some(case)) = (object["tag"].as_str(), case) {
            out.insert(tag.to_owned(), json!(case));
        }
        out
    }

    fn sample(&self, ty: &Value) -> Value {
        match ty["meta-type"].as_str().unwrap() {
            "builtin" => match ty["json-type"].as_str().unwrap() {
                "string" => json!("sample"),
                "int" => json!(1),
                "number" => json!(0.5),
                "boolean" => json!(false),
                "null" | "value" => Value::Null,
                other => panic!("unknown JSON type {other}"),
            },
            "enum" => json!(enumeration(ty)[0]),
            "array" => json!([]),
            "alternate" => self.sample(self.get(&ty["members"][0]["type"])),
            "object" => Value::Object(self.sample_object(ty, self.cases(ty)[0].as_deref())),
            other => panic!("unknown meta-type {other}"),
        }
    }

    /// Checks that `value` has the form of type `name`.
    fn check(&self, name: &Value, value: &Value, at: &str) {
        let ty = self.get(name);
        match ty["meta-type"].as_str().unwrap() {
            "builtin" => {
                let fits = match ty["json-type"].as_str().unwrap() {
                    "string" => value.is_string(),
                    "int" => value.is_i64() || value.is_u64(),
                    "number" => value.is_number(),
                    "boolean" => value.is_boolean(),
                    "null" => value.is_null(),
                    _ => true,
                };
                assert!(fits, "{at}: {value} is no {ty}");
            }
            "enum" => {
                let values = enumeration(ty);
                assert!(
                    value.as_str().is_some_and(|v| values.iter().any(|k| k == v)),
                    "{at}: {value} not in {values:?}"
                );
            }
            "array" => {
                let items = value.as_array().unwrap_or_else(|| panic!("{at}: {value} is no array"));
                items
                    .iter()
                    .enumerate()
                    .for_each(|(i, v)| self.check(&ty["element-type"], v, &format!("{at}.{i}")));
            }
            "object" => {
                let object = value.as_object().unwrap_or_else(|| panic!("{at}: {value} is no object"));
                let case = ty["tag"].as_str().map(|tag| object[tag].as_str().unwrap());
                let members = self.members(ty, case);
                for member in &members {
                    let name = member["name"].as_str().unwrap();
                    match object.get(name) {
                        Some(v) => self.check(&member["type"], v, &format!("{at}.{name}")),
                        None => {
                            assert!(member.get("default").is_some(), "{at}: '{name}' is missing in {value}")
                        }
                    }
                }
                for name in object.keys() {
                    assert!(
                        members.iter().any(|m| m["name"] == name.as_str()),
                        "{at}: '{name}' is not in the schema"
                    );
                }
            }
            other => panic!("{at}: a value of meta-type {other}"),
        }
    }
}

fn enumeration(ty: &Value) -> Vec<String> {
    ty["members"].as_array().unwrap().iter().map(|m| m["name"].as_str().unwrap().to_owned()).collect()
}

/// Sends arguments that are wrong in one place; what is said about them.
fn complaint(client: &mut qmp::Client, command: &str, arguments: &Value) -> String {
    crate::refusal(client, command, arguments.clone()).1
}

/// Tries each member of an object type with a wrong type, and one member that does not exist. `build` wraps the object
/// into the command's arguments; `path` is how errors name the place.
fn try_object(
    schema: &Schema,
    client: &mut qmp::Client,
    command: &str,
    object: &Value,
    path: &str,
    build: &dyn Fn(Value) -> Value,
) -> usize {
    let mut tried = 0;
    for case in schema.cases(object) {
        let sample = schema.sample_object(object, case.as_deref());
        let mut bogus = sample.clone();
        bogus.insert("no-such-member".into(), json!(1));
        let said = complaint(client, command, &build(Value::Object(bogus)));
        assert_eq!(said, format!("Parameter '{path}no-such-member' is unexpected"), "{command} {case:?}");
        for member in schema.members(object, case.as_deref()) {
            let name = member["name"].as_str().unwrap();
            let ty = schema.get(&member["type"]);
            let place = format!("{path}{name}");
            let (meta, json_type) = (ty["meta-type"].as_str().unwrap(), ty["json-type"].as_str());
            if json_type == Some("value") || object["tag"] == name {
                continue;
            }
            let mut wrong = sample.clone();
            wrong.insert(name.into(), if json_type == Some("boolean") { json!([]) } else { json!(true) });
            let said = complaint(client, command, &build(Value::Object(wrong)));
            let expected = format!("Invalid parameter type for '{place}', expected: ");
            assert!(said.starts_with(&expected), "{command} {case:?} '{place}': {said}");
            tried += 1;
            if meta == "enum" {
                let mut wrong = sample.clone();
                wrong.insert(name.into(), json!("no-such-value"));
                let said = complaint(client, command, &build(Value::Object(wrong)));
                assert_eq!(said, format!("Parameter '{place}' does not accept value 'no-such-value'"));
            }
            if member.get("default").is_none() {
                let mut short = sample.clone();
                short.remove(name);
                let said = complaint(client, command, &build(Value::Object(short)));
                assert_eq!(said, format!("Parameter '{place}' is missing"), "{command} {case:?}");
            }
            let sample = sample.clone();
            if meta == "object" {
                tried += try_object(schema, client, command, ty, &format!("{place}."), &|inner| {
                    let mut outer = sample.clone();
                    outer.insert(name.into(), inner);
                    build(Value::Object(outer))
                });
            } else if meta == "array" {
                let element = schema.get(&ty["element-type"]);
                if element["meta-type"] != "object" {
                    continue;
                }
                tried += try_object(schema, client, command, element, &format!("{place}[0]."), &|inner| {
                    let mut outer = sample.clone();
                    outer.insert(name.into(), json!([inner]));
                    build(Value::Object(outer))
                });
            }
        }
    }
    tried
}

#[test]
fn the_schema_and_the_list_of_commands_agree() {
    let mut rig = Rig::start(&[]);
    let schema = Schema::read(&mut rig.qmp);
    let listed = rig.command("query-commands", json!({}));
    let listed: BTreeSet<&str> =
        listed.as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()).collect();
    let known: BTreeSet<&str> =
        schema.of_meta("command").iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(listed, known);
    for wanted in [
        "qmp_capabilities",
        "query-version",
        "query-commands",
        "query-qmp-schema",
        "quit",
        "object-add",
        "object-del",
        "qom-get",
        "qom-set",
        "qom-list",
        "query-iothreads",
        "blockdev-add",
        "blockdev-del",
        "block_resize",
        "query-named-block-nodes",
        "query-blockstats",
        "x-debug-query-block-graph",
        "block-export-add",
        "block-export-del",
        "query-block-exports",
    ] {
        assert!(listed.contains(wanted), "{wanted} is missing");
    }
    let events: BTreeSet<&str> =
        schema.of_meta("event").iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert!(events.is_superset(&["BLOCK_EXPORT_DELETED", "BLOCK_IO_ERROR"].into()), "{events:?}");
    // Every type that is referred to is defined.
    for entity in schema.0.values() {
        for key in ["arg-type", "ret-type", "element-type"] {
            if let Some(name) = entity.get(key) {
                schema.get(name);
            }
        }
        for list in ["members", "variants"] {
            for name in entity[list].as_array().into_iter().flatten().filter_map(|m| m.get("type")) {
                schema.get(name);
            }
        }
    }
}

#[test]
fn every_argument_is_accepted_by_its_name_and_type_only_and_the_attempts_change_nothing() {
    let mut rig = Rig::start_with(&[Wanted::file("e", 1 << 20)], &["--object", "iothread,id=t0"]);
    let schema = Schema::read(&mut rig.qmp);
    let before = snapshot(&mut rig.qmp);
    let mut tried = 0;
    for command in schema.of_meta("command") {
        let name = command["name"].as_str().unwrap();
        // After the negotiation it is not even looked at.
        if name == "qmp_capabilities" {
            continue;
        }
        tried += try_object(&schema, &mut rig.qmp, name, schema.get(&command["arg-type"]), "", &|v| v);
    }
    assert!(tried > 50, "only {tried} members were tried");
    assert_eq!(snapshot(&mut rig.qmp), before);
    rig.assert_running();
}

#[test]
fn what_commands_return_has_the_form_the_schema_says() {
    let mut rig = Rig::start_with(&[Wanted::file("e", 1 << 20)], &["--object", "iothread,id=t0"]);
    let schema = Schema::read(&mut rig.qmp);
    let mut disk = rig.disk("e", &Setup::default());
    disk.write(0, &[1; 4096]).unwrap();
    let raw =
        json!({"driver": "raw", "node-name": "r", "size": 4096, "file": {"driver": "null-co", "size": 8192}});
    for (command, arguments) in [
        ("query-version", json!({})),
        ("query-commands", json!({})),
        ("query-qmp-schema", json!({})),
        ("blockdev-add", raw),
        ("query-named-block-nodes", json!({})),
        ("query-named-block-nodes", json!({"flat": true})),
        ("query-blockstats", json!({})),
        ("query-blockstats", json!({"query-nodes": true})),
        ("query-block-exports", json!({})),
        ("x-debug-query-block-graph", json!({})),
        ("query-iothreads", json!({})),
        ("qom-list", json!({"path": "/objects/t0"})),
        ("qom-get", json!({"path": "t0", "property": "poll-max-ns"})),
        ("qom-set", json!({"path": "t0", "property": "poll-max-ns", "value": 5})),
        ("object-add", json!({"qom-type": "iothread", "id": "t1"})),
        ("object-del", json!({"id": "t1"})),
        ("block_resize", json!({"node-name": "node-e", "size": 2 << 20})),
        ("blockdev-del", json!({"node-name": "r"})),
    ] {
        let value = rig.command(command, arguments);
        let entity = schema.get(&json!(command));
        schema.check(&entity["ret-type"], &value, command);
    }
    drop(disk);
    rig.wait_disconnected("e");
    rig.command("block-export-del", json!({"id": "e"}));
    let event = rig.qmp.wait_event("BLOCK_EXPORT_DELETED").unwrap();
    schema.check(&schema.get(&event["event"])["arg-type"], &event["data"], "BLOCK_EXPORT_DELETED");
    // An export over something that refuses: see `events` for what it means.
    let name = crate::events::breakable(&mut rig);
    let mut disk = rig.disk(&name, &Setup::default());
    let request = disk::Request::new(blk::op::OUT, 0, disk::Payload::Out(vec![1; 512]));
    assert_eq!(disk.run(0, &request).unwrap().status, blk::status::IOERR);
    let event = rig.qmp.wait_event("BLOCK_IO_ERROR").unwrap();
    schema.check(&schema.get(&event["event"])["arg-type"], &event["data"], "BLOCK_IO_ERROR");
    assert!(matches!(rig.qmp.execute("query-version", json!({"x": 1})), Err(Error::Qmp { .. })));
}
