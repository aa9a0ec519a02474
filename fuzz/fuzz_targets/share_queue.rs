//! See `cloche_vmm::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cloche_vmm::fuzzing::share_queue(bytes));
