//! The command line as the manual pages of runc 1.1 and crun 1.8 have it: each word works, or is refused by its name.

use crate::{
    Test,
    fixture::{Bundle, await_that},
};

pub fn all() -> Vec<Test> {
    crate::tests![
        options_of_runc_and_crun_are_there,
        words_that_ask_for_what_there_is_not_are_refused_by_name,
        signal_to_ids_that_match_reaches_these_only,
    ]
}

/// Verb and options; before a verb where there is none.
const OPTIONS: [(&str, &str); 15] = [
    ("", "--root --log --log-format --debug --systemd-cgroup --cgroup-manager --help --version -h -v"),
    (
        "create",
        "--bundle --config --console-socket --pid-file --no-pivot --no-new-keyring --no-subreaper --preserve-fds -b -f",
    ),
    (
        "run",
        "--bundle --config --console-socket --pid-file --no-pivot --no-new-keyring --no-subreaper --preserve-fds --detach \
         --keep -b -f -d",
    ),
    (
        "exec",
        "--console-socket --cwd --env --tty --user --additional-gids --process --detach --pid-file --process-label \
         --apparmor --no-new-privs --cap --preserve-fds --cgroup --ignore-paused -e -t -u -g -p -d -c",
    ),
    ("start", ""),
    ("state", ""),
    ("kill", "--all --regex -a -r"),
    ("delete", "--force --regex -f"),
    ("list", "--format --quiet -f -q"),
    ("ps", "--format -f"),
    ("pause", ""),
    ("resume", ""),
    ("events", "--stats --interval"),
    ("spec", "--bundle --rootless -b"),
    (
        "update",
        "--resources --blkio-weight --cpu-period --cpu-quota --cpu-burst --cpu-share --cpu-idle --cpu-rt-period \
         --cpu-rt-runtime --cpuset-cpus --cpuset-mems --memory --memory-reservation --memory-swap --pids-limit -r",
    ),
];

fn options_of_runc_and_crun_are_there() {
    let bundle = Bundle::new(&["true"]);
    for (verb, options) in OPTIONS {
        let help = match verb {
            "" => bundle.ok(&["--help"]),
            verb => bundle.ok(&[verb, "--help"]),
        };
        let words: Vec<_> = help.split(|found: char| found.is_whitespace() || found == ',').collect();
        for option in options.split_whitespace() {
            // A value that need not be there is in brackets.
            let is_it = |word: &str| {
                word.strip_prefix(option).is_some_and(|rest| rest.is_empty() || rest.starts_with('['))
            };
            assert!(words.iter().any(|word| is_it(word)), "{verb} {option}: {help}");
        }
    }
    assert!(bundle.ok(&["features"]).contains("ociVersionMax"));
}

fn words_that_ask_for_what_there_is_not_are_refused_by_name() {
    let bundle = Bundle::new(&["sleep", "100"]);
    bundle.start();
    let id = bundle.id.as_str();
    for words in [
        &["--criu", "/criu", "list"][..],
        &["--rootless", "true", "list"],
        &["--systemd-cgroup", "list"],
        &["--cgroup-manager", "systemd", "list"],
        &["--cgroup-manager", "disabled", "list"],
        &["update", "--l3-cache-schema", "L3:0=f", id],
        &["update", "--mem-bw-schema", "MB:0=20", id],
        &["update", "--kernel-memory", "1m", id],
        &["update", "--kernel-memory-tcp", "1m", id],
        &["checkpoint", id],
        &["restore", "other"],
    ] {
        let message = bundle.refused(words);
        let name = match words[0] {
            "update" => words[1],
            "checkpoint" | "restore" => "saved and restored",
            global => global,
        };
        assert!(message.contains(name), "{words:?}: {message}");
    }
    assert_eq!(bundle.ok(&["--cgroup-manager", "cgroupfs", "list", "--quiet"]), id);
    assert_eq!(bundle.status(), "running");
}

fn signal_to_ids_that_match_reaches_these_only() {
    let bundle = Bundle::new(&["sleep", "100"]);
    let ids = ["one", "other"].map(|name| format!("{}-{name}", bundle.id));
    for id in &ids {
        let output = std::fs::File::create(bundle.path("output")).unwrap();
        assert!(bundle.command(&["run", "--detach", id]).stdout(output).status().unwrap().success());
    }
    bundle.ok(&["kill", "--regex", "one$", "KILL"]);
    let status = |id: &str| bundle.ok(&["state", id]);
    await_that("the one has ended", || status(&ids[0]).contains("\"stopped\""));
    assert!(status(&ids[1]).contains("\"running\""));
    assert!(bundle.refused(&["kill", "--regex", "(", "KILL"]).contains("--regex ("));
    bundle.ok(&["delete", "--force", "--regex", &format!("^{}-", bundle.id)]);
    assert_eq!(bundle.ok(&["list", "--quiet"]), "");
}
