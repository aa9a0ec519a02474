//! Real engines with this runtime in the place of theirs: run, exec, logs, pause, stop, remove. An engine that is not
//! installed is named, and its test does nothing, unless `CLOCHE_TESTS_REQUIRE_ENGINES` is set.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use crate::{
    Test,
    fixture::{self, Bundle, await_that, has, text},
};

pub fn all() -> Vec<Test> {
    crate::tests![
        podman_runs_containers,
        podman_runs_pods,
        podman_of_a_plain_user_runs_containers,
        containerd_runs_containers,
        docker_runs_containers,
    ]
}

/// This runtime under the name that engines call it by.
fn runtime(bundle: &Bundle) -> PathBuf {
    let link = bundle.path(fixture::name());
    std::os::unix::fs::symlink(fixture::program(), &link).unwrap();
    link
}

/// An image of the bundle's root file system, in a tar archive of its files.
fn files(bundle: &Bundle) -> PathBuf {
    let archive = bundle.path("files.tar");
    let status =
        Command::new("tar").arg("-C").arg(bundle.path("rootfs")).arg("-cf").arg(&archive).arg(".").status();
    assert!(status.unwrap().success());
    archive
}

const SERVICE: &str = "echo started; trap 'echo bye; exit 0' TERM; while :; do sleep 0.05; done";

struct Engine {
    words: Vec<String>,
    environment: Vec<(&'static str, PathBuf)>,
}

impl Engine {
    fn run(&self, words: &[&str]) -> Output {
        let (program, first) = self.words.split_first().unwrap();
        let mut command = Command::new("timeout");
        command.args(["-k", "5", "60", program]).args(first).args(words).stdin(Stdio::null());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.output().unwrap()
    }

    #[track_caller]
    fn ok(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        text(&output.stdout)
    }
}

/// podman with the bundle's root file system as its image `box`, if it is there.
fn podman(bundle: &Bundle) -> Option<Engine> {
    if !has("podman", "podman") || !has("conmon", "conmon") {
        return None;
    }
    let (runtime, files) = (runtime(bundle), files(bundle));
    // Limits that need no rights which root may lack in a container.
    let settings = "[containers]\ndefault_ulimits=[\"nofile=1024:1024\",\"nproc=1000:1000\"]\n[engine]\nevents_logger=\"file\"\n";
    fs::write(bundle.path("containers.conf"), settings).unwrap();
    let path = |name: &str| bundle.path(name).display().to_string();
    let words = [
        "podman",
        "--root",
        &path("storage"),
        "--runroot",
        &path("runroot"),
        "--tmpdir",
        &path("libpod"),
        "--storage-driver",
        "vfs",
        "--cgroup-manager",
        "cgroupfs",
        "--runtime",
        runtime.to_str().unwrap(),
    ];
    let engine = Engine {
        words: words.map(str::to_owned).to_vec(),
        environment: vec![("CONTAINERS_CONF", bundle.path("containers.conf"))],
    };
    engine.ok(&["import", "--quiet", files.to_str().unwrap(), "box"]);
    Some(engine)
}

fn podman_runs_containers() {
    let bundle = Bundle::new(&["true"]);
    let Some(engine) = podman(&bundle) else { return };
    let name = bundle.id.as_str();
    assert_eq!(engine.ok(&["run", "--rm", "--network", "none", "box", "echo", "hi"]), "hi");
    assert_eq!(
        engine.run(&["run", "--rm", "--network", "none", "box", "sh", "-c", "exit 3"]).status.code(),
        Some(3)
    );
    assert_eq!(engine.run(&["run", "--rm", "--network", "none", "box", "nowhere"]).status.code(), Some(127));
    assert_eq!(engine.ok(&["run", "--rm", "--network", "none", "--tty", "box", "tty"]), "/dev/pts/0");
    engine.ok(&["run", "--detach", "--name", name, "--network", "none", "box", "sh", "-c", SERVICE]);
    starts_and_is_entered(&engine, name);
    pauses_and_ends(&engine, name);
}

/// A plain user's podman calls the runtime as root of a user namespace, without saying where state is kept.
fn podman_of_a_plain_user_runs_containers() {
    const USER: u32 = 54_321;
    if !has("podman", "podman") || !has("conmon", "conmon") || !has("newuidmap", "uidmap") {
        return;
    }
    let bundle = Bundle::new(&["true"]);
    let files = files(&bundle);
    // Where this one lies, others might not be let in.
    let runtime = bundle.path(fixture::name());
    fs::copy(fixture::program(), &runtime).unwrap();
    for name in ["home", "run"] {
        fs::create_dir(bundle.path(name)).unwrap();
        std::os::unix::fs::chown(bundle.path(name), Some(USER), Some(USER)).unwrap();
    }
    fs::set_permissions(bundle.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    // The user has a name, and ids for its containers, in an /etc of these processes only.
    let script = format!(
        r#"set -e
        cd {}
        mkdir etc
        mount -t tmpfs tmpfs etc
        mkdir etc/upper etc/work
        mount -t overlay -o lowerdir=/etc,upperdir=$PWD/etc/upper,workdir=$PWD/etc/work overlay /etc
        echo 'cloche-test:x:{USER}:{USER}::/:/bin/sh' >> /etc/passwd
        echo 'cloche-test:x:{USER}:' >> /etc/group
        echo 'cloche-test:700000:65536' | tee -a /etc/subuid >> /etc/subgid
        exec setpriv --reuid {USER} --regid {USER} --clear-groups env -i PATH="$PATH:/usr/sbin:/sbin" HOME=$PWD/home XDG_RUNTIME_DIR=$PWD/run sh -ec '
            podman() {{ command podman --storage-driver vfs --cgroup-manager cgroupfs --events-backend file --runtime {} "$@"; }}
            trap "podman rm --force --all > /dev/null; podman system migrate" EXIT
            podman import --quiet {} box > /dev/null
            podman run --rm --network none box echo hi
            podman run --detach --name box --network none box sleep 100 > /dev/null
            podman exec box id -u
            podman run --rm --network none --pid container:box box ps | grep -c "sleep 100"
            podman stop --time 0 box'
        "#,
        bundle.path("").display(),
        runtime.display(),
        files.display(),
    );
    let output =
        Command::new("timeout").args(["120", "unshare", "--mount", "sh", "-c", &script]).output().unwrap();
    assert_eq!(
        (output.status.code(), text(&output.stdout).as_str()),
        (Some(0), "hi\n0\n1\nbox"),
        "{output:?}"
    );
}

fn podman_runs_pods() {
    let bundle = Bundle::new(&["true"]);
    let Some(engine) = podman(&bundle) else { return };
    let pod = bundle.id.as_str();
    let infra = ["--infra-image", "localhost/box", "--infra-command", "sleep 1000"];
    // podman 4.3 lets nothing in a pod's own cgroup open a device, /dev/null least of all; nor can it remove that on v1.
    let own_cgroups = ["--share-parent=false", "--network", "none"];
    engine.ok(&[&["pod", "create", "--name", pod], &own_cgroups[..], &infra[..]].concat());
    let server = format!("{pod}-server");
    let script = format!(
        "echo served > /tmp/word; echo shared > /dev/shm/word; busybox httpd -p 80 -h /tmp; {SERVICE}"
    );
    engine.ok(&["run", "--detach", "--pod", pod, "--name", &server, "box", "sh", "-c", &script]);
    starts_and_is_entered(&engine, &server);
    let client = "busybox wget -qO- http://127.0.0.1/word; cat /dev/shm/word; hostname; exit 5";
    let output = engine.run(&["run", "--rm", "--pod", pod, "box", "sh", "-c", client]);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(5), format!("served\nshared\n{pod}")));
    // One kernel, and which.
    let boot = ["cat", "/proc/sys/kernel/random/boot_id"];
    let of_server = engine.ok(&[&["exec", server.as_str()], &boot[..]].concat());
    let of_client = engine.ok(&[&["run", "--rm", "--pod", pod, "box"], &boot[..]].concat());
    let of_host = fs::read_to_string(boot[1]).unwrap();
    assert_eq!(of_server, of_client);
    assert_eq!(of_server == of_host.trim_end(), !fixture::in_vm());
    engine.ok(&["stop", "--time", "10", &server]);
    assert_eq!(engine.ok(&["logs", &server]), "started\nbye");
    // By itself, and with the pod as a whole.
    engine.ok(&["start", &server]);
    starts_again(&engine, &server);
    engine.ok(&["pod", "stop", "--time", "5", pod]);
    engine.ok(&["pod", "start", pod]);
    starts_again(&engine, &server);
    engine.ok(&["pod", "rm", "--force", "--time", "5", pod]);
    assert_eq!(engine.ok(&["ps", "--all", "--quiet"]), "");
}

/// A service that has been stopped runs, and is entered.
fn starts_again(engine: &Engine, name: &str) {
    await_that("it answers", || {
        engine.run(&["exec", name, "busybox", "wget", "-qO-", "http://127.0.0.1/word"]).status.success()
    });
}

/// A daemon that ends with the test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.0.wait();
    }
}

fn containerd_runs_containers() {
    if !has("containerd", "containerd")
        || !has("ctr", "containerd")
        || !has("skopeo", "skopeo")
        || !has("umoci", "umoci")
    {
        return;
    }
    let bundle = Bundle::new(&["true"]);
    let runtime = runtime(&bundle);
    let (image, archive) = (bundle.path("image"), bundle.path("image.tar"));
    make_image(&bundle, &image, &archive);
    let path = |name: &str| bundle.path(name).display().to_string();
    let settings = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
        path("root"),
        path("run"),
        path("socket"),
    );
    fs::write(bundle.path("config.toml"), settings).unwrap();
    let log = fs::File::create(bundle.path("log")).unwrap();
    let daemon = Command::new("containerd")
        .args(["--config", &path("config.toml")])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let _daemon = Daemon(daemon);
    let engine =
        Engine { words: vec!["ctr".into(), "--address".into(), path("socket")], environment: Vec::new() };
    await_that("containerd answers", || engine.run(&["version"]).status.success());
    engine.ok(&["images", "import", archive.to_str().unwrap()]);
    let image = engine.ok(&["images", "ls", "--quiet"]);
    let name = bundle.id.as_str();
    let runtime = ["--snapshotter", "native", "--runc-binary", runtime.to_str().unwrap()];
    assert_eq!(engine.ok(&[&["run"], &runtime[..], &["--rm", &image, name, "echo", "hi"]].concat()), "hi");
    engine.ok(&[&["run"], &runtime[..], &["--detach", &image, name, "sleep", "100"]].concat());
    assert_eq!(engine.ok(&["tasks", "exec", "--exec-id", "one", name, "id", "-u"]), "0");
    engine.ok(&["tasks", "pause", name]);
    assert!(engine.ok(&["tasks", "ls"]).contains("PAUSED"));
    engine.ok(&["tasks", "resume", name]);
    engine.ok(&["tasks", "kill", "--signal", "KILL", name]);
    await_that("it has ended", || engine.ok(&["tasks", "ls"]).contains("STOPPED"));
    engine.run(&["tasks", "rm", name]);
    engine.ok(&["containers", "rm", name]);
    assert_eq!(engine.ok(&["containers", "ls", "--quiet"]), "");
}

fn docker_runs_containers() {
    if !has("dockerd", "docker.io") || !has("docker", "docker.io") {
        return;
    }
    let bundle = Bundle::new(&["true"]);
    let (runtime, files) = (runtime(&bundle), files(&bundle));
    let path = |name: &str| bundle.path(name).display().to_string();
    let log = fs::File::create(bundle.path("log")).unwrap();
    // With a network and mounts that end with it, and no rules for packets, of which not every kernel has all.
    let daemon = Command::new("unshare")
        .args(["--net", "--mount", "dockerd", "--storage-driver", "vfs", "--bip", "10.78.0.1/24"])
        .args(["--iptables=false", "--ip6tables=false", "--ip-masq=false", "--ip-forward=false"])
        .args(["--data-root", &path("root"), "--exec-root", &path("run"), "--pidfile", &path("pid")])
        .args(["--host", &format!("unix://{}", path("socket"))])
        .arg("--add-runtime")
        .arg(format!("{}={}", fixture::name(), runtime.display()))
        .args(["--default-runtime", fixture::name()])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    let pid = daemon.id();
    let _daemon = Daemon(daemon);
    let words = ["docker", "--host", &format!("unix://{}", path("socket"))];
    let engine = Engine { words: words.map(str::to_owned).to_vec(), environment: Vec::new() };
    await_that("dockerd answers", || engine.run(&["version"]).status.success());
    engine.ok(&["import", files.to_str().unwrap(), "box"]);
    let name = bundle.id.as_str();
    assert_eq!(engine.ok(&["run", "--rm", "box", "echo", "hi"]), "hi");
    assert_eq!(engine.run(&["run", "--rm", "box", "sh", "-c", "exit 3"]).status.code(), Some(3));
    assert_eq!(engine.run(&["run", "--rm", "box", "nowhere"]).status.code(), Some(127));
    assert_eq!(engine.ok(&["run", "--rm", "--network", "none", "--tty", "box", "tty"]), "/dev/pts/0");
    let script = format!("busybox httpd -p 80 -h /bin; {SERVICE}");
    engine.ok(&["run", "--detach", "--name", name, "box", "sh", "-c", &script]);
    starts_and_is_entered(&engine, name);
    let address = engine.ok(&["inspect", "--format", "{{.NetworkSettings.IPAddress}}", name]);
    let fetch = format!("busybox wget -qO- http://{address}/busybox | busybox wc -c");
    let network = format!("--net=/proc/{pid}/ns/net");
    let fetched =
        Command::new("nsenter").args([&network, "timeout", "20", "sh", "-c", &fetch]).output().unwrap();
    let bytes = fs::metadata(bundle.path("rootfs/bin/busybox")).unwrap().len();
    assert_eq!(text(&fetched.stdout), bytes.to_string(), "{fetched:?}");
    pauses_and_ends(&engine, name);
}

/// Of a container whose process is [`SERVICE`]: it starts, and `exec` enters it.
fn starts_and_is_entered(engine: &Engine, name: &str) {
    await_that("it has started", || engine.ok(&["logs", name]) == "started");
    assert_eq!(engine.ok(&["exec", name, "id", "-u"]), "0");
    assert_eq!(engine.run(&["exec", name, "sh", "-c", "exit 4"]).status.code(), Some(4));
}

/// Of that container: it is paused, stops by itself when told so, and is removed.
fn pauses_and_ends(engine: &Engine, name: &str) {
    engine.ok(&["pause", name]);
    assert_eq!(engine.ok(&["inspect", "--format", "{{.State.Status}}", name]), "paused");
    engine.ok(&["unpause", name]);
    engine.ok(&["stop", "--time", "10", name]);
    assert_eq!(engine.ok(&["logs", name]), "started\nbye");
    assert_eq!(engine.ok(&["inspect", "--format", "{{.State.ExitCode}}", name]), "0");
    engine.ok(&["rm", name]);
    assert_eq!(engine.ok(&["ps", "--all", "--quiet"]), "");
}

/// An OCI archive of the bundle's root file system.
fn make_image(bundle: &Bundle, image: &Path, archive: &Path) {
    let run = |program: &str, words: &[&str]| {
        let output = Command::new(program).args(words).output().unwrap();
        assert!(output.status.success(), "{program} {words:?}: {output:?}");
    };
    let image = image.to_str().unwrap();
    let tagged = format!("{image}:box");
    run("umoci", &["init", "--layout", image]);
    run("umoci", &["new", "--image", &tagged]);
    run("umoci", &["insert", "--image", &tagged, bundle.path("rootfs").to_str().unwrap(), "/"]);
    run("umoci", &["config", "--image", &tagged, "--config.env", "PATH=/bin"]);
    run(
        "skopeo",
        &[
            "copy",
            "-q",
            &format!("oci:{tagged}"),
            &format!("oci-archive:{}:localhost/box:latest", archive.display()),
        ],
    );
}
