//! `seeds TARGET FOLDER`: writes the inputs from which a target's fuzzer should start.

use std::{env, fs, io, path::PathBuf};

fn main() -> io::Result<()> {
    let mut words = env::args().skip(1);
    let (Some(target), Some(folder)) = (words.next(), words.next()) else {
        return Err(io::Error::other("usage: seeds TARGET FOLDER"));
    };
    let folder = PathBuf::from(folder);
    fs::create_dir_all(&folder)?;
    let mut seeds = cloche_vmm::fuzzing::seeds(&target);
    seeds.extend(cloche_images::fuzzing::seeds(&target));
    seeds.extend(cloche_share::fuzzing::seeds(&target));
    seeds.extend(text(&target));
    for (index, seed) in seeds.iter().enumerate() {
        fs::write(folder.join(format!("seed-{index}")), seed)?;
    }
    Ok(())
}

fn text(target: &str) -> Vec<Vec<u8>> {
    match target {
        "guest_messages" => {
            let bodies: [&[u8]; 3] = [
                br#"{"type":"ready","version":1}"#,
                br#"{"type":"failed","exit_code":127,"message":"not \u001b found"}"#,
                br#"{"type":"exited","status":{"signal":9},"oom_killed":true,"memory_peak_bytes":7}"#,
            ];
            let frames = bodies.map(|body| [&(body.len() as u32).to_le_bytes(), body].concat());
            vec![[&[3][..], &frames.concat()].concat(), [&[200][..], &frames[2]].concat()]
        }
        "vm_config" => vec![
            br#"{"vcpus":1,"memory_mib":64,"kernel":"/k","initramfs":["embedded",{"file":"/a"}],"rng":true}"#.to_vec(),
            br#"{"vcpus":2,"memory_mib":64,"kernel":"/k","disks":[{"path":"/d","id":"a","read_only":true}],"vsock":{"guest_cid":3,"ports":[{"port":7,"fd":9}]},"start_timeout_ms":5}"#.to_vec(),
        ],
        "oci_config" => vec![include_bytes!("../../../runtime/src/launch/full.json").to_vec()],
        "dockerfile" => [
            include_str!("../../../tests/src/dockerfiles/run-forms.Dockerfile"),
            include_str!("../../../tests/src/dockerfiles/continuations.Dockerfile"),
            include_str!("../../../tests/src/dockerfiles/variables.Dockerfile"),
            include_str!("../../../tests/src/dockerfiles/metadata.Dockerfile"),
            include_str!("../../../tests/src/dockerfiles/copy-heredoc.Dockerfile"),
            include_str!("../../../tests/src/dockerfiles/mount-secret.Dockerfile"),
            include_str!("../../../tests/src/dockerfiles/on-build.Dockerfile"),
            "src/**/[a-z]*.rs\nsrc/a/b.rs\n!*\n",
        ]
        .map(|text| text.as_bytes().to_vec())
        .to_vec(),
        _ => Vec::new(),
    }
}
