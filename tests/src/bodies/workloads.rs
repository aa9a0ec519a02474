//! What people really run: a package manager, an interpreter, a web server, a database, and work that takes what a
//! machine has. The same under both isolations, on one image with all of it (`scripts/images --workloads`).

use anyhow::ensure;

use crate::bed::Bed;
use crate::suite::{Body, Story, body};
use crate::world::{Isolation, Need};

const NEEDS: &[Need] = &[Need::WorkloadsImage];

pub const BODIES: &[Body] = &[
    body!(apt_installs_a_package).needs(NEEDS),
    body!(python_runs_a_test_suite).needs(NEEDS),
    body!(nginx_serves_a_client).needs(NEEDS),
    body!(redis_passes_its_benchmark).needs(NEEDS),
    body!(gigabyte_is_written_and_read_back).needs(NEEDS),
    body!(thousand_processes_come_and_go),
    body!(processors_are_kept_busy).needs(NEEDS),
];

fn apt_installs_a_package(bed: &Bed) -> Story {
    let script = "apt-get install --yes hello >&2 && hello && dpkg --status hello | grep ^Status";
    let finished = bed.sandbox("workloads").with("--memory", "512m").sh(script).run()?.succeeds()?;
    finished.prints("Hello, world!\nStatus: install ok installed\n")?;
    Ok(())
}

fn python_runs_a_test_suite(bed: &Bed) -> Story {
    let script = r#"
import hashlib, multiprocessing, os, socket, sqlite3, subprocess, sys, tempfile, threading, unittest, zlib

def square(n):
    return n * n

class Interpreter(unittest.TestCase):
    def test_processes(self):
        with multiprocessing.Pool(4) as pool:
            self.assertEqual(pool.map(square, range(50)), [n * n for n in range(50)])
    def test_threads(self):
        sums = []
        threads = [threading.Thread(target=lambda: sums.append(sum(range(10000)))) for _ in range(20)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        self.assertEqual(sums, [49995000] * 20)
    def test_database(self):
        with tempfile.TemporaryDirectory() as folder, sqlite3.connect(os.path.join(folder, "db")) as db:
            db.execute("create table t (n integer, text text)")
            db.executemany("insert into t values (?, ?)", [(n, str(n) * 10) for n in range(2000)])
            self.assertEqual(db.execute("select sum(n), count(*) from t").fetchone(), (1999000, 2000))
    def test_subprocess_and_pipe(self):
        self.assertEqual(subprocess.run(["tr", "a-z", "A-Z"], input=b"abc", capture_output=True).stdout, b"ABC")
    def test_sockets(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            peer, _ = server.accept()
            threading.Thread(target=lambda: (client.sendall(b"x" * 1000000), client.close())).start()
            received = 0
            while chunk := peer.recv(65536):
                received += len(chunk)
            self.assertEqual(received, 1000000)
    def test_compression(self):
        data = os.urandom(100000)
        self.assertEqual(zlib.decompress(zlib.compress(data * 3)), data * 3)

unittest.main(argv=["suite"], verbosity=2)
"#;
    let finished = bed
        .sandbox("workloads")
        .with("--memory", "512m")
        .command(&["python3", "-c", script])
        .run()?
        .succeeds()?;
    finished.says("Ran 6 tests")?.says("OK")?;
    Ok(())
}

fn nginx_serves_a_client(bed: &Bed) -> Story {
    let script = r#"
set -e
head -c 3000000 /dev/urandom >/var/www/html/file
mkdir -p /var/log/nginx
nginx
python3 - <<'CLIENT'
import concurrent.futures, hashlib, urllib.request
def get(_):
    return hashlib.sha256(urllib.request.urlopen("http://127.0.0.1/file").read()).hexdigest()
with concurrent.futures.ThreadPoolExecutor(8) as clients:
    answers = set(clients.map(get, range(40)))
print("the same" if answers == {hashlib.sha256(open("/var/www/html/file", "rb").read()).hexdigest()} else answers)
CLIENT
nginx -s quit
wc -l </var/log/nginx/access.log
"#;
    let finished = bed.sandbox("workloads").with("--memory", "512m").sh(script).run()?.succeeds()?;
    finished.prints("the same\n40\n")?;
    Ok(())
}

fn redis_passes_its_benchmark(bed: &Bed) -> Story {
    let script = r#"
set -e
redis-server --save "" --daemonize yes --logfile /tmp/log >/dev/null
until redis-cli ping >/dev/null 2>&1; do sleep 0.1; done
redis-benchmark -n 3000 -c 20 -t set,get,lpush --csv | cut -d, -f1
redis-cli llen mylist
redis-cli shutdown nosave || true
"#;
    let finished = bed.sandbox("workloads").with("--memory", "512m").sh(script).run()?.succeeds()?;
    finished.prints("\"test\"\n\"SET\"\n\"GET\"\n\"LPUSH\"\n3000\n")?;
    Ok(())
}

fn gigabyte_is_written_and_read_back(bed: &Bed) -> Story {
    // Every MiB differs from every other, so that one in a wrong place shows.
    let script = r#"
import os, sys
base = os.urandom(1 << 20)
def block(n):
    return n.to_bytes(8, "little") + base[n:] + base[8:n] if n >= 8 else n.to_bytes(8, "little") + base[8:]
with open("/var/big", "wb") as file:
    for n in range(1024):
        file.write(block(n))
    file.flush()
    os.fsync(file.fileno())
assert os.path.getsize("/var/big") == 1024 << 20, os.path.getsize("/var/big")
with open("/var/big", "rb") as file:
    for n in range(1024):
        assert file.read(1 << 20) == block(n), f"MiB {n} differs"
print("all there")
"#;
    // The writable layer takes at most half of a VM's memory.
    let sandbox = bed.sandbox("workloads").with("--memory", "2200m");
    sandbox.command(&["python3", "-c", script]).run()?.succeeds()?.prints("all there\n")?;
    Ok(())
}

fn thousand_processes_come_and_go(bed: &Bed) -> Story {
    let script = "for i in $(seq 1000); do sleep 600 & done; ls /proc | grep -c '^[0-9]*$'; kill $(jobs -p); \
                  wait; for i in $(seq 1000); do /bin/true & done; wait; echo done";
    let finished = bed.busybox().with("--memory", "512m").sh(script).run()?.succeeds()?;
    let out = finished.out();
    let mut lines = out.lines();
    let together: u32 = lines.next().unwrap_or_default().parse()?;
    ensure!(together >= 1000 && lines.next() == Some("done"), "not all ran at the same time\n{finished}");
    Ok(())
}

fn processors_are_kept_busy(bed: &Bed) -> Story {
    // A VM gets no more of them than its host has.
    let most = std::thread::available_parallelism()?.get().min(4);
    let script = r#"
import multiprocessing, os, time
def work(seed):
    value = seed
    for _ in range(300000):
        value = (value * 6364136223846793005 + 1442695040888963407) & (1 << 64) - 1
    return value, os.getpid()
with multiprocessing.Pool(4) as pool:
    results = pool.map(work, [1, 1, 2, 2] * 4, chunksize=4)
assert len({value for value, _ in results}) == 2, results
print(os.cpu_count(), "done")
"#;
    let mut sandbox = bed.sandbox("workloads").with("--memory", "512m");
    if bed.isolation() == Isolation::Vm {
        sandbox = sandbox.with("--cpus", &most.to_string());
    }
    let finished = sandbox.command(&["python3", "-c", script]).run()?.succeeds()?;
    let out = finished.out();
    ensure!(out.ends_with(" done\n"), "{finished}");
    // A container sees the processors of its host, however many these are.
    ensure!(bed.isolation() == Isolation::Container || out == format!("{most} done\n"), "{finished}");
    Ok(())
}
