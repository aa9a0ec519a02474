//! Network namespaces that an engine has set up, with an interface and what belongs to it: a container that joins one has
//! that, whatever it is in.

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    process::{Child, Command, Output, Stdio},
};

use serde_json::json;

use crate::{
    Test,
    fixture::{Bundle, await_that, has, text},
};

pub fn all() -> Vec<Test> {
    if !has("ip", "iproute2") || !has("nsenter", "util-linux") {
        return Vec::new();
    }
    crate::tests![
        joined_namespace_carries_traffic_both_ways,
        settings_of_a_joined_namespace_are_those_inside,
        joined_namespace_is_as_before_when_a_container_of_it_is_gone,
    ]
}

/// More than all buffers on the way hold.
const MANY_BYTES: usize = 3 << 20;

/// A network namespace, for as long as this lives. As an engine's, it has no process in it.
pub struct Namespace(File);

impl Namespace {
    pub fn new() -> Self {
        let maker = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo; exec sleep 1000"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn();
        let mut maker = maker.unwrap();
        // It is in it once it speaks.
        std::io::Read::read_exact(&mut maker.stdout.take().unwrap(), &mut [0]).unwrap();
        let namespace = File::open(format!("/proc/{}/ns/net", maker.id())).unwrap();
        maker.kill().unwrap();
        maker.wait().unwrap();
        Self(namespace)
    }

    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }

    /// A program in it.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path())).args(words).stdin(Stdio::null());
        command
    }

    pub fn run(&self, script: &str) -> Output {
        self.command(&["timeout", "20", "sh", "-c", script]).output().unwrap()
    }

    #[track_caller]
    pub fn ok(&self, script: &str) -> String {
        let output = self.run(script);
        assert!(output.status.success(), "{script}: {output:?}");
        text(&output.stdout)
    }
}

/// Two of them with a cable: that of an engine's bridge, so to speak, which serves files, and that of a container.
pub struct Cable {
    server: Child,
    pub outside: Namespace,
    pub inside: Namespace,
}

impl Cable {
    pub fn new(bundle: &Bundle) -> Self {
        let (outside, inside) = (Namespace::new(), Namespace::new());
        let peer = inside.path();
        outside.ok(&format!(
            "ip link set lo up && ip link add cable type veth peer name eth0 netns {peer} && ip address add 10.77.0.1/24 dev cable && \
             ip address add fd77::1/64 dev cable nodad && ip link set cable mtu 1400 up"
        ));
        inside.ok("ip address add 10.77.0.2/24 dev eth0 && ip address add fd77::2/64 dev eth0 nodad && \
             ip link set eth0 mtu 1400 up && ip route add default via 10.77.0.1 && \
             ip route add 10.88.0.0/16 via 10.77.0.1 metric 7 && ip -6 route add default via fd77::1 && \
             ip neighbour add 10.77.0.9 lladdr 02:00:00:00:00:09 dev eth0");
        let files = bundle.path("served");
        fs::create_dir(&files).unwrap();
        fs::write(files.join("many"), vec![b'x'; MANY_BYTES]).unwrap();
        fs::write(files.join("word"), "outside").unwrap();
        let serve = ["busybox", "httpd", "-f", "-p", "80", "-h", files.to_str().unwrap()];
        let server = outside.command(&serve).spawn().unwrap();
        let cable = Self { server, outside, inside };
        await_that("there is a server", || {
            cable.outside.run("busybox wget -qO- http://10.77.0.1/word").status.success()
        });
        cable
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// A container that is in the inside of a cable.
pub fn joined(bundle: Bundle, cable: &Cable) -> Bundle {
    bundle.with("/linux/namespaces/1", json!({ "type": "network", "path": cable.inside.path() }))
}

/// A bundle with a script, and a cable whose inside is its network namespace.
fn wired(script: &str) -> (Bundle, Cable) {
    let bundle = Bundle::script(script);
    let cable = Cable::new(&bundle);
    (joined(bundle, &cable), cable)
}

fn joined_namespace_carries_traffic_both_ways() {
    let (bundle, cable) = wired(
        "busybox wget -qO- http://10.77.0.1/word; echo; busybox wget -qO- 'http://[fd77::1]/word'; echo; \
         busybox wget -qO- http://10.77.0.1/many | busybox wc -c; exec busybox httpd -f -p 80 -h /bin",
    );
    bundle.start();
    bundle.await_output(&MANY_BYTES.to_string());
    assert!(bundle.output().starts_with("outside\noutside\n"));
    let served = "busybox wget -qO- http://10.77.0.2/busybox | busybox sha256sum";
    await_that("it serves", || cable.outside.run("busybox wget -qO- http://10.77.0.2/sh").status.success());
    let own = cable.outside.ok("busybox sha256sum < /bin/busybox");
    assert_eq!(cable.outside.ok(served), own);
    assert_eq!(cable.outside.ok(&served.replace("10.77.0.2", "[fd77::2]")), own);
    bundle.ok(&["delete", "--force", &bundle.id]);
}

fn settings_of_a_joined_namespace_are_those_inside() {
    let script = "busybox ip -o address show dev eth0; busybox ip link show dev eth0; busybox ip route; \
                  busybox ip -6 route; busybox ip neigh show nud permanent";
    let (bundle, cable) = wired(script);
    let address = cable.inside.ok("ip -o link show eth0 | grep -o 'ether [0-9a-f:]*'");
    let output = bundle.ok(&["run", &bundle.id]);
    for expected in [
        "inet 10.77.0.2/24",
        "inet6 fd77::2/64",
        "mtu 1400",
        &address,
        "default via 10.77.0.1",
        "10.88.0.0/16 via 10.77.0.1",
        "metric 7",
        "default via fd77::1",
        "10.77.0.9",
    ] {
        assert!(output.contains(expected), "{expected} is not in {output}");
    }
}

fn joined_namespace_is_as_before_when_a_container_of_it_is_gone() {
    let (bundle, cable) = wired("echo up; sleep 100");
    let links = || cable.inside.ok("ip -o link | cut -d' ' -f2");
    let before = links();
    let is_as_before = || {
        await_that("nothing of it is left", || links() == before);
        assert_eq!(cable.inside.ok("busybox wget -qO- http://10.77.0.1/word"), "outside");
    };
    // One that ends by itself, and one that nobody can take its leave of.
    let script = bundle.config["process"]["args"][2].clone();
    let bundle = bundle.with("/process/args/2", json!("true"));
    bundle.ok(&["run", &bundle.id]);
    is_as_before();
    let bundle = bundle.with("/process/args/2", script);
    bundle.start();
    bundle.await_output("up");
    bundle.ok(&["kill", &bundle.id, "KILL"]);
    bundle.await_status("stopped");
    bundle.ok(&["delete", &bundle.id]);
    is_as_before();
}
