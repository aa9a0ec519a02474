//! A container's configuration, as `cloche-container` reads it, up to where something would be made.
#![no_main]

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
};

use cloche_runtime::{Launch, Oci, Rootfs, Stdio, check};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(spec) = cloche_oci::parse_config(bytes, &|_| ()) else { return };
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    let socket = null();
    let state = |_: i32, _: &str| String::new();
    let listener = |_, _| Ok(());
    let oci = Oci {
        console_socket: Some(socket.as_fd()),
        hook_state: Some(&state),
        listener: Some(&listener),
        warn: Some(&|_| ()),
        ..Oci::default()
    };
    let launch = |spec| {
        check(&Launch {
            id: "fuzz",
            spec,
            user: None,
            filter: None,
            rootfs: Rootfs::Directory("/nowhere".into()),
            stdio: Stdio { stdin: null(), stdout: null(), stderr: null() },
            kill_on_parent_death: false,
            approve: None,
            oci,
        })
        .map_err(|error| error.to_string())
    };
    let outcome = launch(&spec);
    if let Err(reason) = &outcome {
        assert!(!reason.trim().is_empty());
    }
    // As it is kept for later verbs.
    let again = cloche_oci::parse_config(&serde_json::to_vec(&spec).unwrap(), &|_| ()).unwrap();
    assert_eq!(launch(&again), outcome);
});
