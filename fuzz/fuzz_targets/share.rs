//! See `cloche_share::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cloche_share::fuzzing::messages(bytes));
