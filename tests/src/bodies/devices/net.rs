//! Network devices.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::bed::Bed;
use crate::guest::{Guest, Ran};
use crate::image::sha256_hex;
use crate::lan::Lan;
use crate::noise::Noise;
use crate::process::Input;
use crate::suite::{Body, Story, body};
use crate::world::{Isolation, Need};

pub const BODIES: &[Body] = &[
    body!(tap_carries_streams_both_ways_in_large_segments).only(Isolation::Vm),
    body!(limit_on_sent_bytes_holds).only(Isolation::Vm),
    body!(tap_that_is_gone_leaves_the_guest_without_carrier).only(Isolation::Vm),
    body!(missing_tap_is_named).only(Isolation::Vm),
    body!(nginx_and_redis_serve_clients_on_the_host).only(Isolation::Vm).needs(&[Need::WorkloadsImage]),
    body!(guest_reaches_the_host_through_passt).only(Isolation::Vm).needs(&[Need::Passt]),
];

const MAC: &str = "02:00:00:00:00:02";
const MIB: usize = 1 << 20;

const ADDRESS: &str = "ifconfig lo up\n\
                       ifconfig eth0 10.0.0.2 netmask 255.255.255.0 up\n\
                       ping -c 3 -W 5 10.0.0.1\n";

/// Feature bits that Linux's driver has accepted (virtio 1.2 §5.1.3).
const HOST_TSO4: usize = 11;
const GUEST_TSO4: usize = 7;
const MRG_RXBUF: usize = 15;

fn has_feature(ran: &Ran, bit: usize) -> Result<bool> {
    Ok(ran.value("features")?.as_bytes().get(bit) == Some(&b'1'))
}

fn number(ran: &Ran, name: &str) -> Result<usize> {
    ran.value(name)?.parse().with_context(|| format!("{name} is no number"))
}

/// Receives 20 MiB on port 5000 and sends them back to port 5001; then tells what it has seen.
fn exchange(bed: &Bed) -> Result<(Ran, Vec<u8>, Vec<u8>)> {
    let lan = Lan::with_tap(bed)?;
    let content = Noise::new(4).bytes(20 * MIB);
    let path = bed.write("content", &content)?;
    // busybox's nc closes what it has nothing more to send on: a pipe that stays open keeps it from that.
    let script = format!(
        "{ADDRESS}\
         mkfifo /tmp/open; exec 3<>/tmp/open\n\
         nc -l -p 5000 <&3 > /tmp/in\n\
         echo received $(sha256sum < /tmp/in)\n\
         nc 10.0.0.1 5001 < /tmp/in\n\
         echo features $(cat /sys/class/net/eth0/device/features)\n\
         for name in rx_packets rx_bytes tx_packets tx_bytes rx_dropped rx_errors tx_errors; do\n\
         echo $name $(cat /sys/class/net/eth0/statistics/$name)\n\
         done"
    );
    let mut sink = lan.start(&["busybox", "nc", "-l", "-p", "5001"], &Input::Held)?;
    let guest = Guest::new(bed)?
        .inside(lan.prefix())
        .with(json!({ "memory_mib": 256, "nets": [{ "backend": { "tap-name": "tap0" }, "mac": MAC }] }))
        .start(&script)?;
    let sent = lan.sh(&format!(
        "tries=0\n\
         until busybox nc 10.0.0.2 5000 < {}; do\n\
         tries=$((tries + 1)); [ $tries -lt 300 ]; sleep 0.2\n\
         done",
        path.display()
    ));
    let ran = guest.wait()?.passes()?;
    sent?.succeeds()?;
    sink.wait_for_end()?;
    let seen = sink.wait()?.succeeds()?.stdout;
    Ok((ran, content, seen))
}

fn tap_carries_streams_both_ways_in_large_segments(bed: &Bed) -> Story {
    let (ran, content, seen) = exchange(bed)?;
    ran.prints("3 packets received")?;
    ran.prints(&format!("received {}", sha256_hex(&content)))?;
    ensure!(seen == content, "the host got other bytes than the guest sent");
    for bit in [GUEST_TSO4, HOST_TSO4, MRG_RXBUF] {
        ensure!(has_feature(&ran, bit)?, "feature {bit} was not negotiated\n{}", ran.describe());
    }
    // 20 MiB are 14,500 frames of 1,448 bytes.
    for direction in ["rx_packets", "tx_packets"] {
        let packets = number(&ran, direction)?;
        ensure!(packets < 8000, "{packets} {direction}: no large segments\n{}", ran.describe());
    }
    for name in ["rx_dropped", "rx_errors", "tx_errors"] {
        ensure!(number(&ran, name)? == 0, "{name} is not 0\n{}", ran.describe());
    }
    Ok(())
}

/// Debian's own servers, on the image's layer, behind a tap.
fn nginx_and_redis_serve_clients_on_the_host(bed: &Bed) -> Story {
    const CLIENTS: usize = 6;
    let lan = Lan::with_tap(bed)?;
    let layer = bed.largest_layer()?;
    let script = format!(
        "{ADDRESS}\
         mkdir /tmp/low /tmp/new\n\
         mount -t erofs -o ro /dev/vda /tmp/low\n\
         mount -t tmpfs new /tmp/new\n\
         mkdir /tmp/new/up /tmp/new/work\n\
         mount -t overlay -o lowerdir=/tmp/low,upperdir=/tmp/new/up,workdir=/tmp/new/work root /mnt\n\
         for place in dev proc sys; do mount -o bind /$place /mnt/$place; done\n\
         head -c 4000000 /dev/urandom > /mnt/var/www/html/file\n\
         echo digest $(sha256sum < /mnt/var/www/html/file)\n\
         mkdir -p /mnt/var/log/nginx; : > /mnt/var/log/nginx/access.log\n\
         chroot /mnt redis-server --bind 10.0.0.2 --protected-mode no --save '' --daemonize yes >/dev/null\n\
         chroot /mnt /usr/sbin/nginx\n\
         echo servers are up\n\
         until grep -q /goodbye /mnt/var/log/nginx/access.log; do sleep 0.2; done\n\
         echo served $(grep -c 'GET /file.* 200 4000000 ' /mnt/var/log/nginx/access.log)\n\
         echo redis $(chroot /mnt redis-cli -h 10.0.0.2 get greeting)"
    );
    let guest = Guest::new(bed)?
        .inside(lan.prefix())
        .with(json!({
            "memory_mib": 512,
            "disks": [{ "path": layer, "id": "layer", "read_only": true }],
            "nets": [{ "backend": { "tap-name": "tap0" }, "mac": MAC }],
        }))
        .start(&script)?;
    let fetched = lan.sh(&format!(
        "get() {{ busybox wget -q -O - http://10.0.0.2/$1; }}\n\
         tries=0\n\
         until get '' >/dev/null 2>&1; do tries=$((tries + 1)); [ $tries -lt 600 ]; sleep 0.2; done\n\
         for client in $(seq {CLIENTS}); do get file | sha256sum & done; wait\n\
         printf 'set greeting hello\\r\\nget greeting\\r\\nquit\\r\\n' | busybox nc 10.0.0.2 6379\n\
         get goodbye 2>/dev/null || true"
    ));
    // First, since a guest without clients waits for them.
    let fetched = fetched?.succeeds()?;
    let ran = guest.wait()?.passes()?;
    let digest = ran.value("digest")?.trim_end_matches(" -").to_owned();
    ensure!(fetched.out().matches(&digest).count() == CLIENTS, "not all have {digest}\n{fetched}");
    ensure!(fetched.out().contains("+OK\r\n$5\r\nhello\r\n+OK"), "redis did not answer\n{fetched}");
    ran.prints(&format!("served {CLIENTS}"))?;
    ran.prints("redis hello")
}

fn limit_on_sent_bytes_holds(bed: &Bed) -> Story {
    let lan = Lan::with_tap(bed)?;
    let script = format!(
        "{ADDRESS}\
         dd if=/dev/zero of=/tmp/data bs=64k count=32 2>/dev/null\n\
         read before rest < /proc/uptime\n\
         nc 10.0.0.1 5001 < /tmp/data\n\
         read after rest < /proc/uptime\n\
         echo before $before; echo after $after"
    );
    let mut sink = lan.start(&["busybox", "nc", "-l", "-p", "5001"], &Input::Held)?;
    let limit = json!({ "bytes": { "per_second": MIB, "burst": 64 * 1024 } });
    let net = json!({ "backend": { "tap-name": "tap0" }, "mac": MAC, "send_limit": limit });
    let ran = Guest::new(bed)?.inside(lan.prefix()).with(json!({ "nets": [net] })).run(&script)?.passes()?;
    sink.wait_for_end()?;
    ensure!(sink.wait()?.succeeds()?.stdout.len() == 2 * MIB, "not all bytes have come");
    let seconds = |name: &str| -> Result<f64> { Ok(ran.value(name)?.parse()?) };
    let took = seconds("after")? - seconds("before")?;
    // 2 MiB at 1 MiB/s, but for the first 64 KiB and what TCP may have in flight; the guest's clock is the host's.
    ensure!(took > 1.7, "2 MiB were sent in {took} s\n{}", ran.describe());
    Ok(())
}

fn tap_that_is_gone_leaves_the_guest_without_carrier(bed: &Bed) -> Story {
    let lan = Lan::with_tap(bed)?;
    let script = format!(
        "{ADDRESS}\
         echo carrier at first $(cat /sys/class/net/eth0/carrier)\n\
         nc 10.0.0.1 5001 < /dev/null\n\
         while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.1; done\n\
         echo carrier at last $(cat /sys/class/net/eth0/carrier)\n\
         ping -c 1 -W 1 10.0.0.1 || echo no answer"
    );
    let guest = Guest::new(bed)?
        .inside(lan.prefix())
        .with(json!({ "nets": [{ "backend": { "tap-name": "tap0" }, "mac": MAC }] }))
        .start(&script)?;
    lan.start(&["busybox", "nc", "-l", "-p", "5001"], &Input::Null)?.wait()?;
    lan.sh("ip link delete tap0")?.succeeds()?;
    let ran = guest.wait()?.passes()?;
    ran.prints("carrier at first 1")?;
    ran.prints("carrier at last 0")?;
    ran.prints("no answer")
}

fn missing_tap_is_named(bed: &Bed) -> Story {
    let lan = Lan::new(bed, "")?;
    let net = json!({ "backend": { "tap-fd": 77 }, "mac": MAC });
    let ran = Guest::new(bed)?.inside(lan.prefix()).with(json!({ "nets": [net] })).run("true")?;
    let message = ran.last["message"].as_str().unwrap_or_default();
    ensure!(message.contains("tap on file descriptor 77"), "the message is {message:?}");
    Ok(())
}

fn guest_reaches_the_host_through_passt(bed: &Bed) -> Story {
    // passt takes addresses and routes from the namespace that it is started in.
    let lan = Lan::new(
        bed,
        "ip link add up0 type veth peer name up1\n\
         ip link set up1 up\n\
         ip address add 10.1.0.2/24 dev up0\n\
         ip link set up0 up\n\
         ip route add default via 10.1.0.1",
    )?;
    let socket = bed.scratch().join("passt");
    let content = Noise::new(5).bytes(8 * MIB);
    let path = bed.write("content", &content)?;
    let mut server =
        lan.start(&["sh", "-c", &format!("busybox nc -l -p 5001 < {}", path.display())], &Input::Null)?;
    let passt = lan.start(
        &["passt", "--foreground", "--socket", &socket.to_string_lossy(), "--no-dhcpv6", "--runas", "0"],
        &Input::Null,
    )?;
    let deadline = bed.deadline();
    while !socket.exists() {
        ensure!(std::time::Instant::now() < deadline, "passt has made no socket");
        std::thread::sleep(bed.span(20));
    }
    // passt maps its gateway's address to the host's loopback.
    let script = "ifconfig eth0 10.1.0.2 netmask 255.255.255.0 up\n\
                  route add default gw 10.1.0.1\n\
                  mkfifo /tmp/open; exec 3<>/tmp/open\n\
                  nc 10.1.0.1 5001 <&3 > /tmp/in\n\
                  echo received $(sha256sum < /tmp/in)\n\
                  echo mtu $(cat /sys/class/net/eth0/mtu)";
    let net = json!({ "backend": { "socket-path": socket }, "mac": MAC, "mtu": 65520 });
    let ran = Guest::new(bed)?.inside(lan.prefix()).with(json!({ "nets": [net] })).run(script)?.passes()?;
    ran.prints(&format!("received {}", sha256_hex(&content)))?;
    ran.prints("mtu 65520")?;
    server.wait_for_end()?;
    drop(passt);
    fs::remove_file(&socket).or(Ok(()))
}
