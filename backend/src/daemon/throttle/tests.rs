//! Properties of throttle groups, as a control client gives and gets them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::*;

fn properties_of(value: Value) -> Result<ThrottleGroup, String> {
    let p: ThrottleGroupProperties = serde_json::from_value(value).map_err(|e| e.to_string())?;
    make(&p).map_err(|e| e.desc)
}

#[test]
fn every_limit_can_be_given_in_both_ways_and_is_told() {
    for name in Limits::names() {
        // What goes along with it, so that it may be set at all.
        let base = name.trim_end_matches("-length").trim_end_matches("-max").to_owned();
        let mut limits = serde_json::Map::new();
        if name == "iops-size" {
            limits.insert("iops-total".to_owned(), json!(7));
        } else if name != base {
            limits.insert(base.clone(), json!(7));
            limits.insert(format!("{base}-max"), json!(9));
        }
        limits.insert(name.clone(), json!(11));
        let together = properties_of(json!({"id": "t", "limits": limits})).unwrap();
        let single: serde_json::Map<String, Value> = limits
            .iter()
            .map(|(n, v)| (format!("x-{n}"), v.clone()))
            .chain([("id".to_owned(), json!("t"))])
            .collect();
        let single = properties_of(Value::Object(single)).unwrap();
        for group in [&together, &single] {
            assert_eq!(get(group, "limits").unwrap()[&name], json!(11), "{name}");
            assert_eq!(get(group, &format!("x-{name}")).unwrap(), json!(11), "{name}");
        }
        assert_eq!(together.limits(), single.limits(), "{name}");
    }
}

#[test]
fn what_is_told_is_what_the_schema_has() {
    let group = properties_of(json!({"id": "t"})).unwrap();
    let told = get(&group, "limits").unwrap();
    let names: Vec<&String> = told.as_object().unwrap().keys().collect();
    assert_eq!(names.len(), 19);
    let schema = schemars::schema_for!(ThrottleLimits).to_value();
    for name in names {
        assert!(schema["properties"].get(name).is_some(), "{name}");
    }
    for (name, _) in properties() {
        assert!(get(&group, &name).is_ok(), "{name}");
    }
}

#[test]
fn changes_are_refused_in_qemus_words() {
    let group = properties_of(json!({"id": "t", "x-bps-total": 7})).unwrap();
    let refusal = |property: &str, value: Value| set(&group, property, &value).unwrap_err().desc;
    assert_eq!(refusal("limits", json!(3)), "Invalid parameter type for 'limits', expected: object");
    assert_eq!(refusal("limits", json!({"foo": 3})), "Parameter 'limits.foo' is unexpected");
    assert_eq!(
        refusal("limits", json!({"bps-total": "3"})),
        "Invalid parameter type for 'limits.bps-total', expected: integer"
    );
    assert_eq!(
        refusal("limits", json!({"bps-read": 3})),
        "bps/iops/max total values and read/write values cannot be used at the same time"
    );
    assert_eq!(refusal("x-bps-total", json!(3)), "Property cannot be set after initialization");
    assert_eq!(refusal("x-foo", json!(3)), "Property 'throttle-group.x-foo' not found");
    assert_eq!(
        properties_of(json!({"id": "t", "x-iops-total": -1})).unwrap_err(),
        "Property values cannot be negative"
    );
    // Nothing of it has happened; and what is not named stays.
    set(&group, "limits", &json!({"bps-total-max": 9})).unwrap();
    assert_eq!(get(&group, "x-bps-total").unwrap(), json!(7));
    assert_eq!(get(&group, "x-bps-total-max").unwrap(), json!(9));
    assert_eq!(get(&group, "x-bps-read").unwrap(), json!(0));
}
