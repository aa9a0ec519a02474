//! Registries that lie, stall, or lead in circles: each gets a clear error, in bounded time and memory, and leaves the
//! store as it was. And honest ones that break down, which do no harm.

use std::fs;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cloche_images::registry::{CredentialStore, Patience, PullError, Pulled, RegistryOptions, Repository};
use cloche_images::{NoProgress, Reference, Store};
use libtest_mimic::Trial;
use serde_json::json;

use crate::archive::{Packing, TestImage, descriptor};
use crate::bed::{Bed, Failure, Need, chain, run, sha256, test};
use crate::layers::noise;
use crate::server::{Answer, Asked, Server, answer, raw};
use crate::tarball::{Item, Tarball};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

pub fn tests() -> Vec<Trial> {
    vec![
        test("honest_registry_is_pulled_from", &[], honest),
        test("registry_that_lies_is_refused_and_leaves_nothing", &[], lies),
        test("registry_that_stalls_is_given_up", &[], stalls),
        test("registry_that_breaks_down_is_asked_again", &[], breaks_down),
        test("download_that_breaks_off_goes_on_where_it_ended", &[], resumes),
        test("pull_that_was_killed_goes_on_where_it_ended", &[], killed),
        test("pull_killed_at_any_moment_leaves_a_sound_store", &[], killed_at_any_moment),
        test("pull_onto_a_full_disk_fails_and_goes_on_when_there_is_room", &[Need::Root], full_disk),
        test("bad_start_of_a_download_is_thrown_away", &[], bad_start),
        test("token_is_fetched_used_and_not_carried_elsewhere", &[], tokens),
        test("index_gives_the_image_for_this_machine_or_says_what_there_is", &[], indexes),
        test("message_of_a_registry_cannot_steer_the_terminal", &[], messages),
    ]
}

/// Patience for tests: what a real registry has minutes for, these have seconds, also on a busy machine.
fn impatient() -> Patience {
    Patience {
        connect: Duration::from_secs(5),
        head: Duration::from_secs(4),
        window: Duration::from_millis(1500),
        min_bytes: 1000,
        retry: Duration::from_millis(10),
    }
}

fn pull_as(store: &Store, image: &str, credentials: Option<CredentialStore>) -> Result<Pulled, PullError> {
    let options = RegistryOptions {
        trust_loopback: true,
        patience: impatient(),
        credentials,
        ..RegistryOptions::default()
    };
    let reference: Reference = image.parse().expect("tests have good names");
    let repository = Repository::open(&reference, false, &options)?;
    store.pull(&reference, &repository, &NoProgress)
}

fn pull(store: &Store, image: &str) -> Result<Pulled, PullError> {
    pull_as(store, image, None)
}

fn expect(what: &str, condition: bool) -> Result<(), Failure> {
    if condition { Ok(()) } else { Err(format!("expected: {what}").into()) }
}

/// An image as a registry has it.
#[derive(Clone)]
struct Shelf {
    manifest: Vec<u8>,
    config: Vec<u8>,
    layer: Vec<u8>,
}

impl Shelf {
    fn new() -> Result<Shelf, Failure> {
        Shelf::of(300_000)
    }

    fn of(bytes: usize) -> Result<Shelf, Failure> {
        let image = TestImage::of([Tarball::of([Item::file("file", noise(bytes, 9))])]);
        let layer = Packing::Gzip.pack(&image.layers[0])?;
        Ok(Shelf::with(image.config(), layer))
    }

    fn with(config: Vec<u8>, layer: Vec<u8>) -> Shelf {
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &layer)],
        });
        Shelf { manifest: manifest.to_string().into_bytes(), config, layer }
    }

    fn layer_path(&self) -> String {
        format!("/v2/app/blobs/sha256:{}", sha256(&self.layer))
    }

    fn manifest_digest(&self) -> String {
        format!("sha256:{}", sha256(&self.manifest))
    }

    /// What an honest registry says.
    fn honest(&self, asked: &Asked) -> Answer {
        let digest = self.manifest_digest();
        if asked.path() == "/v2/" {
            return answer(200, &[], "{}");
        }
        if asked.path().starts_with("/v2/app/manifests/") {
            return answer(
                200,
                &[("Content-Type", MANIFEST), ("Docker-Content-Digest", &digest)],
                self.manifest.clone(),
            );
        }
        for blob in [&self.config, &self.layer] {
            if asked.path() == format!("/v2/app/blobs/sha256:{}", sha256(blob)) {
                return ranged(asked, blob);
            }
        }
        answer(404, &[], r#"{"errors":[{"code":"NAME_UNKNOWN","message":"unknown"}]}"#)
    }
}

/// A blob, or the end of it that is asked for.
fn ranged(asked: &Asked, blob: &[u8]) -> Answer {
    let range = asked.field("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
    match range.and_then(|start| start.parse::<usize>().ok()).filter(|start| *start < blob.len()) {
        None => answer(200, &[], blob),
        Some(start) => {
            let range = format!("bytes {start}-{}/{}", blob.len() - 1, blob.len());
            answer(206, &[("Content-Range", &range)], &blob[start..])
        }
    }
}

/// A registry that is honest but for what `lie` says otherwise.
fn registry(
    shelf: &Shelf,
    lie: impl Fn(&Shelf, &Asked) -> Option<Answer> + Send + Sync + 'static,
) -> Result<Server, Failure> {
    let shelf = shelf.clone();
    Server::start(move |asked| lie(&shelf, asked).unwrap_or_else(|| shelf.honest(asked)))
}

fn is_empty(store: &Store) -> Result<bool, Failure> {
    let count = |name: &str| -> Result<usize, Failure> {
        let directory = store.root().join(name);
        if directory.exists() { Ok(fs::read_dir(directory)?.count()) } else { Ok(0) }
    };
    Ok(store.images()?.is_empty()
        && count("blobs/sha256")? + count("layers/sha256")? + count("recipes/sha256")? == 0)
}

fn honest(bed: &Bed) -> Result<(), Failure> {
    let shelf = Shelf::new()?;
    let server = registry(&shelf, |_, _| None)?;
    let pulled = pull(&bed.store, &server.image("app:1")).map_err(|error| chain(&error))?;
    expect("the digest of the manifest", pulled.digest.to_string() == shelf.manifest_digest())?;
    expect("it is new", !pulled.up_to_date)?;
    expect("one request for the layer", server.count("GET", &shelf.layer_path()) == 1)?;
    let again = pull(&bed.store, &server.image("app:1")).map_err(|error| chain(&error))?;
    expect("it is not new any more", again.up_to_date)?;
    expect("nothing travelled again", server.count("GET", &shelf.layer_path()) == 1)?;
    let error = pull(&bed.store, &server.image("other:1")).err().ok_or("an unknown image")?;
    expect("an unknown image is named", chain(&error).contains("has no other:1"))
}

type Lie = fn(&Shelf, &Asked) -> Option<Answer>;

fn on_layer(shelf: &Shelf, asked: &Asked, answer: impl FnOnce() -> Answer) -> Option<Answer> {
    (asked.path() == shelf.layer_path()).then(answer)
}

fn on_manifest(asked: &Asked, answer: impl FnOnce() -> Answer) -> Option<Answer> {
    asked.path().starts_with("/v2/app/manifests/").then(answer)
}

/// Lies, and what the error must say.
const LIES: &[(&str, &str, Lie)] = &[
    ("another layer of the same length", "digest", |shelf, asked| {
        on_layer(shelf, asked, || {
            let mut other = shelf.layer.clone();
            other[1000] ^= 1;
            answer(200, &[], other)
        })
    }),
    ("a layer that says to be longer", "bytes for sha256:", |shelf, asked| {
        on_layer(shelf, asked, || answer(200, &[], [&shelf.layer[..], b"more"].concat()))
    }),
    ("a layer that is longer and does not say so", "bytes for sha256:", |shelf, asked| {
        on_layer(shelf, asked, || {
            let head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
            raw([head, &shelf.layer[..], &[0; 1 << 20]].concat())
        })
    }),
    ("a layer that says to be shorter", "bytes for sha256:", |shelf, asked| {
        on_layer(shelf, asked, || answer(200, &[], &shelf.layer[..1000]))
    }),
    ("a layer that ends too early each time", "broke off", |shelf, asked| {
        on_layer(shelf, asked, || {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", shelf.layer.len());
            let part = [head.as_bytes(), &shelf.layer[..1000]].concat();
            Box::new(move |stream| {
                stream.write_all(&part)?;
                Err(std::io::ErrorKind::BrokenPipe.into())
            })
        })
    }),
    ("a layer that comes in single bytes, with much around each", "bytes in 1.5 s", |shelf, asked| {
        on_layer(shelf, asked, || {
            let layer = shelf.layer.clone();
            Box::new(move |stream| {
                stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
                for byte in layer {
                    let chunk = format!("1;{}\r\n", "x".repeat(900));
                    stream.write_all(&[chunk.as_bytes(), &[byte], b"\r\n"].concat())?;
                    std::thread::sleep(Duration::from_millis(5));
                }
                stream.write_all(b"0\r\n\r\n")
            })
        })
    }),
    ("another part than was asked for", "answered 206", |shelf, asked| {
        on_layer(shelf, asked, || answer(206, &[("Content-Range", "bytes 5-9/10")], "abcde"))
    }),
    ("another manifest than its digest", "digest", |_, asked| {
        let digest = format!("sha256:{}", "0".repeat(64));
        on_manifest(asked, || answer(200, &[("Docker-Content-Digest", &digest)], "{}"))
    }),
    ("a manifest without end", "more than", |_, asked| {
        on_manifest(asked, || {
            Box::new(|stream| {
                stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
                loop {
                    stream.write_all(b"10000\r\n")?;
                    stream.write_all(&[b' '; 0x10000])?;
                    stream.write_all(b"\r\n")?;
                }
            })
        })
    }),
    ("a manifest that is none", "malformed", |_, asked| on_manifest(asked, || answer(200, &[], "<html>"))),
    ("a manifest that is an index, too", "neither clearly", |_, asked| {
        on_manifest(asked, || answer(200, &[], r#"{"layers":[],"manifests":[]}"#))
    }),
    ("a manifest of schema 1", "schema 1", |_, asked| {
        on_manifest(asked, || answer(200, &[], r#"{"schemaVersion":1,"fsLayers":[]}"#))
    }),
    ("a layer of an absurd size", "at most", |_, asked| {
        on_manifest(asked, || {
            let zero = format!("sha256:{}", "0".repeat(64));
            let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [zero]}});
            let config = config.to_string();
            let layer = json!({"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": zero, "size": 1_u64 << 60});
            let manifest = json!({"schemaVersion": 2, "config": descriptor("application/vnd.oci.image.config.v1+json", config.as_bytes()), "layers": [layer]});
            answer(200, &[], manifest.to_string())
        })
        .or_else(|| {
            let zero = format!("sha256:{}", "0".repeat(64));
            let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [zero]}});
            let config = config.to_string();
            asked.path().ends_with(&sha256(config.as_bytes())).then(|| answer(200, &[], config))
        })
    }),
    ("a configuration of an absurd size", "at most", |_, asked| {
        on_manifest(asked, || {
            let digest = format!("sha256:{}", "0".repeat(64));
            let config = json!({"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": 1_u64 << 40});
            answer(200, &[], json!({"schemaVersion": 2, "config": config, "layers": []}).to_string())
        })
    }),
    ("redirects in a circle", "redirect", |_, asked| {
        on_manifest(asked, || answer(302, &[("Location", "/v2/app/manifests/again")], ""))
    }),
    ("a redirect to nowhere", "nowhere", |_, asked| on_manifest(asked, || answer(302, &[], ""))),
    ("a redirect to plain HTTP elsewhere", "not encrypted", |shelf, asked| {
        on_layer(shelf, asked, || answer(307, &[("Location", "http://192.0.2.1/blob")], ""))
    }),
    ("401 for ever", "asks who you are", |_, asked| {
        on_manifest(asked, || answer(401, &[("WWW-Authenticate", "Basic realm=x")], ""))
    }),
    ("401 with a challenge that nobody knows", "no way that is known", |_, asked| {
        on_manifest(asked, || answer(401, &[("WWW-Authenticate", "Negotiate")], ""))
    }),
    ("tokens from an unsafe place", "no https URL", |_, asked| {
        on_manifest(asked, || {
            answer(401, &[("WWW-Authenticate", "Bearer realm=\"http://192.0.2.1/token\"")], "")
        })
    }),
    ("500 for ever", "answered 500", |_, asked| on_manifest(asked, || answer(500, &[], ""))),
    ("503 for the layer, for ever", "broke off", |shelf, asked| {
        on_layer(shelf, asked, || answer(503, &[], ""))
    }),
    ("404 for the layer", "answered 404", |shelf, asked| on_layer(shelf, asked, || answer(404, &[], ""))),
    ("no HTTP", "not HTTP", |_, asked| on_manifest(asked, || raw("220 mail.example ESMTP\r\n\r\n"))),
    ("a head without end", "head", |_, asked| {
        on_manifest(asked, || {
            let field = format!("X: {}\r\n", "a".repeat(1000));
            raw(format!("HTTP/1.1 200 OK\r\n{}", field.repeat(90)))
        })
    }),
    ("two lengths", "two different lengths", |_, asked| {
        on_manifest(asked, || raw("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"))
    }),
    ("chunks that are none", "chunk", |_, asked| {
        on_manifest(asked, || raw("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"))
    }),
];

fn lies(bed: &Bed) -> Result<(), Failure> {
    let shelf = Shelf::new()?;
    for (index, (name, expected, lie)) in LIES.iter().enumerate() {
        let server = registry(&shelf, lie)?;
        let store = Store::open(&bed.path(&format!("store-{index}")))?;
        let start = Instant::now();
        let error =
            pull(&store, &server.image("app:1")).err().ok_or_else(|| format!("{name}: was believed"))?;
        let said = chain(&error);
        let took = start.elapsed();
        if !said.contains(expected) || said.len() > 1000 {
            return Err(format!("{name}: the error does not say {expected:?}: {said}").into());
        }
        if took > Duration::from_secs(60) {
            return Err(format!("{name}: took {took:?}").into());
        }
        if !is_empty(&store)? {
            return Err(format!("{name}: something stays in the store").into());
        }
    }
    Ok(())
}

/// Sends a byte from time to time, for longer than anybody should listen.
fn drip(head: Vec<u8>) -> Answer {
    Box::new(move |stream| {
        stream.write_all(&head)?;
        for _ in 0..600 {
            stream.write_all(b"a")?;
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    })
}

fn stalls(bed: &Bed) -> Result<(), Failure> {
    let shelf = Shelf::new()?;
    let stalling: &[(&str, Lie)] = &[
        ("a head that drips", |_, asked| on_manifest(asked, || drip(b"HTTP/1.1 200 OK\r\nX: ".to_vec()))),
        ("silence", |_, asked| {
            on_manifest(asked, || {
                Box::new(|_| {
                    std::thread::sleep(Duration::from_secs(30));
                    Ok(())
                })
            })
        }),
        ("a manifest that drips", |_, asked| {
            on_manifest(asked, || drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n".to_vec()))
        }),
        ("a layer that drips", |shelf, asked| {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", shelf.layer.len());
            on_layer(shelf, asked, || drip(head.into_bytes()))
        }),
    ];
    for (name, lie) in stalling {
        let server = registry(&shelf, *lie)?;
        let start = Instant::now();
        let error = pull(&bed.store, &server.image("app:1"))
            .err()
            .ok_or_else(|| format!("{name}: was waited for"))?;
        let (said, took) = (chain(&error), start.elapsed());
        expect(&format!("{name}: seconds, not {took:?}"), took < Duration::from_secs(25))?;
        expect(
            &format!("{name}: that is said: {said}"),
            said.contains("only") || said.contains("no answer in"),
        )?;
        expect("nothing is kept as an image", is_empty(&bed.store)?)?;
    }
    Ok(())
}

fn breaks_down(bed: &Bed) -> Result<(), Failure> {
    let shelf = Shelf::new()?;
    let seen = Arc::new(Mutex::new(std::collections::HashMap::new()));
    let server = registry(&shelf, move |_, asked| {
        let mut seen = seen.lock().ok()?;
        let count: &mut usize = seen.entry(asked.path().to_owned()).or_default();
        *count += 1;
        let (status, field) = [(503, "X"), (429, "Retry-After")][*count % 2];
        // One of them is enough to be waited for.
        let fields = [(field, "1")];
        let fields = if asked.path().contains("/manifests/") { &fields[..] } else { &[] };
        (*count <= 2 && asked.path() != "/v2/").then(|| answer(status, fields, ""))
    })?;
    let began = Instant::now();
    pull(&bed.store, &server.image("app:1")).map_err(|error| chain(&error))?;
    expect("it waited as long as it was asked to", began.elapsed() >= Duration::from_secs(1))?;
    expect("each was asked for three times", server.count("GET", &shelf.layer_path()) == 3)
}

fn resumes(bed: &Bed) -> Result<(), Failure> {
    let shelf = Shelf::new()?;
    // Every answer breaks off; each brings more.
    let server = registry(&shelf, |shelf, asked| {
        on_layer(shelf, asked, || {
            let whole = ranged(asked, &shelf.layer);
            Box::new(move |stream| {
                let mut cut = Cut { stream: stream.try_clone()?, left: 120_000 };
                let _ = stream;
                write_to(whole, &mut cut)
            })
        })
    })?;
    pull(&bed.store, &server.image("app:1")).map_err(|error| chain(&error))?;
    let starts: Vec<String> = server
        .log()
        .iter()
        .filter(|asked| asked.path() == shelf.layer_path())
        .map(|asked| asked.field("range").unwrap_or("").to_owned())
        .collect();
    expect(
        &format!("the rest is asked for: {starts:?}"),
        starts.len() == 3 && starts[1].starts_with("bytes=1"),
    )
}

/// A connection that breaks after so many bytes.
struct Cut {
    stream: std::net::TcpStream,
    left: usize,
}

fn write_to(answer: Answer, cut: &mut Cut) -> std::io::Result<()> {
    // The answer is written to a pair of sockets, and passed on as far as the cut.
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let mut inner = std::net::TcpStream::connect(listener.local_addr()?)?;
    let (outer, _) = listener.accept()?;
    let writer = std::thread::spawn(move || {
        let _ = answer(&mut inner);
    });
    let mut part = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(outer, cut.left as u64), &mut part)?;
    let _ = writer.join();
    cut.stream.write_all(&part)?;
    match part.len() == cut.left {
        true => Err(std::io::ErrorKind::BrokenPipe.into()),
        false => Ok(()),
    }
}

fn killed(bed: &Bed) -> Result<(), Failure> {
    let shelf = Shelf::of(2_000_000)?;
    let sent = Arc::new(AtomicUsize::new(0));
    let its_sent = Arc::clone(&sent);
    // The first answer stops in the middle, without an end.
    let server = registry(&shelf, move |shelf, asked| {
        on_layer(shelf, asked, || {
            if its_sent.fetch_add(1, Ordering::Relaxed) > 0 {
                return ranged(asked, &shelf.layer);
            }
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", shelf.layer.len());
            let part = [head.as_bytes(), &shelf.layer[..1_000_000]].concat();
            Box::new(move |stream| {
                stream.write_all(&part)?;
                std::thread::sleep(Duration::from_secs(20));
                Ok(())
            })
        })
    })?;
    let mut child = crate::child::spawn_pull(bed.store.root(), &server.image("app:1"))?;
    let partial = partial_of(bed, &shelf);
    let patience = Instant::now() + Duration::from_secs(20);
    while fs::metadata(&partial).map_or(0, |metadata| metadata.len()) < 900_000 {
        expect("the download begins", Instant::now() < patience)?;
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill()?;
    child.wait()?;
    expect("no image yet", is_empty(&bed.store)?)?;
    pull(&bed.store, &server.image("app:1")).map_err(|error| chain(&error))?;
    let last =
        server.log().into_iter().rfind(|asked| asked.path() == shelf.layer_path()).ok_or("no request")?;
    expect("only the rest travelled", last.field("range").is_some_and(|range| range != "bytes=0-"))?;
    expect("nothing partial is left", fs::read_dir(bed.store.root().join("partial/sha256"))?.next().is_none())
}

fn killed_at_any_moment(bed: &Bed) -> Result<(), Failure> {
    const TRIES: u32 = 25;
    let shelf = Shelf::of(6_000_000)?;
    let server = registry(&shelf, |_, _| None)?;
    let name = server.image("app:1");
    let start = Instant::now();
    expect("a pull succeeds", crate::child::spawn_pull(bed.store.root(), &name)?.wait()?.success())?;
    let whole = start.elapsed();
    bed.store.remove(&name)?;
    for attempt in 0..TRIES {
        let mut child = crate::child::spawn_pull(bed.store.root(), &name)?;
        std::thread::sleep(whole * attempt / TRIES);
        child.kill()?;
        child.wait()?;
        if crate::killed::assert_sound(&bed.store)? > 0 {
            bed.store.remove(&name)?;
        }
    }
    pull(&bed.store, &name).map_err(|error| chain(&error))?;
    bed.store.remove(&name)?;
    bed.store.prune(true, |_| false)?;
    expect("nothing at all is left", is_empty(&bed.store)?)?;
    expect("no download either", fs::read_dir(bed.store.root().join("partial/sha256"))?.next().is_none())
}

fn full_disk(bed: &Bed) -> Result<(), Failure> {
    let small = bed.path("small");
    fs::create_dir(&small)?;
    let at = small.display().to_string();
    run("mount", &["-t", "tmpfs", "-o", "size=3m", "tmpfs", &at])?;
    let shelf = Shelf::of(2_500_000)?;
    let server = registry(&shelf, |_, _| None)?;
    let name = server.image("app:1");
    let result = (|| {
        let store = Store::open(&small.join("store"))?;
        // Room for the download, and not for what comes of it; then for less than the download.
        for room in ["3m", "2m"] {
            run("mount", &["-o", &format!("remount,size={room}"), &at])?;
            let error = pull(&store, &name).err().ok_or("it fits")?;
            expect(&format!("the cause: {}", chain(&error)), chain(&error).contains("space"))?;
            expect("no image", crate::killed::assert_sound(&store)? == 0)?;
            if room == "3m" {
                store.prune(true, |_| false)?;
            }
        }
        run("mount", &["-o", "remount,size=20m", &at])?;
        pull(&store, &name).map_err(|error| chain(&error))?;
        let resumed = |asked: &Asked| asked.path() == shelf.layer_path() && asked.field("range").is_some();
        expect("it went on where it ended", server.log().iter().any(resumed))?;
        expect("the image is whole", store.verify(&name)?.is_empty())
    })();
    run("umount", &[&at])?;
    result
}

/// Where the layer's download grows.
fn partial_of(bed: &Bed, shelf: &Shelf) -> std::path::PathBuf {
    let name = format!("{}-{}", sha256(&shelf.layer), shelf.layer.len());
    bed.store.root().join("partial/sha256").join(name)
}

fn bad_start(bed: &Bed) -> Result<(), Failure> {
    let shelf = Shelf::new()?;
    let server = registry(&shelf, |_, _| None)?;
    let partial = partial_of(bed, &shelf);
    for start in [noise(1000, 5), noise(shelf.layer.len(), 5), noise(shelf.layer.len() + 5, 5)] {
        fs::write(&partial, start)?;
        let name = server.image("app:1");
        pull(&bed.store, &name).map_err(|error| chain(&error))?;
        bed.store.remove(&name)?;
    }
    Ok(())
}

fn tokens(bed: &Bed) -> Result<(), Failure> {
    let shelf = Shelf::new()?;
    let elsewhere = registry(&shelf, |shelf, asked| {
        (asked.path() == "/layer").then(|| answer(200, &[], shelf.layer.clone()))
    })?;
    let (layer, place) = (shelf.layer_path(), elsewhere.url("/layer"));
    let used = Arc::new(AtomicUsize::new(0));
    let server = registry(&shelf, move |_, asked| {
        if asked.path() == "/token" {
            let known = asked.field("authorization") == Some("Basic bWU6b3BlbnNlc2FtZQ==");
            let right = known
                && asked.target.contains("scope=repository%3Aapp%3Apull")
                && asked.target.contains("service=s");
            return Some(match right {
                true => {
                    answer(200, &[], format!(r#"{{"token":"t{}"}}"#, used.fetch_add(1, Ordering::Relaxed)))
                }
                false => answer(401, &[], ""),
            });
        }
        // The first token is soon too old.
        let old = asked.field("authorization") == Some("Bearer t0") && asked.path() == layer;
        if old || asked.field("authorization").is_none_or(|value| !value.starts_with("Bearer t")) {
            let host = asked.field("host").unwrap_or_default();
            let challenge = format!("Bearer realm=\"http://{host}/token\",service=\"s\"");
            return Some(answer(401, &[("WWW-Authenticate", &challenge)], ""));
        }
        (asked.path() == layer).then(|| answer(307, &[("Location", &place)], ""))
    })?;
    let anonymous = pull(&bed.store, &server.image("app:1")).err().ok_or("a stranger pulled")?;
    expect("a stranger is told to log in", chain(&anonymous).contains("cloche login"))?;
    let config = bed.path("config.json");
    let host = server.image("");
    CredentialStore::at(&config).put(host.trim_end_matches('/'), "me", "wrong")?;
    let wrong = pull_as(&bed.store, &server.image("app:1"), Some(CredentialStore::at(&config))).err();
    expect(
        "wrong credentials are named",
        wrong.is_some_and(|error| chain(&error).contains("refuses your credentials")),
    )?;
    CredentialStore::at(&config).put(host.trim_end_matches('/'), "me", "opensesame")?;
    let known = pull_as(&bed.store, &server.image("app:1"), Some(CredentialStore::at(&config)));
    known.map_err(|error| chain(&error))?;
    expect("the other server was asked", elsewhere.count("GET", "/layer") == 1)?;
    expect(
        "and not told who we are",
        elsewhere.log().iter().all(|asked| asked.field("authorization").is_none()),
    )
}

fn indexes(bed: &Bed) -> Result<(), Failure> {
    let shelf = Shelf::new()?;
    let platform = |os: &str, architecture: &str, content: &[u8]| {
        let mut entry = descriptor(MANIFEST, content);
        entry["platform"] = json!({"os": os, "architecture": architecture});
        entry
    };
    let foreign = [platform("linux", "arm64", b"{}"), platform("windows", "amd64", b"{}")];
    let ours = [&foreign[..], &[platform("linux", "amd64", &shelf.manifest)]].concat();
    let index = |entries: &[serde_json::Value]| {
        json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).to_string()
    };
    let (with, without) = (index(&ours), index(&foreign));
    let digest = format!("sha256:{}", sha256(with.as_bytes()));
    let its_digest = digest.clone();
    let server = registry(&shelf, move |_, asked| {
        let content = match asked.path().rsplit('/').next()? {
            "many" => &with,
            name if name == its_digest => &with,
            "foreign" => &without,
            _ => return None,
        };
        Some(answer(200, &[("Content-Type", INDEX)], content.as_bytes()))
    })?;
    let pulled = pull(&bed.store, &server.image("app:many")).map_err(|error| chain(&error))?;
    expect("the digest of the index", pulled.digest.to_string() == digest)?;
    let image = bed.store.resolve(&format!("{}@{digest}", server.image("app")))?;
    expect(
        "the manifest of this machine",
        image.manifest.is_some_and(|it| it.to_string() == shelf.manifest_digest()),
    )?;
    let error = pull(&bed.store, &server.image("app:foreign")).err().ok_or("an image for another machine")?;
    expect("what there is", chain(&error).contains("only for linux/arm64, windows/amd64"))?;
    let by_digest = format!("{}@{digest}", server.image("app"));
    pull(&Store::open(&bed.path("other"))?, &by_digest).map_err(|error| chain(&error))?;
    Ok(())
}

fn messages(bed: &Bed) -> Result<(), Failure> {
    let shelf = Shelf::new()?;
    let server = registry(&shelf, |_, asked| {
        on_manifest(asked, || {
            answer(403, &[], "{\"errors\":[{\"code\":\"X\",\"message\":\"\\u001b[2Jgone\"}]}")
        })
    })?;
    let error = pull(&bed.store, &server.image("app:1")).err().ok_or("403 was believed")?;
    let said = chain(&error);
    expect(
        &format!("words without control characters: {said}"),
        said.contains("[2Jgone") && !said.contains('\x1b'),
    )
}
