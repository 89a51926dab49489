//! Conversion from schemars' forms, run-time unions, checks by JSON type, limits.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use schemars::{JsonSchema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::*;

/// A child: a name or a definition, as a driver crate declares it without knowing the drivers.
struct BlockdevRef;

impl JsonSchema for BlockdevRef {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "BlockdevRef".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> schemars::Schema {
        json_schema!({"anyOf": [{"type": "string"}, {"$ref": "#/$defs/BlockdevOptions"}]})
    }
}

mod file {
    use super::*;

    #[derive(JsonSchema)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    #[allow(dead_code)]
    pub struct Options {
        /// The file.
        filename: String,
        aio: Option<Aio>,
    }

    #[derive(JsonSchema)]
    #[serde(rename_all = "snake_case")]
    #[allow(dead_code)]
    pub enum Aio {
        Threads,
        IoUring,
    }
}

mod raw {
    use super::*;

    #[derive(JsonSchema)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    #[allow(dead_code)]
    pub struct Options {
        file: BlockdevRef,
        offset: Option<u64>,
    }
}

#[derive(JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[allow(dead_code)]
struct Common {
    driver: String,
    node_name: Option<String>,
    #[serde(default)]
    read_only: bool,
}

fn blockdev(b: &mut SchemaBuilder) -> TypeRef {
    let base = b.object_from::<Common>();
    // The drivers' schemas come as values, each with a type called Options.
    let variants =
        [("file", schemars::schema_for!(file::Options)), ("raw", schemars::schema_for!(raw::Options))].map(
            |(name, schema)| {
                (name.to_owned(), b.from_schema(&format!("{name}-options"), &schema), String::new())
            },
        );
    b.union("BlockdevOptions", "A node.", "driver", base, variants.into())
}

#[test]
fn a_union_over_a_registry_is_recursive() {
    let mut b = SchemaBuilder::new();
    let ty = blockdev(&mut b);
    let schema = b.finish();
    assert_eq!(schema.problems(), &[] as &[String]);
    let good = json!({"driver": "raw", "node-name": "a", "file": {"driver": "raw", "file": {"driver": "file",
        "filename": "x", "aio": "io_uring"}}, "read-only": true});
    assert_eq!(schema.check(ty, good.clone(), Syntax::Json), Ok(good));
    let keyval = json!({"driver": "raw", "file": {"driver": "file", "filename": "x"}, "offset": "0x10", "read-only": "on"});
    assert_eq!(
        schema.check(ty, keyval, Syntax::Keyval),
        Ok(
            json!({"driver": "raw", "read-only": true, "file": {"driver": "file", "filename": "x"}, "offset": 16})
        )
    );
    let bad = [
        (json!({}), "Parameter 'driver' is missing"),
        (json!({"driver": "x"}), "Parameter 'driver' does not accept value 'x'"),
        (json!({"driver": 1}), "Invalid parameter type for 'driver', expected: string"),
        (json!({"driver": "raw"}), "Parameter 'file' is missing"),
        (json!({"driver": "raw", "file": 1}), "Invalid parameter type for 'file', expected: BlockdevRef"),
        (json!({"driver": "raw", "file": {"driver": "file"}}), "Parameter 'file.filename' is missing"),
        (
            json!({"driver": "raw", "file": {"driver": "raw", "file": {"driver": "file", "filename": "x", "bar": 1}}}),
            "Parameter 'file.file.bar' is unexpected",
        ),
        (json!({"driver": "file", "filename": "x", "file": "y"}), "Parameter 'file' is unexpected"),
        (
            json!({"driver": "raw", "file": {"driver": "file", "filename": "x", "aio": "zz"}}),
            "Parameter 'file.aio' does not accept value 'zz'",
        ),
    ];
    for (value, expected) in bad {
        assert_eq!(schema.check(ty, value.clone(), Syntax::Json).unwrap_err().desc, expected, "{value}");
    }
}

#[test]
fn nesting_is_bounded() {
    let mut b = SchemaBuilder::new();
    let ty = blockdev(&mut b);
    let schema = b.finish();
    let nested = |n: usize| {
        (0..n).fold(
            json!({"driver": "file", "filename": "x"}),
            |inner, _| json!({"driver": "raw", "file": inner}),
        )
    };
    assert!(schema.check(ty, nested(MAX_DEPTH - 1), Syntax::Json).is_ok());
    let error = schema.check(ty, nested(500), Syntax::Json).unwrap_err();
    assert!(error.desc.ends_with("is nested more than 64 levels deep"), "{error}");
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Flattened {
    id: String,
    #[serde(flatten)]
    kind: Kind,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
enum Kind {
    Abort,
    Add(Pair),
}

#[derive(Serialize, Deserialize, JsonSchema)]
struct Pair {
    a: i8,
    b: Option<Box<Pair>>,
}

#[test]
fn a_flattened_union_has_base_members() {
    let mut b = SchemaBuilder::new();
    let ty = b.object_from::<Flattened>();
    let schema = b.finish();
    assert_eq!(schema.problems(), &[] as &[String]);
    for good in [
        json!({"id": "a", "type": "abort"}),
        json!({"id": "a", "type": "add", "data": {"a": -128, "b": {"a": 127}}}),
    ] {
        assert_eq!(schema.check(ty, good.clone(), Syntax::Json), Ok(good.clone()));
        serde_json::from_value::<Flattened>(good).unwrap();
    }
    let bad = [
        (json!({"id": "a", "type": "abort", "data": {}}), "Parameter 'data' is unexpected"),
        (json!({"id": "a", "type": "add"}), "Parameter 'data' is missing"),
        (json!({"id": "a", "type": "add", "data": {"a": 1, "z": 1}}), "Parameter 'data.z' is unexpected"),
        (json!({"id": "a", "type": "add", "data": {"a": 128}}), "Parameter 'data.a' expects int8_t"),
        (json!({"type": "abort"}), "Parameter 'id' is missing"),
    ];
    for (value, expected) in bad {
        assert_eq!(schema.check(ty, value.clone(), Syntax::Json).unwrap_err().desc, expected, "{value}");
    }
}

#[test]
fn sizes_and_integers_of_the_command_line() {
    #[derive(JsonSchema)]
    #[allow(dead_code)]
    struct Sizes {
        #[schemars(extend("format" = "size"))]
        s: Option<u64>,
        i: Option<i64>,
        n: Option<f64>,
        #[schemars(range(min = 1, max = 256))]
        r: Option<u16>,
    }
    let mut b = SchemaBuilder::new();
    let ty = b.object_from::<Sizes>();
    let schema = b.finish();
    let good = [
        ("s", "1k", json!(1024)),
        ("s", "1.5K", json!(1536)),
        ("s", "12", json!(12)),
        ("s", "12b", json!(12)),
        ("s", "0x10", json!(16)),
        ("s", "15E", json!(15_u64 << 60)),
        ("i", "-5", json!(-5)),
        ("i", "0X1f", json!(31)),
        ("i", "010", json!(10)),
        ("n", "1.5", json!(1.5)),
        ("r", "256", json!(256)),
    ];
    for (key, text, expected) in good {
        let checked = schema.check(ty, json!({key: text}), Syntax::Keyval);
        assert_eq!(checked, Ok(json!({key: expected})), "{key}={text}");
    }
    let bad = [
        ("s", "16E", "a size"),
        ("s", "-1", "a size"),
        ("s", "1x", "a size"),
        ("s", "", "a size"),
        ("s", "k", "a size"),
        ("s", ".5k", "a size"),
        ("s", "1.5", "a size"),
        ("s", "0x10k", "a size"),
        ("s", "99999999999999999999E", "a size"),
        ("i", "1k", "integer"),
        ("i", " 1", "integer"),
        ("i", "--1", "integer"),
        ("i", "0x-1", "integer"),
        ("i", "1.0", "integer"),
        ("n", "x", "a number"),
        ("r", "0", "an integer from 1 to 256"),
        ("r", "257", "an integer from 1 to 256"),
    ];
    for (key, text, expected) in bad {
        let error = schema.check(ty, json!({key: text}), Syntax::Keyval).unwrap_err();
        assert_eq!(error.desc, format!("Parameter '{key}' expects {expected}"), "{key}={text}");
    }
    let error = schema.check(ty, json!({"i": u64::MAX}), Syntax::Json).unwrap_err();
    assert_eq!(error.desc, "Invalid parameter type for 'i', expected: integer");
}

#[test]
fn what_qapi_cannot_say_is_a_problem() {
    #[derive(JsonSchema)]
    #[allow(dead_code)]
    enum External {
        A(u8),
        B { x: u8 },
    }
    #[derive(JsonSchema)]
    #[allow(dead_code)]
    struct Holder {
        e: External,
        unknown: BlockdevRef,
    }
    #[derive(Serialize, JsonSchema)]
    #[allow(dead_code)]
    struct Nulls {
        maybe: Option<String>,
    }
    let mut b = SchemaBuilder::new();
    b.object_from::<Holder>();
    b.returns::<Nulls>();
    let problems = b.finish().problems;
    assert_eq!(problems.len(), 3, "{problems:?}");
    assert!(problems[0].contains("External"), "{problems:?}");
    assert!(problems[1].contains("Nulls.maybe"), "{problems:?}");
    assert!(problems[2].contains("BlockdevOptions"), "{problems:?}");
}

#[test]
fn types_of_one_name_stay_apart() {
    let mut b = SchemaBuilder::new();
    let first = b.object_from::<file::Options>();
    let second = b.object_from::<raw::Options>();
    let again = b.object_from::<file::Options>();
    assert_ne!(first, second);
    assert_eq!(first, again);
    let names = |b: &SchemaBuilder, ty| match &b.schema().get(ty).shape {
        Shape::Object(o) => o.members.iter().map(|m| m.name.clone()).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    assert_eq!(names(&b, first), ["filename", "aio"]);
    assert_eq!(names(&b, second), ["file", "offset"]);
}

#[test]
fn introspection_of_a_recursive_type_ends() {
    let mut b = SchemaBuilder::new();
    let args = blockdev(&mut b);
    let returns = b.empty();
    let list = b.array(args);
    let schema = b.finish();
    let commands = [("blockdev-add", args), ("blockdev-reopen", list)].map(|(name, args)| CommandInfo {
        name: name.to_owned(),
        doc: String::new(),
        args,
        returns,
    });
    let infos = introspect::introspect(&schema, &commands, &[]);
    let find = |name: &Value| infos.as_array().unwrap().iter().find(|i| i["name"] == *name).unwrap().clone();
    let add = find(&json!("blockdev-add"));
    let options = find(&add["arg-type"]);
    assert_eq!(options["tag"], "driver");
    let cases: Vec<&str> =
        options["variants"].as_array().unwrap().iter().map(|v| v["case"].as_str().unwrap()).collect();
    assert_eq!(cases, ["file", "raw"]);
    let driver = find(&options["members"][0]["type"]);
    assert_eq!((driver["meta-type"].as_str(), &driver["values"]), (Some("enum"), &json!(["file", "raw"])));
    // raw -> file member -> alternate of string and the union itself
    let raw = find(&options["variants"][1]["type"]);
    let child = find(&raw["members"][0]["type"]);
    assert_eq!(child["meta-type"], "alternate");
    let members: Vec<&Value> = child["members"].as_array().unwrap().iter().map(|m| &m["type"]).collect();
    assert_eq!(members, [&json!("str"), &options["name"]]);
    let array = find(&find(&json!("blockdev-reopen"))["arg-type"]);
    assert_eq!(array["element-type"], options["name"]);
    assert_eq!(raw["members"][1], json!({"name": "offset", "type": "int", "default": null}));
}
