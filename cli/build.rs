//! Has the linker pack the relative relocations, of which a static position-independent executable of this size has
//! some ten thousand: each start reads and applies them all, and packed they take 2 KB instead of 200. Hands the commit
//! on that whoever builds a release has put into `CLOCHE_COMMIT`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CLOCHE_COMMIT");
    let commit = std::env::var("CLOCHE_COMMIT").unwrap_or_else(|_| "unknown".into());
    println!("cargo::rustc-env=CLOCHE_COMMIT={commit}");
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
