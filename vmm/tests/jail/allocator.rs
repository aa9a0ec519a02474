//! The system's allocator, which can be told to use no memory twice: then every allocation makes the heap grow, on
//! whichever thread it happens, as it would in a process whose heap is full.
#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicBool, Ordering},
};

/// What an allocation takes at least while the heap grows; less than the C library asks the kernel for apart.
const LEAST_BYTES: usize = 100 << 10;

static GROWS: AtomicBool = AtomicBool::new(false);

struct Growing;

#[global_allocator]
static ALLOCATOR: Growing = Growing;

// SAFETY: every allocation is the system's, of at least the size that was asked for. What was allocated is given back
// to the system once or never.
unsafe impl GlobalAlloc for Growing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let grows = GROWS.load(Ordering::Relaxed);
        let bytes = if grows { layout.size().max(LEAST_BYTES) } else { layout.size() };
        let Ok(layout) = Layout::from_size_align(bytes, layout.align()) else { return std::ptr::null_mut() };
        // SAFETY: the layout is valid, and not empty if the caller's is not.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if !GROWS.load(Ordering::Relaxed) {
            // SAFETY: `System` has allocated it, and its deallocation takes no notice of the size.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        if !GROWS.load(Ordering::Relaxed) {
            // SAFETY: the caller's promises are those that `System` asks for, and `System` has allocated it.
            return unsafe { System.realloc(pointer, layout, bytes) };
        }
        let Ok(new) = Layout::from_size_align(bytes, layout.align()) else { return std::ptr::null_mut() };
        // SAFETY: the caller asks for no empty one.
        let moved = unsafe { self.alloc(new) };
        if !moved.is_null() {
            // SAFETY: both have at least so many bytes, and nobody else has the new one.
            unsafe { std::ptr::copy_nonoverlapping(pointer, moved, layout.size().min(bytes)) };
        }
        moved
    }
}

/// From now on nothing is used twice, and the heap has no room to spare.
pub fn grow_always() {
    // SAFETY: mallopt(3) takes numbers, and no other thread is there yet.
    unsafe { libc::mallopt(libc::M_TOP_PAD, 0) };
    GROWS.store(true, Ordering::Relaxed);
}
