//! Pulling and pushing, against Debian's docker-registry, with skopeo as the other client.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cloche_images::registry::{
    CredentialStore, Mirrors, Proxies, PullError, Pulled, PushError, Pushed, RegistryOptions, Repository,
    search,
};
use cloche_images::{NoProgress, Reference, Store};
use libtest_mimic::Trial;

use crate::archive::{Packing, TestImage, tar_of};
use crate::bed::{Bed, Failure, Need, chain, run, test};
use crate::layers::noise;
use crate::server::{self, Asked, Server};
use crate::tarball::{Item, Tarball};

const REGISTRY: Need = Need::Tool("docker-registry");
const SKOPEO: Need = Need::Tool("skopeo");
const OPENSSL: Need = Need::Tool("openssl");

/// The password `opensesame`, as htpasswd -B has it.
const HTPASSWD: &str = "me:$2b$04$dzO5wzmDxMIwYxXndSOHaO3n.evu4i4KdEnd2CDciwPmoKBWCu3uO\n";

pub fn tests() -> Vec<Trial> {
    vec![
        test("pushed_image_is_pulled_by_skopeo_with_its_digest", &[REGISTRY, SKOPEO], we_push),
        test("image_pushed_by_skopeo_is_pulled_with_its_digest", &[REGISTRY, SKOPEO], they_push),
        test("image_without_manifest_has_the_same_digest_each_time", &[REGISTRY], digest_is_stable),
        test("only_what_is_missing_travels", &[REGISTRY], missing_only),
        test("layer_of_another_repository_is_taken_over", &[REGISTRY], mounted),
        test("password_is_asked_for_and_checked", &[REGISTRY], password),
        test("registry_is_reached_through_a_proxy", &[REGISTRY, OPENSSL], through_proxy),
        test("redirect_to_this_machine_is_not_followed", &[OPENSSL], inward),
        test("mirrors_are_asked_first_and_the_registry_if_they_fail", &[REGISTRY], mirrors),
        test("tags_and_repositories_are_listed", &[REGISTRY], listed),
        test("certificate_is_trusted_only_if_named", &[REGISTRY, OPENSSL], certificates),
        test("real_image_comes_back_from_a_registry_as_it_was_loaded", &[REGISTRY, Need::RealImages], real),
    ]
}

/// A registry in a directory of the bed, gone with this.
pub struct Registry {
    child: Child,
    host: String,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    fn start(bed: &Bed, more: &str, http: &str) -> Result<Registry, Failure> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let host = format!("127.0.0.1:{port}");
        let directory = bed.path("registry");
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n{more}http:\n  addr: {host}\n{http}",
            directory.display()
        );
        let path = bed.write("registry.yml", config.as_bytes())?;
        let log = fs::File::create(bed.path("registry.log"))?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut registry = Registry { child: command.spawn()?, host };
        let patience = Instant::now() + Duration::from_secs(60);
        while std::net::TcpStream::connect(&registry.host).is_err() {
            if Instant::now() > patience || registry.child.try_wait()?.is_some() {
                let log = fs::read_to_string(bed.path("registry.log"))?;
                return Err(format!("docker-registry does not start: {log}").into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }

    pub fn plain(bed: &Bed) -> Result<Registry, Failure> {
        Registry::start(bed, "", "")
    }

    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.host)
    }

    fn skopeo(&self, name: &str) -> String {
        format!("docker://{}/{name}", self.host)
    }

    /// The digest under which a tag is known, as skopeo sees it.
    pub fn digest(&self, name: &str) -> Result<String, Failure> {
        let format = ["inspect", "--tls-verify=false", "--format", "{{.Digest}}"];
        Ok(run("skopeo", &[&format[..], &[&self.skopeo(name)]].concat())?.trim().to_owned())
    }
}

pub fn on_this_machine() -> RegistryOptions {
    RegistryOptions { trust_loopback: true, ..RegistryOptions::default() }
}

fn pull_with(store: &Store, image: &str, options: &RegistryOptions) -> Result<Pulled, PullError> {
    let reference: Reference = image.parse().expect("tests have good names");
    let repository = Repository::open(&reference, false, options)?;
    store.pull(&reference, &repository, &NoProgress)
}

pub fn pull(store: &Store, image: &str) -> Result<Pulled, PullError> {
    pull_with(store, image, &on_this_machine())
}

fn push_with(store: &Store, image: &str, options: &RegistryOptions) -> Result<Pushed, PushError> {
    let reference: Reference = image.parse().expect("tests have good names");
    let mut repository = Repository::open(&reference, true, options)?;
    store.push(&reference, &mut repository, &NoProgress)
}

pub fn push(store: &Store, image: &str) -> Result<Pushed, PushError> {
    push_with(store, image, &on_this_machine())
}

fn expect(what: &str, condition: bool) -> Result<(), Failure> {
    if condition { Ok(()) } else { Err(format!("expected: {what}").into()) }
}

fn other_store(bed: &Bed, name: &str) -> Result<Store, Failure> {
    Ok(Store::open(&bed.path(name))?)
}

/// Two layers, one of them with holes and a long name.
pub fn sample(name: &str, packing: Packing) -> TestImage {
    let long = format!("{}/file", "a-name-longer-than-a-header-has-room-for/".repeat(4));
    let mut sparse = noise(200_000, 3);
    sparse[70_000..180_000].fill(0);
    let base = Tarball::of([
        Item::directory("etc"),
        Item::file("etc/motd", "hello"),
        Item::file("noise", noise(300_000, 7)),
        Item::file("holes", sparse),
        Item::file("zeros", vec![0; 100_000]),
        Item::file("empty", ""),
    ]);
    let top = Tarball::of([Item::file(&long, "deep"), Item::file(".wh.noise", "")]);
    TestImage { name: Some(name.to_owned()), ..TestImage::of([base, top]) }.packed(packing)
}

fn manifest_digest(files: &[(String, Vec<u8>)]) -> Result<String, Failure> {
    let index = files.iter().find(|(name, _)| name == "index.json").ok_or("no index")?;
    let index: serde_json::Value = serde_json::from_slice(&index.1)?;
    Ok(index["manifests"][0]["digest"].as_str().ok_or("no digest")?.to_owned())
}

fn we_push(bed: &Bed) -> Result<(), Failure> {
    let registry = Registry::plain(bed)?;
    for (number, packing) in [Packing::Gzip, Packing::Zstd, Packing::Plain].into_iter().enumerate() {
        let name = registry.image(&format!("app:{number}"));
        let files = sample(&name, packing).oci_files()?;
        bed.load(&bed.write("image.tar", &tar_of(&files))?)?;
        let pushed = push(&bed.store, &name).map_err(|error| chain(&error))?;
        let expected = manifest_digest(&files)?;
        expect("the digest of the layout", pushed.digest.to_string() == expected)?;
        expect("skopeo sees the same", registry.digest(&format!("app:{number}"))? == expected)?;
        let layout = bed.path(&format!("layout-{number}"));
        let copy = [
            "copy",
            "-q",
            "--preserve-digests",
            "--src-tls-verify=false",
            &registry.skopeo(&format!("app:{number}")),
        ];
        let target = format!("oci:{}:x", layout.display());
        run("skopeo", &[&copy[..], &[&target]].concat())?;
        let blob = layout.join("blobs/sha256").join(expected.trim_start_matches("sha256:"));
        expect("skopeo has the manifest", blob.is_file())?;
    }
    Ok(())
}

fn they_push(bed: &Bed) -> Result<(), Failure> {
    let registry = Registry::plain(bed)?;
    let image = sample("docker.io/library/x:latest", Packing::Plain);
    let archive = bed.write("image.tar", &tar_of(&image.docker_files()?))?;
    let from = format!("docker-archive:{}", archive.display());
    for (number, format) in
        [["-f", "v2s2"].as_slice(), &["-f", "oci"], &["-f", "oci", "--dest-compress-format=zstd"]]
            .into_iter()
            .enumerate()
    {
        let name = format!("app:{number}");
        let to = registry.skopeo(&name);
        let copy = [&["copy", "-q", "--dest-tls-verify=false"], format, &[&from, &to]].concat();
        run("skopeo", &copy)?;
        let pulled = pull(&bed.store, &registry.image(&name)).map_err(|error| chain(&error))?;
        let digest = registry.digest(&name)?;
        expect("the registry's digest", pulled.digest.to_string() == digest)?;
        let found = bed.store.resolve(&format!("{}@{digest}", registry.image("app")))?;
        expect("it is found by its digest", found.id == pulled.id && found.manifest == Some(pulled.digest))?;
        // (The configuration is not: skopeo writes its own.)
        let layers = found.layers.iter().map(|layer| layer.diff_id.hex());
        let expected = image.layers.iter().map(|layer| crate::bed::sha256(layer));
        expect("its layers are those of the archive", layers.eq(expected))?;
        let pushed = push(&bed.store, &registry.image(&name)).map_err(|error| chain(&error))?;
        expect("a push gives the digest back", pushed.digest == pulled.digest)?;
    }
    let by_digest = format!("{}@{}", registry.image("app"), registry.digest("app:1")?);
    let store = other_store(bed, "by-digest")?;
    pull(&store, &by_digest).map_err(|error| chain(&error))?;
    expect("what is pulled by digest has no tag", store.resolve(&by_digest)?.names.is_empty())
}

fn digest_is_stable(bed: &Bed) -> Result<(), Failure> {
    let registry = Registry::plain(bed)?;
    let name = registry.image("app:1");
    let archive = bed.write("image.tar", &tar_of(&sample(&name, Packing::Plain).docker_files()?))?;
    let mut digests = Vec::new();
    for store in ["a", "b"] {
        let store = other_store(bed, store)?;
        store.load(&archive, &Default::default(), &NoProgress)?;
        digests.push(push(&store, &name).map_err(|error| chain(&error))?.digest);
        store.load(&archive, &Default::default(), &NoProgress)?;
        digests.push(push(&store, &name).map_err(|error| chain(&error))?.digest);
    }
    expect("four pushes of one digest", digests.windows(2).all(|pair| pair[0] == pair[1]))?;
    let pulled = pull(&bed.store, &name).map_err(|error| chain(&error))?;
    expect("it is pulled with it", Some(&pulled.digest) == digests.first())
}

/// What the registry's log would tell, from its storage: how many uploads there were.
fn blobs_in(bed: &Bed) -> Result<usize, Failure> {
    let mut count = 0;
    for prefix in fs::read_dir(bed.path("registry/docker/registry/v2/blobs/sha256"))? {
        count += fs::read_dir(prefix?.path())?.count();
    }
    Ok(count)
}

fn missing_only(bed: &Bed) -> Result<(), Failure> {
    let registry = Registry::plain(bed)?;
    let base = Tarball::of([Item::file("base", noise(400_000, 1))]);
    let image = |name: &str, own: &str| {
        let own = Tarball::of([Item::file("own", own)]);
        TestImage { name: Some(registry.image(name)), ..TestImage::of([base.clone(), own]) }
            .packed(Packing::Zstd)
    };
    for (name, own) in [("app:1", "one"), ("app:2", "two")] {
        bed.load(&bed.write("image.tar", &tar_of(&image(name, own).oci_files()?))?)?;
        push(&bed.store, &registry.image(name)).map_err(|error| chain(&error))?;
    }
    expect("the shared layer is there once: 3 layers, 2 manifests, 2 configurations", blobs_in(bed)? == 7)?;
    let store = other_store(bed, "other")?;
    pull(&store, &registry.image("app:1")).map_err(|error| chain(&error))?;
    let shared = fs::read_dir(store.root().join("blobs/sha256"))?
        .filter_map(Result::ok)
        .max_by_key(|entry| entry.metadata().map(|metadata| metadata.len()).unwrap_or_default());
    let shared = shared.ok_or("no blobs")?;
    // If it travelled again, it would have to come from here.
    let hex = shared.file_name().into_string().map_err(|_| "odd name")?;
    let data = bed.path("registry/docker/registry/v2/blobs/sha256").join(&hex[..2]).join(&hex).join("data");
    fs::write(&data, "no more")?;
    pull(&store, &registry.image("app:2")).map_err(|error| chain(&error))?;
    let error =
        pull(&other_store(bed, "fresh")?, &registry.image("app:2")).err().ok_or("a torn layer was pulled")?;
    expect("a fresh store notices", chain(&error).contains(&hex))
}

fn mounted(bed: &Bed) -> Result<(), Failure> {
    let registry = Registry::plain(bed)?;
    let load = |name: &str| -> Result<(), Failure> {
        let image = sample(&registry.image(name), Packing::Gzip);
        bed.load(&bed.write("image.tar", &tar_of(&image.oci_files()?))?)?;
        Ok(())
    };
    load("first:1")?;
    push(&bed.store, &registry.image("first:1")).map_err(|error| chain(&error))?;
    load("second:1")?;
    push(&bed.store, &registry.image("second:1")).map_err(|error| chain(&error))?;
    // An upload that was begun and given up leaves a directory; one that was not needed leaves none.
    let uploads = bed.path("registry/docker/registry/v2/repositories/second/_uploads");
    let begun = fs::read_dir(uploads).map(|entries| entries.count()).unwrap_or(0);
    expect("no upload is left in the middle", begun == 0)?;
    pull(&other_store(bed, "other")?, &registry.image("second:1")).map_err(|error| chain(&error))?;
    Ok(())
}

fn password(bed: &Bed) -> Result<(), Failure> {
    let file = bed.write("htpasswd", HTPASSWD.as_bytes())?;
    let auth = format!("auth:\n  htpasswd: {{realm: test, path: {}}}\n", file.display());
    let registry = Registry::start(bed, &auth, "")?;
    let name = registry.image("app:1");
    bed.load(&bed.write("image.tar", &tar_of(&sample(&name, Packing::Gzip).oci_files()?))?)?;
    let error = push(&bed.store, &name).err().ok_or("a stranger pushed")?;
    expect("a stranger is told to log in", chain(&error).contains("cloche login"))?;

    let config = bed.path("docker/config.json");
    let options = |trust_loopback| RegistryOptions {
        trust_loopback,
        credentials: Some(CredentialStore::at(&config)),
        ..RegistryOptions::default()
    };
    let reference: Reference = name.parse()?;
    let wrong = Repository::open_as(&reference, "me", "closesesame", &options(true))?.greet();
    expect(
        "a wrong password is refused",
        wrong.is_err_and(|error| chain(&error).contains("refuses your credentials")),
    )?;
    Repository::open_as(&reference, "me", "opensesame", &options(true))?
        .greet()
        .map_err(|error| chain(&error))?;
    CredentialStore::at(&config).put(&registry.host, "me", "opensesame")?;
    push_with(&bed.store, &name, &options(true)).map_err(|error| chain(&error))?;
    pull_with(&other_store(bed, "other")?, &name, &options(true)).map_err(|error| chain(&error))?;
    Ok(())
}

/// A certificate authority by form and a server's by use, as `openssl req -x509` makes them.
fn certificate(bed: &Bed, name: &str, host: &str) -> Result<(PathBuf, PathBuf), Failure> {
    let (cert, key) = (bed.path(&format!("{name}.crt")), bed.path(&format!("{name}.pem")));
    let text = |path: &Path| path.display().to_string();
    run(
        "openssl",
        &[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=test",
            "-addext",
            &format!("subjectAltName={host}"),
            "-keyout",
            &text(&key),
            "-out",
            &text(&cert),
        ],
    )?;
    Ok((cert, key))
}

fn certificates(bed: &Bed) -> Result<(), Failure> {
    let (cert, key) = certificate(bed, "server", "IP:127.0.0.1")?;
    let tls = format!("  tls: {{certificate: {}, key: {}}}\n", cert.display(), key.display());
    let registry = Registry::start(bed, "", &tls)?;
    let name = registry.image("app:1");
    bed.load(&bed.write("image.tar", &tar_of(&sample(&name, Packing::Gzip).oci_files()?))?)?;
    let verify = RegistryOptions::default();
    let error = push_with(&bed.store, &name, &verify).err().ok_or("an unknown certificate was trusted")?;
    expect("the certificate is named as the cause", chain(&error).contains("certificate"))?;
    push(&bed.store, &name).map_err(|error| chain(&error))?;

    // Named for this host, in the user's own folder.
    let home = std::env::var_os("HOME").ok_or("no HOME")?;
    let folder = Path::new(&home).join(".config/containers/certs.d").join(&registry.host);
    fs::create_dir_all(&folder)?;
    let trusted = (|| -> Result<(), Failure> {
        fs::copy(&cert, folder.join("ca.crt"))?;
        pull_with(&other_store(bed, "trusting")?, &name, &verify).map_err(|error| chain(&error))?;
        // Another one of the same form is none of ours.
        fs::copy(certificate(bed, "other", "IP:127.0.0.1")?.0, folder.join("ca.crt"))?;
        let pulled = pull_with(&other_store(bed, "wary")?, &name, &verify);
        expect("another certificate is not trusted", pulled.is_err())
    })();
    fs::remove_dir_all(&folder)?;
    trusted
}

/// What a proxy was asked for.
type Targets = Arc<Mutex<Vec<String>>>;

/// Makes tunnels to this machine, whichever is asked for; returns where it is, and what it was asked.
fn proxy() -> Result<(String, Targets), Failure> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let (address, asked) = (listener.local_addr()?.to_string(), Targets::default());
    let heard = Arc::clone(&asked);
    let serve = move |mut client: TcpStream| -> std::io::Result<()> {
        let mut reader = BufReader::new(client.try_clone()?);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") && reader.read_line(&mut head)? > 0 {}
        let target = head.split(' ').nth(1).unwrap_or_default().to_owned();
        let port = target.rsplit(':').next().unwrap_or_default().to_owned();
        heard.lock().unwrap_or_else(PoisonError::into_inner).push(target);
        let mut server = TcpStream::connect(format!("127.0.0.1:{port}"))?;
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
        let (mut up, mut down) = (server.try_clone()?, client.try_clone()?);
        std::thread::spawn(move || std::io::copy(&mut reader, &mut up));
        std::io::copy(&mut server, &mut down)?;
        down.shutdown(std::net::Shutdown::Both)
    };
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let serve = serve.clone();
            // A client that goes away is its own business.
            std::thread::spawn(move || drop(serve(client)));
        }
    });
    Ok((address, asked))
}

fn through_proxy(bed: &Bed) -> Result<(), Failure> {
    let (cert, key) = certificate(bed, "server", "DNS:registry.test")?;
    let tls = format!("  tls: {{certificate: {}, key: {}}}\n", cert.display(), key.display());
    let registry = Registry::start(bed, "", &tls)?;
    // A name that only the proxy knows.
    let host = registry.host.replace("127.0.0.1", "registry.test");
    let name = format!("{host}/app:1");
    bed.load(&bed.write("image.tar", &tar_of(&sample(&name, Packing::Gzip).oci_files()?))?)?;
    let home = std::env::var_os("HOME").ok_or("no HOME")?;
    let folder = Path::new(&home).join(".config/containers/certs.d").join(&host);
    fs::create_dir_all(&folder)?;
    let (address, asked) = proxy()?;
    let options = |proxy: &str, exceptions: &str| -> Result<RegistryOptions, Failure> {
        Ok(RegistryOptions { proxies: Proxies::parse(proxy, exceptions)?, ..RegistryOptions::default() })
    };
    let travelled = (|| -> Result<(), Failure> {
        fs::copy(&cert, folder.join("ca.crt"))?;
        let through = options(&format!("http://{address}"), "")?;
        let pushed = push_with(&bed.store, &name, &through).map_err(|error| chain(&error))?;
        let pulled =
            pull_with(&other_store(bed, "other")?, &name, &through).map_err(|error| chain(&error))?;
        expect("the same digest", pulled.digest == pushed.digest)?;
        let asked = asked.lock().unwrap_or_else(PoisonError::into_inner).clone();
        expect(
            &format!("only that host: {asked:?}"),
            !asked.is_empty() && asked.iter().all(|target| *target == host),
        )?;
        let direct = pull_with(&bed.store, &name, &options(&format!("http://{address}"), "registry.test")?);
        expect("an exception is not known to the proxy", direct.is_err())?;
        let error = pull_with(&bed.store, &name, &options("http://127.0.0.1:1", "")?)
            .err()
            .ok_or("no proxy, no error")?;
        expect(
            "a proxy that is away is named",
            chain(&error).contains("the proxy 127.0.0.1:1 cannot be reached"),
        )
    })();
    fs::remove_dir_all(&folder)?;
    travelled
}

/// A registry of some other machine, as the proxy makes it look like, that has its manifests on ours.
fn inward(bed: &Bed) -> Result<(), Failure> {
    let (cert, key) = certificate(bed, "server", "DNS:registry.test")?;
    let victim = Server::start(|_| server::answer(200, &[], "for this machine only"))?;
    let manifests = bed.path("v2/app/manifests");
    fs::create_dir_all(&manifests)?;
    let location = victim.url("/secret");
    fs::write(manifests.join("1"), format!("HTTP/1.0 302 Found\r\nLocation: {location}\r\n\r\n"))?;
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    // With -HTTP it gives out files as they are, heads included.
    let child = Command::new("openssl")
        .args(["s_server", "-quiet", "-HTTP", "-accept", &format!("127.0.0.1:{port}"), "-cert"])
        .arg(&cert)
        .arg("-key")
        .arg(&key)
        .current_dir(bed.path(""))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let host = format!("127.0.0.1:{port}");
    let server = Registry { child, host: host.clone() };
    wait_for(&host)?;
    let host = format!("registry.test:{port}");
    let home = std::env::var_os("HOME").ok_or("no HOME")?;
    let folder = Path::new(&home).join(".config/containers/certs.d").join(&host);
    fs::create_dir_all(&folder)?;
    let (address, _) = proxy()?;
    let options = RegistryOptions {
        trust_loopback: true,
        proxies: Proxies::parse(&format!("http://{address}"), "")?,
        ..RegistryOptions::default()
    };
    let pulled = fs::copy(&cert, folder.join("ca.crt"))
        .map(|_| pull_with(&bed.store, &format!("{host}/app:1"), &options));
    fs::remove_dir_all(&folder)?;
    drop(server);
    let said = pulled?.err().map(|error| chain(&error)).ok_or("something was pulled")?;
    expect(&format!("the redirect is named: {said}"), said.contains("which is this machine"))?;
    expect("this machine was not asked", victim.log().is_empty())
}

fn wait_for(host: &str) -> Result<(), Failure> {
    let patience = Instant::now() + Duration::from_secs(30);
    while TcpStream::connect(host).is_err() {
        if Instant::now() > patience {
            return Err(format!("nobody listens at {host}").into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn mirrors(bed: &Bed) -> Result<(), Failure> {
    let registry = Registry::plain(bed)?;
    let name = registry.image("app:1");
    bed.load(&bed.write("image.tar", &tar_of(&sample(&name, Packing::Gzip).oci_files()?))?)?;
    let pushed = push(&bed.store, &name).map_err(|error| chain(&error))?;
    let pull = |store: &Store, image: &str, mirrors: &str| -> Result<_, Failure> {
        let options = RegistryOptions { mirrors: Mirrors::parse(mirrors)?, ..on_this_machine() };
        let told = Mutex::new(Vec::new());
        let failed = |mirror: &str, error| {
            let said = format!("{mirror}: {}", chain(&error));
            told.lock().unwrap_or_else(PoisonError::into_inner).push(said);
        };
        let pulled = store.pull_from_any(&image.parse()?, &options, &NoProgress, &failed);
        let pulled = pulled.map_err(|error| chain(&error))?;
        Ok((pulled, told.into_inner().unwrap_or_else(PoisonError::into_inner)))
    };
    // Nobody is at the registry itself; the image has its name nevertheless.
    let away = "127.0.0.1:1/app:1";
    let mirror = format!("127.0.0.1:1=http://{}", registry.host);
    let store = other_store(bed, "from-mirror")?;
    let (pulled, told) = pull(&store, away, &mirror)?;
    expect("the mirror's image", pulled.digest == pushed.digest && told.is_empty())?;
    expect("under the registry's name", store.resolve(away)?.id == pulled.id)?;

    // Mirrors that are away, have nothing, or lie about a layer.
    let domain = registry.host.clone();
    let empty = Server::start(|_| server::answer(404, &[], ""))?;
    let upstream = domain.clone();
    let liar = Server::start(move |asked| {
        let forwarded = ask(&upstream, asked).unwrap_or_default();
        let is_blob = asked.path().contains("/blobs/") && forwarded.len() > 100_000;
        server::raw(if is_blob { vec![b'x'; forwarded.len()] } else { forwarded })
    })?;
    let list = format!(
        "{domain}=http://127.0.0.1:1 {domain}={} {domain}={}",
        empty.url("").trim_end_matches('/'),
        liar.url("").trim_end_matches('/')
    );
    let (pulled, told) = pull(&other_store(bed, "from-registry")?, &name, &list)?;
    expect("the registry's image", pulled.digest == pushed.digest)?;
    expect(&format!("each is told of: {told:#?}"), told.len() == 3)?;
    expect("all that were there were asked", !empty.log().is_empty() && liar.count("GET", "/blobs/") > 0)?;
    Ok(())
}

/// What a server answers, whole.
fn ask(host: &str, asked: &Asked) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(host)?;
    let accept = asked.field("accept").unwrap_or("*/*");
    let (method, target) = (&asked.method, &asked.target);
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: {host}\r\nAccept: {accept}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

fn listed(bed: &Bed) -> Result<(), Failure> {
    let registry = Registry::plain(bed)?;
    let mut names = Vec::new();
    for name in ["web/app:v1", "web/app:v2", "other:1"] {
        let name = registry.image(name);
        bed.load(&bed.write("image.tar", &tar_of(&sample(&name, Packing::Gzip).oci_files()?))?)?;
        push(&bed.store, &name).map_err(|error| chain(&error))?;
        names.push(name);
    }
    let reference: Reference = names[0].parse()?;
    let mut tags =
        Repository::open(&reference, false, &on_this_machine())?.tags().map_err(|error| chain(&error))?;
    tags.sort();
    expect(&format!("two tags: {tags:?}"), tags == ["v1", "v2"])?;
    let found = search(&registry.image("APP"), 25, &on_this_machine()).map_err(|error| chain(&error))?;
    let found: Vec<_> = found.into_iter().map(|found| found.name).collect();
    expect(&format!("one repository: {found:?}"), found == [registry.image("web/app")])?;
    let all = search(&registry.image(""), 1, &on_this_machine()).map_err(|error| chain(&error))?;
    expect("no more than asked for", all.len() == 1)
}

fn real(bed: &Bed) -> Result<(), Failure> {
    let registry = Registry::plain(bed)?;
    let archive = crate::bed::real_image("busybox").ok_or("no busybox")?;
    let name: Reference = registry.image("busybox:1").parse()?;
    let options = cloche_images::LoadOptions { name: Some(name.clone()) };
    let loaded = bed.store.load(&archive, &options, &NoProgress)?;
    push(&bed.store, &name.to_string()).map_err(|error| chain(&error))?;
    let store = other_store(bed, "other")?;
    let pulled = pull(&store, &name.to_string()).map_err(|error| chain(&error))?;
    expect("the same image", loaded.first().is_some_and(|image| image.id == pulled.id))?;
    let layers = |store: &Store| -> Result<Vec<Vec<u8>>, Failure> {
        let image = store.resolve(&pulled.id.to_string())?;
        image.layers.iter().map(|layer| Ok(fs::read(&layer.erofs)?)).collect()
    };
    expect("the same layers", layers(&store)? == layers(&bed.store)?)
}
