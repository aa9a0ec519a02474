//! Changes to an image's configuration, written as instructions of a Dockerfile: for `import` and `commit`.

use std::str::FromStr;

use serde_json::{Map, Value, json};

/// A change to an image's configuration, written as an instruction of a Dockerfile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// `CMD`
    Command(Vec<String>),
    /// `ENTRYPOINT`
    Entrypoint(Vec<String>),
    /// `ENV NAME=VALUE…`
    Env(Vec<(String, String)>),
    /// `LABEL NAME=VALUE…`
    Label(Vec<(String, String)>),
    /// `EXPOSE PORT[-PORT][/PROTOCOL]…`, each port by itself and with its protocol
    Expose(Vec<String>),
    /// `VOLUME PATH…`
    Volume(Vec<String>),
    /// `USER`
    User(String),
    /// `WORKDIR`
    WorkingDir(String),
    /// `STOPSIGNAL`
    StopSignal(String),
}

/// Why a text is no change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no change: {problem}")]
pub struct ParseChangeError {
    text: String,
    problem: &'static str,
}

impl Change {
    /// Applies changes, one after the other. A command was meant for the entry point it came with: a new one drops it,
    /// unless these changes set a command, too, before or after it.
    pub(crate) fn apply_all(changes: &[Change], config: &mut Map<String, Value>) {
        let is = |kind: fn(&Change) -> bool| changes.iter().any(kind);
        if is(|change| matches!(change, Change::Entrypoint(_)))
            && !is(|change| matches!(change, Change::Command(_)))
        {
            config.remove("Cmd");
        }
        changes.iter().for_each(|change| change.apply(config));
    }

    /// Changes the `config` object (OCI image-spec: config.md#properties).
    fn apply(&self, config: &mut Map<String, Value>) {
        let mut set = |key: &str, value: Value| drop(config.insert(key.to_owned(), value));
        match self {
            Change::Command(words) => set("Cmd", json!(words)),
            Change::Entrypoint(words) => set("Entrypoint", json!(words)),
            Change::Env(pairs) => {
                pairs.iter().for_each(|(name, value)| set_env(config, &format!("{name}={value}")));
            }
            Change::Label(pairs) => {
                extend(config, "Labels", pairs.iter().map(|(name, value)| (name.clone(), json!(value))));
            }
            Change::Expose(ports) => {
                extend(config, "ExposedPorts", ports.iter().map(|port| (port.clone(), json!({}))));
            }
            Change::Volume(paths) => {
                extend(config, "Volumes", paths.iter().map(|path| (path.clone(), json!({}))));
            }
            Change::User(user) => set("User", json!(user)),
            Change::WorkingDir(directory) => set("WorkingDir", json!(directory)),
            Change::StopSignal(signal) => set("StopSignal", json!(signal)),
        }
    }
}

/// Adds to an object within the configuration. What is there and none is replaced.
fn extend(config: &mut Map<String, Value>, key: &str, entries: impl Iterator<Item = (String, Value)>) {
    let mut object = match config.remove(key) {
        Some(Value::Object(object)) => object,
        _ => Map::new(),
    };
    object.extend(entries);
    config.insert(key.to_owned(), Value::Object(object));
}

/// Sets a variable of a configuration, `NAME=VALUE`, in the place of one of the same name.
pub fn set_env(config: &mut Map<String, Value>, variable: &str) {
    let name = |variable: &str| variable.split('=').next().map(str::to_owned);
    let mut env = match config.remove("Env") {
        Some(Value::Array(env)) => env,
        _ => Vec::new(),
    };
    match env.iter_mut().find(|known| known.as_str().and_then(name) == name(variable)) {
        Some(known) => *known = json!(variable),
        None => env.push(json!(variable)),
    }
    config.insert("Env".to_owned(), Value::Array(env));
}

impl FromStr for Change {
    type Err = ParseChangeError;

    fn from_str(text: &str) -> Result<Change, ParseChangeError> {
        let bad = |problem| ParseChangeError { text: text.chars().take(200).collect(), problem };
        let (instruction, rest) = text.trim().split_once(char::is_whitespace).unwrap_or((text.trim(), ""));
        let rest = rest.trim();
        if rest.is_empty() {
            return Err(bad("nothing follows the instruction"));
        }
        let one = || match words(rest).as_deref() {
            Some([word]) => Ok(word.clone()),
            _ => Err(bad("one word must follow")),
        };
        let list = || {
            let array = rest.starts_with('[').then(|| serde_json::from_str(rest).ok());
            array.unwrap_or_else(|| words(rest)).ok_or_else(|| bad("the words that follow are malformed"))
        };
        // As in a Dockerfile: a JSON array is a command line, and anything else a shell's.
        let command = || match rest.starts_with('[') {
            true => serde_json::from_str(rest).map_err(|_| bad("this is no JSON array of strings")),
            false => Ok(vec!["/bin/sh".to_owned(), "-c".to_owned(), rest.to_owned()]),
        };
        Ok(match instruction.to_ascii_uppercase().as_str() {
            "CMD" => Change::Command(command()?),
            "ENTRYPOINT" => Change::Entrypoint(command()?),
            "ENV" => Change::Env(pairs(rest).ok_or_else(|| bad("write NAME=VALUE"))?),
            "LABEL" => Change::Label(pairs(rest).ok_or_else(|| bad("write NAME=VALUE"))?),
            "EXPOSE" => {
                let ports = list()?.iter().map(|text| ports(text)).collect::<Option<Vec<_>>>();
                let ports = ports.ok_or_else(|| bad("write ports as 80, 80/udp or 8000-8010/tcp"))?;
                Change::Expose(ports.concat())
            }
            "VOLUME" => Change::Volume(list()?),
            "USER" => Change::User(one()?),
            "WORKDIR" => Change::WorkingDir(one()?),
            "STOPSIGNAL" => Change::StopSignal(one()?),
            _ => {
                let known =
                    "known are CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME and WORKDIR";
                return Err(bad(known));
            }
        })
    }
}

/// The ports that EXPOSE means by `80`, `80/udp` or `8000-8002`, each with its protocol; `None` if it means none.
pub fn ports(text: &str) -> Option<Vec<String>> {
    let (range, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let port =
        |text: &str| text.parse::<u16>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
    let (first, last) = (port(first)?, port(last)?);
    let is_known = ["tcp", "udp", "sctp"].contains(&protocol.as_str());
    (is_known && first <= last).then(|| (first..=last).map(|port| format!("{port}/{protocol}")).collect())
}

/// `NAME=VALUE…`, or the older `NAME VALUE` in which the rest of the line is the value.
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let words = words(text)?;
    if !words.first()?.contains('=') {
        let (name, value) = text.split_once(char::is_whitespace)?;
        return Some(vec![(name.to_owned(), value.trim().to_owned())]);
    }
    let pair = |word: &String| word.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    words
        .iter()
        .map(pair)
        .collect::<Option<Vec<_>>>()
        .filter(|pairs| pairs.iter().all(|(name, _)| !name.is_empty()))
}

/// Words as a shell would split them: quotes keep together, a backslash takes what follows as it is.
fn words(text: &str) -> Option<Vec<String>> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match (quote, letter) {
            (Some(open), letter) if letter == open => quote = None,
            (None, '"' | '\'') => {
                quote = Some(letter);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => word.get_or_insert_default().push(letters.next()?),
            (None, letter) if letter.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    quote.is_none().then_some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_applied_one_after_the_other() {
        let mut config = Map::from_iter([
            ("Env".to_owned(), json!(["A=0", "PATH=/bin"])),
            ("Labels".to_owned(), Value::Null),
            ("Volumes".to_owned(), json!({"/v": {}})),
        ]);
        let changes =
            ["ENV A=1 B=2", "LABEL x=y", "EXPOSE 80 53/udp", "VOLUME /w", "USER me", "CMD run", "ENV B=3"];
        let changes = changes.map(|change| change.parse().unwrap());
        Change::apply_all(&changes, &mut config);
        assert_eq!(
            Value::Object(config),
            json!({
                "Env": ["A=1", "PATH=/bin", "B=3"],
                "Labels": {"x": "y"},
                "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
                "Volumes": {"/v": {}, "/w": {}},
                "User": "me",
                "Cmd": ["/bin/sh", "-c", "run"],
            })
        );
    }

    #[test]
    fn entry_point_drops_a_command_that_the_changes_do_not_set() {
        let command_after = |changes: &[&str]| {
            let mut config = Map::from_iter([("Cmd".to_owned(), json!(["old"]))]);
            let changes: Vec<Change> = changes.iter().map(|change| change.parse().unwrap()).collect();
            Change::apply_all(&changes, &mut config);
            config.remove("Cmd")
        };
        let (entrypoint, command) = (r#"ENTRYPOINT ["e"]"#, r#"CMD ["new"]"#);
        assert_eq!(command_after(&[entrypoint]), None);
        assert_eq!(command_after(&[entrypoint, command]), Some(json!(["new"])));
        assert_eq!(command_after(&[command, entrypoint]), Some(json!(["new"])));
        assert_eq!(command_after(&["USER me"]), Some(json!(["old"])));
    }

    #[test]
    fn change_is_read_as_in_a_dockerfile() {
        let change = |text: &str| text.parse::<Change>();
        let strings = |words: &[&str]| words.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(change(r#"CMD ["a", "b c"]"#), Ok(Change::Command(strings(&["a", "b c"]))));
        assert_eq!(
            change("entrypoint run it"),
            Ok(Change::Entrypoint(strings(&["/bin/sh", "-c", "run it"])))
        );
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            change(r#"ENV A=1 B="two words" C=\ x"#),
            Ok(Change::Env(vec![pair("A", "1"), pair("B", "two words"), pair("C", " x")]))
        );
        assert_eq!(change("ENV A two words"), Ok(Change::Env(vec![pair("A", "two words")])));
        assert_eq!(
            change("EXPOSE 80 1-3/UDP"),
            Ok(Change::Expose(strings(&["80/tcp", "1/udp", "2/udp", "3/udp"])))
        );
        for bad in ["x", "80/x", "3-1", "70000", "+1", "8080:80"] {
            assert!(change(&format!("EXPOSE {bad}")).is_err(), "{bad}");
        }
        assert_eq!(change(r#"VOLUME ["/a"]"#), Ok(Change::Volume(strings(&["/a"]))));
        assert_eq!(change("USER 1:2"), Ok(Change::User("1:2".to_owned())));
        for bad in ["", "CMD", "RUN x", "CMD [1]", "USER a b", "ENV A", "ENV =b", "LABEL a='b"] {
            assert!(change(bad).is_err(), "{bad}");
        }
    }
}
