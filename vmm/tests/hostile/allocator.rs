//! The system's allocator, counting: how much memory this process has taken at most is what a hostile guest would
//! drive up.
#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call is handed to the system's allocator as it came; the counters are no memory of anybody's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are those that `System` asks for, and `alloc` has asked `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Bytes in use.
pub fn live() -> usize {
    LIVE.load(Ordering::Relaxed)
}

/// Most bytes that were ever in use.
pub fn peak() -> usize {
    PEAK.load(Ordering::Relaxed)
}
