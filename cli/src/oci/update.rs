//! `update`: the limits that its options describe.

use std::io::Read;

use cloche_oci::{Error, Home};
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value, json};

use super::arguments::Update;

pub fn update(home: &Home<'_>, update: &Update) -> Result<u8, Error> {
    let resources = match &update.resources {
        Some(path) => {
            let text = if path.as_os_str() == "-" {
                let mut text = Vec::new();
                std::io::stdin().read_to_end(&mut text).map(|_| text)
            } else {
                std::fs::read(path)
            };
            let text = text.map_err(|source| Error::File { action: "read", path: path.clone(), source })?;
            serde_json::from_slice(&text)
                .map_err(|source| Error::Config { path: path.clone(), source: source.into() })?
        }
        None => of_options(update)?,
    };
    cloche_oci::update(home, &update.id, &resources).map(|()| 0)
}

fn of_options(update: &Update) -> Result<LinuxResources, Error> {
    let cpu = [
        ("period", update.cpu_period.map(Value::from)),
        ("quota", update.cpu_quota.map(Value::from)),
        ("burst", update.cpu_burst.map(Value::from)),
        ("shares", update.cpu_share.map(Value::from)),
        ("idle", update.cpu_idle.map(Value::from)),
        ("realtimePeriod", update.cpu_rt_period.map(Value::from)),
        ("realtimeRuntime", update.cpu_rt_runtime.map(Value::from)),
        ("cpus", update.cpuset_cpus.clone().map(Value::from)),
        ("mems", update.cpuset_mems.clone().map(Value::from)),
    ];
    let memory = [
        ("limit", update.memory.map(Value::from)),
        ("reservation", update.memory_reservation.map(Value::from)),
        ("swap", update.memory_swap.map(Value::from)),
    ];
    let mut resources = json!({});
    let groups = [
        ("cpu", object(cpu)),
        ("memory", object(memory)),
        ("pids", object([("limit", update.pids_limit.map(Value::from))])),
        ("blockIO", object([("weight", update.blkio_weight.map(Value::from))])),
    ];
    for (name, group) in groups.into_iter().filter(|(_, group)| !group.is_empty()) {
        resources[name] = group.into();
    }
    serde_json::from_value(resources).map_err(|error| Error::Request(error.to_string()))
}

fn object<const N: usize>(fields: [(&str, Option<Value>); N]) -> Map<String, Value> {
    fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
}
