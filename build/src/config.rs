//! An image's configuration while it is changed by instructions (OCI image-spec: config.md).
//!
//! It is kept as JSON, so that what a base image has and nobody here knows of stays.

use cloche_images::set_env;
use serde_json::{Map, Value, json};

use crate::dockerfile::{Command, HealthCheck};

/// What a shell and every program started by it looks for programs in.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const SHELL: [&str; 2] = ["/bin/sh", "-c"];

/// A configuration in the making.
#[derive(Debug, Clone)]
pub struct Config {
    root: Map<String, Value>,
    /// The object `config`.
    inner: Map<String, Value>,
    /// Whether CMD was set since the last FROM: then ENTRYPOINT does not reset it.
    command_is_own: bool,
}

impl Config {
    /// Of an image of nothing.
    pub fn scratch() -> Config {
        let mut config = Config { root: Map::new(), inner: Map::new(), command_is_own: false };
        config.set("WorkingDir", json!("/"));
        config.begin_stage();
        config
    }

    /// That of a base image.
    pub fn of(raw: &[u8]) -> Option<Config> {
        let Value::Object(mut root) = serde_json::from_slice(raw).ok()? else { return None };
        let inner = match root.remove("config") {
            Some(Value::Object(inner)) => inner,
            _ => Map::new(),
        };
        let mut config = Config { root, inner, command_is_own: false };
        config.begin_stage();
        Some(config)
    }

    /// What a new stage on top of this one changes.
    pub fn begin_stage(&mut self) {
        self.command_is_own = false;
        if !self.env().iter().any(|variable| variable.starts_with("PATH=")) {
            self.set_env("PATH", DEFAULT_PATH);
        }
    }

    fn set(&mut self, name: &str, value: Value) {
        self.inner.insert(name.into(), value);
    }

    fn list(&self, name: &str) -> Vec<String> {
        let strings = self.inner.get(name).and_then(Value::as_array).into_iter().flatten();
        strings.filter_map(|value| value.as_str().map(str::to_owned)).collect()
    }

    fn text(&self, name: &str) -> String {
        self.inner.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    fn add_keys(&mut self, name: &str, keys: impl IntoIterator<Item = String>) {
        let set = self.inner.entry(name).or_insert_with(|| json!({}));
        if !set.is_object() {
            *set = json!({});
        }
        if let Some(set) = set.as_object_mut() {
            set.extend(keys.into_iter().map(|key| (key, json!({}))));
        }
    }

    /// `NAME=VALUE`, each.
    pub fn env(&self) -> Vec<String> {
        self.list("Env")
    }

    /// The value of a variable.
    pub fn variable(&self, name: &str) -> Option<String> {
        let found = |variable: String| {
            variable.split_once('=').filter(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
        };
        self.env().into_iter().find_map(found)
    }

    /// `ENV`
    pub fn set_env(&mut self, name: &str, value: &str) {
        set_env(&mut self.inner, &format!("{name}={value}"));
    }

    /// The working directory; absolute.
    pub fn workdir(&self) -> String {
        match self.text("WorkingDir") {
            directory if directory.is_empty() => "/".into(),
            directory if directory.starts_with('/') => directory,
            directory => format!("/{directory}"),
        }
    }

    /// `WORKDIR`
    pub fn set_workdir(&mut self, directory: &str) {
        self.set("WorkingDir", json!(directory));
    }

    /// `USER`, or nothing for root.
    pub fn user(&self) -> Option<String> {
        Some(self.text("User")).filter(|user| !user.is_empty())
    }

    /// `USER`
    pub fn set_user(&mut self, user: &str) {
        self.set("User", json!(user));
    }

    /// `LABEL`
    pub fn set_label(&mut self, name: &str, value: &str) {
        let labels = self.inner.entry("Labels").or_insert_with(|| json!({}));
        if !labels.is_object() {
            *labels = json!({});
        }
        if let Some(labels) = labels.as_object_mut() {
            labels.insert(name.into(), json!(value));
        }
    }

    /// `EXPOSE`, with the protocol.
    pub fn expose(&mut self, ports: Vec<String>) {
        self.add_keys("ExposedPorts", ports);
    }

    /// `VOLUME`
    pub fn add_volumes(&mut self, paths: Vec<String>) {
        self.add_keys("Volumes", paths);
    }

    /// `STOPSIGNAL`
    pub fn set_stop_signal(&mut self, signal: &str) {
        self.set("StopSignal", json!(signal));
    }

    /// `SHELL`
    pub fn set_shell(&mut self, words: &[String]) {
        self.set("Shell", json!(words));
    }

    /// `MAINTAINER`
    pub fn set_author(&mut self, name: &str) {
        self.root.insert("author".into(), json!(name));
    }

    /// A command's words: those of the shell form go to the shell.
    pub fn words(&self, command: &Command) -> Vec<String> {
        match command {
            Command::Exec(words) => words.clone(),
            Command::Shell(text) => {
                let mut words = self.list("Shell");
                if words.is_empty() {
                    words = SHELL.map(str::to_owned).to_vec();
                }
                words.push(text.clone());
                words
            }
        }
    }

    /// No words are no field, as a base without has it.
    fn set_words(&mut self, name: &str, command: &Command) {
        match self.words(command) {
            words if words.is_empty() => drop(self.inner.remove(name)),
            words => self.set(name, json!(words)),
        }
    }

    /// `CMD`
    pub fn set_command(&mut self, command: &Command) {
        self.set_words("Cmd", command);
        self.command_is_own = true;
    }

    /// `ENTRYPOINT`, which drops a CMD that the base has: it was meant for another entry point.
    pub fn set_entrypoint(&mut self, command: &Command) {
        self.set_words("Entrypoint", command);
        if !self.command_is_own {
            self.inner.remove("Cmd");
        }
    }

    /// `HEALTHCHECK`, in Docker's own field.
    pub fn set_health_check(&mut self, check: &HealthCheck) {
        let Some(command) = &check.command else {
            self.set("Healthcheck", json!({"Test": ["NONE"]}));
            return;
        };
        let mut test = match command {
            Command::Exec(words) => words.clone(),
            Command::Shell(text) => vec![text.clone()],
        };
        test.insert(0, if matches!(command, Command::Exec(_)) { "CMD" } else { "CMD-SHELL" }.into());
        let mut made = Map::new();
        made.insert("Test".into(), json!(test));
        for (name, ns) in ["Interval", "Timeout", "StartPeriod", "StartInterval"].iter().zip(check.times_ns) {
            if let Some(ns) = ns.filter(|ns| *ns > 0) {
                made.insert((*name).into(), json!(ns));
            }
        }
        if let Some(retries) = check.retries.filter(|retries| *retries > 0) {
            made.insert("Retries".into(), json!(retries));
        }
        self.set("Healthcheck", Value::Object(made));
    }

    /// `ONBUILD`
    pub fn add_trigger(&mut self, text: &str) {
        let mut triggers = self.list("OnBuild");
        triggers.push(text.to_owned());
        self.set("OnBuild", json!(triggers));
    }

    /// Takes the triggers that the base has for its users.
    pub fn take_triggers(&mut self) -> Vec<String> {
        let triggers = self.list("OnBuild");
        self.inner.remove("OnBuild");
        triggers
    }

    /// The variables, user and directory that a sandbox of a step gets, and nothing that it would run by itself.
    pub fn for_run(&self) -> Value {
        json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": self.env(), "User": self.text("User"), "WorkingDir": self.workdir()},
            "rootfs": {"type": "layers", "diff_ids": []},
        })
    }

    /// The configuration as it is stored.
    pub fn finish(&self, layers: &[String], history: &[Value], created: &str) -> Vec<u8> {
        let mut root = self.root.clone();
        // They tell of the container that an older builder made the base in.
        for gone in ["container", "container_config", "docker_version", "id", "parent"] {
            root.remove(gone);
        }
        root.insert("architecture".into(), json!("amd64"));
        root.insert("os".into(), json!("linux"));
        root.insert("created".into(), json!(created));
        root.insert("config".into(), Value::Object(self.inner.clone()));
        root.insert("rootfs".into(), json!({"type": "layers", "diff_ids": layers}));
        root.insert("history".into(), json!(history));
        Value::Object(root).to_string().into_bytes()
    }

    /// The history of the base.
    pub fn history(&self) -> Vec<Value> {
        self.root.get("history").and_then(Value::as_array).cloned().unwrap_or_default()
    }

    /// When the base was made, RFC 3339.
    pub fn created(&self) -> Option<String> {
        self.root.get("created").and_then(Value::as_str).map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_point_drops_the_base_s_command_only() {
        let base = br#"{"config":{"Cmd":["base"],"Env":["A=1"],"Unknown":7}}"#;
        let mut config = Config::of(base).unwrap();
        config.set_entrypoint(&Command::Exec(vec!["e".into()]));
        let made: Value = serde_json::from_slice(&config.finish(&[], &[], "t")).unwrap();
        assert_eq!(made["config"]["Cmd"], Value::Null);
        assert_eq!(made["config"]["Unknown"], 7);
        let mut config = Config::of(base).unwrap();
        config.set_command(&Command::Shell("own".into()));
        config.set_entrypoint(&Command::Exec(vec!["e".into()]));
        let made: Value = serde_json::from_slice(&config.finish(&[], &[], "t")).unwrap();
        assert_eq!(made["config"]["Cmd"], json!(["/bin/sh", "-c", "own"]));
        assert_eq!(made["config"]["Env"][1], format!("PATH={DEFAULT_PATH}"));
    }

    #[test]
    fn empty_command_takes_the_base_s_away() {
        let base = br#"{"config":{"Cmd":["c"],"Entrypoint":["e"]}}"#;
        let left = |change: fn(&mut Config, &Command)| {
            let mut config = Config::of(base).unwrap();
            change(&mut config, &Command::Exec(Vec::new()));
            let made: Value = serde_json::from_slice(&config.finish(&[], &[], "t")).unwrap();
            (made["config"].get("Entrypoint").cloned(), made["config"].get("Cmd").cloned())
        };
        assert_eq!(left(Config::set_command), (Some(json!(["e"])), None));
        assert_eq!(left(Config::set_entrypoint), (None, None));
    }
}
