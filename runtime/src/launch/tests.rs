//! Any change of a configuration is refused with a reason or understood, before anything is made.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// A configuration that has something in every section.
fn full() -> Value {
    serde_json::from_str(include_str!("full.json")).unwrap()
}

fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    let mut enter = |name: &str, value: &Value| {
        let at = format!("{at}/{}", name.replace('~', "~0").replace('/', "~1"));
        pointers(value, &at, found);
        found.push(at);
    };
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| enter(name, value)),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(index, value)| enter(&index.to_string(), value))
        }
        _ => {}
    }
}

fn some_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        prop::sample::select(vec![
            Value::Null,
            json!(true),
            json!(-1),
            json!(0),
            json!(u32::MAX),
            json!(u64::MAX),
            json!(i64::MIN),
            json!(1e300),
            json!(""),
            json!("/"),
            json!(".."),
            json!("a\0b"),
            json!("/proc/self/fd/3"),
            json!([]),
            json!({}),
            json!([null]),
        ]),
        any::<i64>().prop_map(|number| json!(number)),
        ".{0,40}".prop_map(|text| json!(text)),
        // Something that belongs elsewhere.
        any::<prop::sample::Index>().prop_map(|index| {
            let mut places = Vec::new();
            pointers(&full(), "", &mut places);
            full().pointer(&places[index.index(places.len())]).unwrap().clone()
        }),
    ]
}

fn outcome(config: &Value) -> Result<(), String> {
    let spec: Spec = serde_json::from_value(config.clone()).map_err(|error| error.to_string())?;
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    let socket = null();
    let nothing = |_: i32, _: &str| String::new();
    let listener = |_, _| Ok(());
    let launch = Launch {
        id: "x",
        spec: &spec,
        user: None,
        filter: None,
        rootfs: Rootfs::Directory("/nowhere".into()),
        stdio: Stdio { stdin: null(), stdout: null(), stderr: null() },
        kill_on_parent_death: false,
        approve: None,
        oci: Oci {
            console_socket: Some(socket.as_fd()),
            hook_state: Some(&nothing),
            listener: Some(&listener),
            warn: Some(&|_| ()),
            ..Oci::default()
        },
    };
    check(&launch).map_err(|error| verdict::chain(&error))
}

#[test]
fn configuration_with_all_is_understood() {
    assert_eq!(outcome(&full()), Ok(()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn mutated_configuration_is_refused_with_a_reason_or_understood(
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop::option::weighted(0.8, some_value())), 1..4),
    ) {
        let mut config = full();
        for (index, value) in changes {
            let mut places = Vec::new();
            pointers(&config, "", &mut places);
            if places.is_empty() {
                break;
            }
            let place = index.get(&places).clone();
            let (parent, name) = place.rsplit_once('/').unwrap();
            match (value, config.pointer_mut(parent).unwrap()) {
                (Some(value), _) => *config.pointer_mut(&place).unwrap() = value,
                (None, Value::Object(fields)) => drop(fields.remove(&name.replace("~1", "/").replace("~0", "~"))),
                (None, Value::Array(list)) => drop(list.remove(name.parse().unwrap())),
                (None, _) => {}
            }
        }
        if let Err(reason) = outcome(&config) {
            prop_assert!(!reason.trim().is_empty());
        }
    }
}
