//! See `cloche_images::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cloche_images::fuzzing::compressed(bytes));
