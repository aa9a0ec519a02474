//! Which functions a start runs through: the linker puts them side by side, so that a start maps few pages
//! (`docs/decisions/0038-the-order-of-functions.md`).
//!
//! ```text
//! the linker's map ─▶ entries ─▶ traps in each process of the program ─▶ those that were hit ─▶ a linker script
//! ```
//!
//! Names end in a hash of types and versions, which the script leaves open. Where that would take in many others, as
//! with instances of a generic function, those of one crate are taken in.

mod tracer;

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

/// A piece of code that the linker places as a whole.
struct Section {
    address: u64,
    size: u64,
    /// As a linker script names it, with the hash left open.
    pattern: String,
    /// The same, in this crate only.
    narrow: String,
    /// Where its functions begin.
    entries: Vec<u64>,
}

/// Prints a linker script that puts what `command` runs of `program` in front.
pub fn print(program: &Path, map: &Path, command: &[String]) -> Result<()> {
    let text = fs::read_to_string(map).with_context(|| format!("read {}", map.display()))?;
    let sections = sections(&text);
    ensure!(!sections.is_empty(), "{} is not a map as lld writes it", map.display());
    let entries: HashMap<u64, usize> = sections
        .iter()
        .enumerate()
        .flat_map(|(index, section)| section.entries.iter().map(move |entry| (*entry, index)))
        .collect();
    let hits = tracer::hits(program, entries.keys().copied().collect(), command)?;
    let mut seen = HashSet::new();
    let used: Vec<&Section> = hits
        .iter()
        .filter_map(|hit| entries.get(hit))
        .filter(|index| seen.insert(**index))
        .filter_map(|index| sections.get(*index))
        .collect();
    eprintln!("{} functions, {} bytes", used.len(), used.iter().map(|section| section.size).sum::<u64>());
    print!("{}", script(&sections, &used));
    Ok(())
}

/// How many bytes besides those that are used a pattern may take in, if it is not as many as are used.
const TOLERATED: u64 = 2048;

fn script(sections: &[Section], used: &[&Section]) -> String {
    let sizes = |sections: &mut dyn Iterator<Item = &Section>| {
        let mut sizes = HashMap::<String, u64>::new();
        sections.for_each(|section| *sizes.entry(section.pattern.clone()).or_default() += section.size);
        sizes
    };
    let all = sizes(&mut sections.iter());
    let hit = sizes(&mut used.iter().copied());
    let mut text = String::new();
    let mut seen = HashSet::new();
    for section in used {
        let [all, hit] = [&all, &hit].map(|sizes| sizes.get(&section.pattern).copied().unwrap_or_default());
        let name = if all > (2 * hit).max(hit + TOLERATED) { &section.narrow } else { &section.pattern };
        if seen.insert(name) {
            let _ = writeln!(text, "    {name}");
        }
    }
    text
}

/// The sections with code of a map as lld writes it: lines of address, address in memory, size, alignment and, indented
/// by what they belong to, output section, `FILE:(SECTION)` or symbol.
fn sections(map: &str) -> Vec<Section> {
    let mut sections = Vec::<Section>::new();
    let mut is_code = false;
    for line in map.lines() {
        let mut words = line.split_whitespace();
        let mut number = || u64::from_str_radix(words.next()?, 16).ok();
        let (Some(address), Some(_), Some(size), Some(_)) = (number(), number(), number(), number()) else {
            continue;
        };
        let Some(what) = words.next() else { continue };
        match what.strip_suffix(')').and_then(|what| what.split_once(":(")) {
            Some((file, section)) => {
                is_code = section.starts_with(".text") && size > 0;
                if is_code && let Some((pattern, narrow, is_one)) = names(file, section) {
                    let entries = if is_one { vec![address] } else { Vec::new() };
                    sections.push(Section { address, size, pattern, narrow, entries });
                } else {
                    is_code = false;
                }
            }
            None if is_code => {
                let last = sections.last_mut().filter(|section| address < section.address + section.size);
                last.into_iter().for_each(|section| section.entries.push(address));
            }
            None => {}
        }
    }
    sections
}

/// How a linker script names a section: in all files, and in those of its crate; and whether the section is one
/// function.
fn names(file: &str, section: &str) -> Option<(String, String, bool)> {
    if let Some(start) = section.find("17h").filter(|_| section.contains("_ZN")) {
        let open = section.get(..start).map(|name| format!("*({name}17h*)"))?;
        let narrow = section.get(..start).map(|name| format!("{}({name}17h*)", files_of_crate(file)))?;
        return Some((open, narrow, true));
    }
    if section.contains("._R") {
        let name = without_crate_hashes(section);
        return Some((format!("*({name})"), format!("{}({name})", files_of_crate(file)), true));
    }
    // The C library's, whose objects have one section of several functions.
    let (archive, object) = file.strip_suffix(')')?.rsplit_once('(')?;
    let archive = Path::new(archive).file_name()?.to_str()?;
    let name = format!("*{archive}:{object}({section})");
    archive.starts_with("libc.").then(|| (name.clone(), name, false))
}

/// As a linker script names the object files of the same crate: `libNAME-HASH.rlib(…)`, or `NAME-HASH.….o` for that of
/// the program.
fn files_of_crate(file: &str) -> String {
    let path = file.rsplit_once('(').map_or(file, |(archive, _)| archive);
    let name = Path::new(path).file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = name.split_once('-').map_or(name, |(name, _)| name);
    if path.len() < file.len() { format!("*{name}-*:*") } else { format!("*/{name}-*") }
}

/// Symbols as Rust mangles its own library's have the hash of each crate before its name: `Cs3Fk1_3std`.
fn without_crate_hashes(name: &str) -> String {
    let mut parts = name.split("Cs");
    let mut open = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let hash = part.bytes().take_while(u8::is_ascii_alphanumeric).count();
        match part.get(hash..).filter(|rest| hash > 5 && rest.starts_with('_')) {
            Some(rest) => open += &format!("Cs*{rest}"),
            None => open += &format!("Cs{part}"),
        }
    }
    open
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "\
             VMA              LMA     Size Align Out     In      Symbol
          3f5680           3f5680   e4d28    64 .text.start
          3f5680           3f5680       20    16         /d/libx-1.rlib(x.o):(.text._ZN1x4main17h0123456789abcdefE)
          3f5680           3f5680       20     1                 x::main
          3f56a0           3f56a0       40    16         /usr/lib/libc.a(malloc.o):(.text)
          3f56a0           3f56a0       10     1                 malloc
          3f56b0           3f56b0       10     1                 free
          3f5700           3f5700       10    16         /d/libstd-1.rlib(s.o):(.text._RNvNtCsjrHSEGnQ_3std2rt4init)
          3f6000           3f6000       10    16         /d/libx-1.rlib(x.o):(.rodata.x)
          3f6000           3f6000       10     1                 TABLE
";

    #[test]
    fn map_has_functions_and_where_they_begin() {
        let found = sections(MAP);
        let seen: Vec<_> = found.iter().map(|one| (one.pattern.as_str(), one.entries.as_slice())).collect();
        assert_eq!(
            seen,
            [
                ("*(.text._ZN1x4main17h*)", &[0x3f5680, 0x3f5680][..]),
                ("*libc.a:malloc.o(.text)", &[0x3f56a0, 0x3f56b0]),
                ("*(.text._RNvNtCs*_3std2rt4init)", &[0x3f5700]),
            ]
        );
    }

    #[test]
    fn script_names_instances_of_a_generic_function_by_crate() {
        let section = |narrow: &str, size| Section {
            address: 0,
            size,
            pattern: "*(f*)".into(),
            narrow: format!("*({narrow})"),
            entries: Vec::new(),
        };
        let few = [section("f1", 500), section("f2", 500)];
        assert_eq!(script(&few, &[&few[0]]), "    *(f*)\n");
        let many = [section("f1", 500), section("f2", 9000)];
        assert_eq!(script(&many, &[&many[0]]), "    *(f1)\n");
    }
}
