//! Where the kernel enters an optimised `cloche` (`cli/build.rs` tells the linker): before the C library's own entry point,
//! `_start`. What a verb that enters containers does first is run the program again, from a file that nobody can write
//! ([`crate::binary`]); done here, the first of the two processes is spared what makes a program ready: some 18,000
//! relocations, the C library's start and that of Rust's.
//!
//! It is a short cut, and nothing relies on it. Whatever it cannot do it leaves as it was, for
//! [`protect_own_binary`](crate::protect_own_binary) to do in a process that can tell what failed.
//!
//! Nothing is relocated yet, and there is no thread-local storage. So this code calls nothing that the C library would
//! have to be ready for, not even `memcpy`, and refers to nothing but by its distance: there is no table of strings, and
//! nothing that could panic. In a build without optimisation, the compiler would add such calls by itself.

#![allow(unsafe_code)]

use std::{
    arch::{asm, naked_asm},
    ffi::{CStr, c_char, c_long},
    mem::{MaybeUninit, size_of},
};

/// Enters `_start` in the end, with everything as the kernel left it (x86-64 psABI §3.4.1: the stack has what the program
/// was called with, `rdx` what to register with `atexit`, which for a static program is nothing).
///
/// # Safety
///
/// It is for the kernel to call.
#[unsafe(naked)]
#[unsafe(no_mangle)]
unsafe extern "C" fn cloche_entry() -> ! {
    naked_asm!(
        "mov rdi, rsp",
        // Of the registers that a call preserves.
        "mov rbx, rsp",
        "and rsp, -16",
        "call {protect}",
        "mov rsp, rbx",
        "xor edx, edx",
        "jmp _start",
        protect = sym protect,
    )
}

/// Called so, and with one of these words, the program enters a container. Another meaning of such a word costs one
/// superfluous `execve`.
const NAME: &CStr = c"cloche-container";
const VERBS: (&CStr, &CStr, &CStr) = (c"create", c"run", c"exec");

const OWN: &CStr = c"/proc/self/exe";

/// `struct statfs` of `asm-generic/statfs.h`, in whose counterpart the `libc` crate hides the flags.
#[repr(C)]
struct StatFs {
    before: [u64; 10],
    flags: u64,
    spare: [u64; 4],
}

/// `stack` is where the kernel has put the arguments: their number, the arguments, a null pointer, the environment.
unsafe extern "C" fn protect(stack: *const usize) {
    // SAFETY: the number of arguments is there.
    let count = unsafe { stack.read() };
    let arguments = stack.wrapping_add(1);
    let argument = |index: usize| {
        // SAFETY: there are `count` of them, each a pointer.
        (index < count).then(|| unsafe { arguments.wrapping_add(index).read() } as *const c_char)
    };
    let Some(path) = argument(0) else { return };
    // SAFETY: each argument is a string that ends in NUL.
    let name = unsafe { last_part(path) };
    // SAFETY: as above.
    if !unsafe { equal(name, NAME) } {
        return;
    }
    let mut index = 1;
    loop {
        let Some(word) = argument(index) else { return };
        // SAFETY: as above.
        let is = |verb| unsafe { equal(word, verb) };
        if is(VERBS.0) || is(VERBS.1) || is(VERBS.2) {
            break;
        }
        index += 1;
    }
    // SAFETY: they are followed by a null pointer, and that by the environment.
    unsafe { run_again(arguments, arguments.wrapping_add(count + 1)) };
}

/// Unless its file cannot be written already, runs this program again from a read-only mount of it that is attached
/// nowhere. Returns if that is not possible.
///
/// # Safety
///
/// Both are arrays as execve(2) takes them.
unsafe fn run_again(arguments: *const usize, environment: *const usize) {
    let own = OWN.as_ptr() as usize;
    let mut stat = MaybeUninit::<StatFs>::uninit();
    // SAFETY: the path is a string that ends in NUL; the kernel writes a `statfs`, for which there is room.
    if unsafe { system_call(libc::SYS_statfs, [own, stat.as_mut_ptr() as usize, 0, 0, 0]) } != 0 {
        return;
    }
    // SAFETY: the kernel has filled it in.
    let stat = unsafe { stat.assume_init_ref() };
    if stat.flags & libc::ST_RDONLY != 0 {
        return;
    }
    let here = libc::AT_FDCWD as usize;
    let clone = (libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC) as usize;
    // SAFETY: the path is a string that ends in NUL.
    let mount = unsafe { system_call(libc::SYS_open_tree, [here, own, clone, 0, 0]) };
    if mount < 0 {
        return;
    }
    let (mount, itself) = (mount as usize, libc::AT_EMPTY_PATH as usize);
    let empty = c"".as_ptr() as usize;
    let readonly =
        libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let change = [mount, empty, itself, &raw const readonly as usize, size_of::<libc::mount_attr>()];
    // SAFETY: the path is a string that ends in NUL, and the attributes are of the size given.
    if unsafe { system_call(libc::SYS_mount_setattr, change) } == 0 {
        let again = [mount, empty, arguments as usize, environment as usize, itself];
        // SAFETY: the path is a string that ends in NUL, and the caller vouches for the arrays.
        unsafe { system_call(libc::SYS_execveat, again) };
    }
    // SAFETY: nobody else knows of this descriptor.
    unsafe { system_call(libc::SYS_close, [mount, 0, 0, 0, 0]) };
}

/// A path's part behind the last slash.
///
/// # Safety
///
/// It is a string that ends in NUL.
unsafe fn last_part(path: *const c_char) -> *const c_char {
    let (mut part, mut next) = (path, path);
    loop {
        // SAFETY: the end of the string has not been passed.
        match unsafe { next.read() } as u8 {
            0 => return part,
            b'/' => part = next.wrapping_add(1),
            _ => {}
        }
        next = next.wrapping_add(1);
    }
}

/// Whether two strings are the same.
///
/// # Safety
///
/// The first one ends in NUL, too.
unsafe fn equal(one: *const c_char, other: &CStr) -> bool {
    let mut next = one;
    for byte in other.to_bytes_with_nul() {
        // SAFETY: the end of the string has not been passed: it is not equal to a byte before the last.
        if unsafe { next.read() } as u8 != *byte {
            return false;
        }
        next = next.wrapping_add(1);
    }
    true
}

/// A system call without the C library, which keeps errors in thread-local storage. A negative result is an error.
///
/// # Safety
///
/// That of the call.
unsafe fn system_call(number: c_long, arguments: [usize; 5]) -> isize {
    let [first, second, third, fourth, fifth] = arguments;
    let result;
    // SAFETY: the kernel takes number and arguments in these registers, and changes `rax`, `rcx` and `r11` only (x86-64
    // psABI §A.2.1); the caller vouches for the call.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") first,
            in("rsi") second,
            in("rdx") third,
            in("r10") fourth,
            in("r8") fifth,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}
