//! A small registry for one test, on loopback and without TLS: what was put into it can be got out of it.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::image::{Layout, sha256_hex};

/// Blobs and manifests by digest, and the digests of tags.
type Shelf = Arc<Mutex<HashMap<String, Vec<u8>>>>;

/// The registry; it serves until the test program ends.
#[derive(Debug)]
pub struct Registry {
    port: u16,
    shelf: Shelf,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Registry {
    /// Starts one; `authorization` is the value that each request must have, if any.
    pub fn start(authorization: Option<&'static str>) -> Result<Registry> {
        let listener = TcpListener::bind("127.0.0.1:0").context("listen on loopback")?;
        let port = listener.local_addr()?.port();
        let (shelf, asked) = (Shelf::default(), Arc::new(Mutex::new(Vec::new())));
        let (its_shelf, its_asked) = (Arc::clone(&shelf), Arc::clone(&asked));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (shelf, asked) = (Arc::clone(&its_shelf), Arc::clone(&its_asked));
                thread::spawn(move || {
                    // A client that goes away is its own business.
                    let _ = serve(stream, &shelf, &asked, authorization);
                });
            }
        });
        Ok(Registry { port, shelf, asked })
    }

    /// Where it is, as image names have it.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The name of an image in it.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.host())
    }

    /// Puts an image under a tag.
    pub fn put(&self, tag: &str, layout: &Layout) -> Result<()> {
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, content) in &layout.files {
            if name.starts_with("blobs/") {
                shelf.insert(format!("sha256:{}", sha256_hex(content)), content.clone());
            }
            if name == "index.json" {
                let index: Value = serde_json::from_slice(content)?;
                let digest = index["manifests"][0]["digest"].as_str().context("no manifest in the layout")?;
                shelf.insert(tag.to_owned(), digest.as_bytes().to_vec());
            }
        }
        Ok(())
    }

    /// How many requests there were that start like this, such as `GET /v2/app/blobs`.
    pub fn count(&self, start: &str) -> usize {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.iter().filter(|request| request.starts_with(start)).count()
    }
}

fn serve(
    mut stream: TcpStream,
    shelf: &Shelf,
    asked: &Mutex<Vec<String>>,
    authorization: Option<&str>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        // 0x16 begins a TLS handshake.
        if reader.fill_buf()?.first().is_none_or(|byte| *byte == 0x16) {
            return Ok(());
        }
        let (mut line, mut length, mut known) = (String::new(), 0, authorization.is_none());
        reader.read_line(&mut line)?;
        let request = line.trim_end().trim_end_matches(" HTTP/1.1").to_owned();
        loop {
            line.clear();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().unwrap_or(0),
                "authorization" => known |= Some(value) == authorization,
                _ => {}
            }
        }
        let mut body = Vec::new();
        reader.by_ref().take(length).read_to_end(&mut body)?;
        asked.lock().unwrap_or_else(PoisonError::into_inner).push(request.clone());
        let (head, content) = match known {
            true => answer(&request, body, &mut shelf.lock().unwrap_or_else(PoisonError::into_inner)),
            false => ("401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"test\"".to_owned(), Vec::new()),
        };
        write!(stream, "HTTP/1.1 {head}\r\nContent-Length: {}\r\n\r\n", content.len())?;
        if !request.starts_with("HEAD") {
            stream.write_all(&content)?;
        }
    }
}

/// Status and fields, and the body.
fn answer(request: &str, body: Vec<u8>, shelf: &mut HashMap<String, Vec<u8>>) -> (String, Vec<u8>) {
    let (method, target) = request.split_once(' ').unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let last = path.rsplit('/').next().unwrap_or_default();
    let found = |shelf: &HashMap<String, Vec<u8>>, name: &str| {
        shelf.get(name).map_or(("404 Not Found".to_owned(), Vec::new()), |content| {
            ("200 OK".to_owned(), content.clone())
        })
    };
    match method {
        "POST" => (format!("202 Accepted\r\nLocation: {path}1"), Vec::new()),
        "PUT" if path.contains("/manifests/") => {
            let digest = format!("sha256:{}", sha256_hex(&body));
            shelf.insert(last.to_owned(), digest.as_bytes().to_vec());
            shelf.insert(digest, body);
            ("201 Created".to_owned(), Vec::new())
        }
        "PUT" => {
            let digest = format!("sha256:{}", sha256_hex(&body));
            if query.replace("%3A", ":") != format!("digest={digest}") {
                return ("400 Bad Request".to_owned(), Vec::new());
            }
            shelf.insert(digest, body);
            ("201 Created".to_owned(), Vec::new())
        }
        _ if path == "/v2/" => ("200 OK".to_owned(), b"{}".to_vec()),
        _ if path.contains("/manifests/") && !last.contains(':') => {
            let digest = shelf.get(last).map(|digest| String::from_utf8_lossy(digest).into_owned());
            found(shelf, &digest.unwrap_or_default())
        }
        _ => found(shelf, last),
    }
}
