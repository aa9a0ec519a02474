//! Tells the linker how to make a program that starts quickly:
//!
//! - Relative relocations, of which a static position-independent executable of this size has some ten thousand, are
//!   packed: each start reads and applies them all, and packed they take 5 KB instead of 200.
//! - What starts run through lies side by side (`start.ld`, `docs/decisions/0038-the-order-of-functions.md`).
//! - It is entered where it can protect its own file before anything else (`oci/src/entry_point.rs`), if it is optimised.
//!
//! Hands the commit on that whoever builds a release has put into `CLOCHE_COMMIT`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=start.ld");
    println!("cargo::rerun-if-env-changed=CLOCHE_LINK_MAP");
    println!("cargo::rerun-if-env-changed=CLOCHE_COMMIT");
    let commit = std::env::var("CLOCHE_COMMIT").unwrap_or_else(|_| "unknown".into());
    println!("cargo::rustc-env=CLOCHE_COMMIT={commit}");
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{}/start.ld", env!("CARGO_MANIFEST_DIR"));
    if std::env::var("OPT_LEVEL").is_ok_and(|level| level != "0") {
        println!("cargo::rustc-link-arg-bins=-Wl,-e,cloche_entry");
    }
    // Only `scripts/start-order` wants one.
    if let Ok(map) = std::env::var("CLOCHE_LINK_MAP") {
        println!("cargo::rustc-link-arg-bins=-Wl,-Map,{map}");
    }
}
