//! The registry: built-in commands, arguments and results, and that introspection is what the parser does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::RefCell;
use std::task::{Context, Poll, Waker};

use serde::Deserialize;

use super::*;
use crate::schema::{Shape, Syntax};

#[derive(Clone, Default)]
struct State {
    log: Rc<RefCell<Vec<String>>>,
}

/// Arguments with one of everything; read through `Debug`.
#[allow(dead_code)]
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Everything {
    /// A name.
    node_name: String,
    /// A size.
    #[schemars(extend("format" = "size"))]
    size: u64,
    small: Option<u16>,
    #[serde(default)]
    flag: bool,
    mode: Option<Mode>,
    cache: Option<Cache>,
    list: Option<Vec<Cache>>,
    target: Option<Target>,
    addr: Option<Address>,
}

#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum Mode {
    Safe,
    /// At once.
    Hard,
}

#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Cache {
    direct: Option<bool>,
}

#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(untagged)]
enum Target {
    Name(String),
    Inline(Cache),
    Nothing(()),
}

#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
enum Address {
    Unix { path: String },
    Fd { str: String },
    Nowhere,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Answer {
    text: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    more: Option<u8>,
}

fn table(state: &State) -> Rc<CommandTable<State>> {
    let _ = state;
    let mut commands = Commands::new(Version::default(), |s: &State| s.log.borrow_mut().push("quit".into()));
    commands.register("everything", "Has everything.", |s: State, a: Everything| async move {
        s.log.borrow_mut().push(format!("{a:?}"));
        Ok(Answer { text: a.node_name, more: None })
    });
    commands.register("fails", "Fails.", |_: State, _: NoArguments| async move {
        Err::<(), _>(QmpError::device_not_found("d"))
    });
    commands.event::<crate::event::BlockIoError>();
    commands.finish()
}

fn now(future: HandlerFuture) -> Result<Value, QmpError> {
    let mut future = future;
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(r) => r,
        Poll::Pending => panic!("pending"),
    }
}

fn call(name: &str, args: Value) -> Result<Value, QmpError> {
    let state = State::default();
    let Value::Object(args) = args else { panic!("not an object") };
    table(&state).call(state, name, args).and_then(now)
}

#[test]
fn builtins_answer() {
    assert_eq!(call("qmp_capabilities", json!({})).unwrap(), json!({}));
    assert_eq!(call("qmp_capabilities", json!({"enable": []})).unwrap(), json!({}));
    assert_eq!(
        call("qmp_capabilities", json!({"enable": ["oob"]})).unwrap_err().desc,
        "Capability oob not available"
    );
    let version = call("query-version", json!({})).unwrap();
    assert_eq!(version["qemu"], json!({"major": 10, "minor": 0, "micro": 2}));
    let names = call("query-commands", json!({})).unwrap();
    assert!(names.as_array().unwrap().contains(&json!({"name": "query-qmp-schema"})));
    assert_eq!(call("nope", json!({})).unwrap_err(), QmpError::command_not_found("nope"));
    assert_eq!(call("fails", json!({})).unwrap_err().class.as_str(), "DeviceNotFound");
    assert_eq!(call("query-version", json!({"a": 1})).unwrap_err().desc, "Parameter 'a' is unexpected");
}

#[test]
fn quit_calls_the_hook() {
    let state = State::default();
    now(table(&state).call(state.clone(), "quit", Map::new()).unwrap()).unwrap();
    assert_eq!(*state.log.borrow(), ["quit"]);
}

#[test]
fn nothing_runs_before_the_future_is_polled() {
    let state = State::default();
    let call = table(&state).call(state.clone(), "quit", Map::new()).unwrap();
    assert!(state.log.borrow().is_empty());
    drop(call);
    assert!(state.log.borrow().is_empty());
}

#[test]
fn json_and_keyval_give_the_same_arguments() {
    let state = State::default();
    let t = table(&state);
    let json = json!({"node-name": "a", "size": 10240, "small": 7, "flag": true, "mode": "hard",
        "cache": {"direct": false}, "list": [{"direct": true}, {}], "addr": {"type": "unix", "path": "a,b"}});
    // An element without members cannot be written in keyval.
    let Value::Object(mut map) = json else { panic!() };
    map["list"] = json!([{"direct": true}, {"direct": false}]);
    now(t.call(state.clone(), "everything", map).unwrap()).unwrap();
    let text = "a,size=10k,small=0x7,flag=on,mode=hard,cache.direct=off,list.0.direct=yes,list.1.direct=n,\
                addr.type=unix,addr.path=a,,b";
    now(t.call_option(state.clone(), "everything", text, "node-name").unwrap()).unwrap();
    let log = state.log.borrow();
    assert_eq!(log[0], log[1]);
}

#[test]
fn errors_name_the_path() {
    let cases = [
        (json!({"size": 1}), "Parameter 'node-name' is missing"),
        (json!({"node-name": "a", "size": "1"}), "Invalid parameter type for 'size', expected: integer"),
        (json!({"node-name": "a", "size": 1.5}), "Invalid parameter type for 'size', expected: integer"),
        (json!({"node-name": "a", "size": -1}), "Parameter 'size' expects a size"),
        (json!({"node-name": 1, "size": 1}), "Invalid parameter type for 'node-name', expected: string"),
        (json!({"node-name": "a", "size": 1, "small": 65536}), "Parameter 'small' expects uint16_t"),
        (
            json!({"node-name": "a", "size": 1, "flag": "on"}),
            "Invalid parameter type for 'flag', expected: boolean",
        ),
        (
            json!({"node-name": "a", "size": 1, "flag": null}),
            "Invalid parameter type for 'flag', expected: boolean",
        ),
        (
            json!({"node-name": "a", "size": 1, "small": null}),
            "Invalid parameter type for 'small', expected: integer",
        ),
        (json!({"node-name": "a", "size": 1, "mode": "x"}), "Parameter 'mode' does not accept value 'x'"),
        (json!({"node-name": "a", "size": 1, "cache": {"x": 1}}), "Parameter 'cache.x' is unexpected"),
        (
            json!({"node-name": "a", "size": 1, "cache": []}),
            "Invalid parameter type for 'cache', expected: object",
        ),
        (
            json!({"node-name": "a", "size": 1, "list": [{}, {"direct": 1}]}),
            "Invalid parameter type for 'list[1].direct', expected: boolean",
        ),
        (
            json!({"node-name": "a", "size": 1, "list": {}}),
            "Invalid parameter type for 'list', expected: array",
        ),
        (
            json!({"node-name": "a", "size": 1, "target": 1}),
            "Invalid parameter type for 'target', expected: Target",
        ),
        (json!({"node-name": "a", "size": 1, "addr": {}}), "Parameter 'addr.type' is missing"),
        (json!({"node-name": "a", "size": 1, "addr": {"type": "unix"}}), "Parameter 'addr.path' is missing"),
        (
            json!({"node-name": "a", "size": 1, "addr": {"type": "fd", "str": "1", "path": "/"}}),
            "Parameter 'addr.path' is unexpected",
        ),
        (json!({"node-name": "a", "size": 1, "zz": 1}), "Parameter 'zz' is unexpected"),
    ];
    for (args, expected) in cases {
        assert_eq!(call("everything", args.clone()).unwrap_err().desc, expected, "{args}");
    }
    let state = State::default();
    let t = table(&state);
    let keyval = [
        ("a,size=x", "Parameter 'size' expects a size"),
        ("a,size=1,small=1k", "Parameter 'small' expects integer"),
        ("a,size=1,flag=1", "Parameter 'flag' expects 'on' or 'off'"),
        ("a,size=1,list.0.direct=2", "Parameter 'list.0.direct' expects 'on' or 'off'"),
        ("a,size=1,cache=x", "Invalid parameter type for 'cache', expected: object"),
        ("a,size=1,help", "Help is not available for this option"),
        ("{\"node-name\":\"a\",\"size\":\"1k\"}", "Invalid parameter type for 'size', expected: integer"),
    ];
    for (text, expected) in keyval {
        let error = t.call_option(state.clone(), "everything", text, "node-name").err().unwrap();
        assert_eq!(error.desc, expected, "{text}");
    }
}

/// A value of a type, made from the schema alone: every member, or only the required ones.
fn sample(schema: &crate::schema::Schema, ty: TypeRef, all: bool, depth: usize) -> Value {
    match &schema.get(ty).shape {
        Shape::String => json!("x"),
        Shape::Int(int) => json!(i64::try_from(int.min.unwrap_or(0).max(0)).unwrap()),
        Shape::Number => json!(0.5),
        Shape::Bool => json!(true),
        Shape::Null => Value::Null,
        Shape::Any | Shape::Undefined => json!({"any": 1}),
        Shape::Enum(values) => json!(values[0].name),
        Shape::Array(element) if depth < 4 => json!([sample(schema, *element, all, depth + 1)]),
        Shape::Array(_) => json!([]),
        Shape::Alternate(members) => sample(schema, members[0], all, depth + 1),
        Shape::Object(object) => {
            let mut map = Map::new();
            for m in &object.members {
                if !m.optional || (all && depth < 4) {
                    map.insert(m.name.clone(), sample(schema, m.ty, all, depth + 1));
                }
            }
            if let Some(union) = &object.union {
                let (case, ty, _) = &union.variants[0];
                map.insert(union.tag.clone(), json!(case));
                if let Value::Object(more) = sample(schema, *ty, all, depth + 1) {
                    map.extend(more);
                }
            }
            Value::Object(map)
        }
    }
}

#[test]
fn introspection_is_what_the_parser_does() {
    let state = State::default();
    let t = table(&state);
    assert_eq!(t.schema().problems(), &[] as &[String]);
    let infos = t.introspection().as_array().unwrap().clone();
    let find = |name: &str| infos.iter().find(|i| i["name"] == name).cloned().unwrap();
    let mut seen = 0;
    for command in t.commands() {
        seen += 1;
        let shown = find(&command.name);
        assert_eq!(shown["meta-type"], "command");
        let args = find(shown["arg-type"].as_str().unwrap());
        find(shown["ret-type"].as_str().unwrap());
        for all in [true, false] {
            let value = sample(t.schema(), command.args, all, 0);
            let Value::Object(map) = value.clone() else { panic!() };
            // Every member introspection shows is in the fullest sample, and the parser takes it.
            if all {
                for member in args["members"].as_array().unwrap() {
                    assert!(map.contains_key(member["name"].as_str().unwrap()), "{} {member}", command.name);
                }
            }
            t.schema().check(command.args, value.clone(), Syntax::Json).unwrap();
            assert!(t.call(state.clone(), &command.name, map.clone()).is_ok());
            // The handler's own struct takes it too.
            if command.name == "everything" {
                now(t.call(state.clone(), &command.name, map.clone()).unwrap()).unwrap();
            }
            let mut unknown = map.clone();
            unknown.insert("no-such-member".into(), json!(1));
            let error = t.call(state.clone(), &command.name, unknown).err().unwrap();
            assert_eq!(error.desc, "Parameter 'no-such-member' is unexpected");
            for member in args["members"].as_array().unwrap() {
                if member.get("default").is_none() {
                    let name = member["name"].as_str().unwrap();
                    let mut less = map.clone();
                    less.shift_remove(name).unwrap();
                    let error = t.call(state.clone(), &command.name, less).err().unwrap();
                    assert_eq!(error.desc, format!("Parameter '{name}' is missing"));
                }
            }
        }
    }
    assert_eq!(seen, 7);
}

#[test]
fn every_name_in_the_introspection_is_defined_once() {
    fn names<'a>(info: &'a Value, out: &mut Vec<&'a str>) {
        for key in ["type", "arg-type", "ret-type", "element-type"] {
            out.extend(info.get(key).and_then(Value::as_str));
        }
        for key in ["members", "variants"] {
            info.get(key).and_then(Value::as_array).into_iter().flatten().for_each(|i| names(i, out));
        }
    }
    let t = table(&State::default());
    let infos = t.introspection().as_array().unwrap();
    let mut used = Vec::new();
    for info in infos {
        names(info, &mut used);
        assert_eq!(infos.iter().filter(|i| i["name"] == info["name"]).count(), 1, "{info}");
    }
    for name in used {
        assert!(infos.iter().any(|i| i["name"] == name), "{name}");
    }
    let event = infos.iter().find(|i| i["name"] == "BLOCK_IO_ERROR").unwrap();
    assert_eq!(event["meta-type"], "event");
}

/// The answers of the built-in commands are of the type that introspection says: checked with the argument checker.
#[test]
fn answers_are_of_their_type() {
    let state = State::default();
    let t = table(&state);
    for name in ["query-version", "query-commands", "query-qmp-schema", "quit", "qmp_capabilities"] {
        let info = t.commands().iter().find(|c| c.name == name).unwrap();
        let answer = now(t.call(state.clone(), name, Map::new()).unwrap()).unwrap();
        // `default: null` is the one null in QMP that stands for a presence.
        let text = answer.to_string().replace("\"default\":null", "\"default\":0");
        let answer = serde_json::from_str(&text).unwrap();
        t.schema().check(info.returns, answer, Syntax::Json).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn the_reference_has_every_command_and_doc() {
    let page = table(&State::default()).reference_markdown();
    for text in [
        "### everything",
        "Has everything.",
        "| `node-name` | string | A name. |",
        "| `size` | size | A size. |",
        "### BLOCK_IO_ERROR",
        "* `hard`: At once.",
        "### qmp_capabilities",
        "#### type: unix",
    ] {
        assert!(page.contains(text), "{text}\n{page}");
    }
}
