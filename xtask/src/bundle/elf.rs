//! What a shared library or program asks of the loader: read from its dynamic section, with every offset checked.
//!
//! Only what Linux on x86_64 and aarch64 uses is read: 64 bits, little endian.

use std::{fs, path::Path};

/// The part of an ELF file that decides where it runs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Dynamic {
    /// The libraries that must be there, by the names the loader looks for.
    pub(crate) needed: Vec<String>,
    /// The versions of symbols that those must have, such as `GLIBC_2.34`.
    pub(crate) versions: Vec<String>,
}

/// Why a file cannot be read: the part of it that does not make sense.
type Malformed = &'static str;

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_VERNEED: u64 = 0x6fff_fffe;
const DT_VERNEEDNUM: u64 = 0x6fff_ffff;

impl Dynamic {
    /// Reads a file; the error names it.
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        Self::parse(&bytes).map_err(|part| format!("{}: not an ELF file: {part}", path.display()))
    }

    fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let file = File(bytes);
        if file.get(0, 6)? != [0x7f, b'E', b'L', b'F', 2, 1] {
            return Err("its first bytes are not those of a 64-bit little-endian one");
        }
        let segments = file.segments()?;
        let Some(dynamic) = segments.iter().find(|segment| segment.kind == PT_DYNAMIC) else {
            return Ok(Self::default());
        };
        let entries = file.entries(dynamic)?;
        let value = |tag| entries.iter().find(|entry| entry.0 == tag).map(|entry| entry.1);
        let Some(strings) = value(DT_STRTAB) else { return Ok(Self::default()) };
        let strings = place(&segments, strings)?;

        let mut found = Self::default();
        for &(_, at) in entries.iter().filter(|entry| entry.0 == DT_NEEDED) {
            found.needed.push(file.string(strings, at)?);
        }
        if let (Some(at), Some(count)) = (value(DT_VERNEED), value(DT_VERNEEDNUM)) {
            found.versions = file.versions(place(&segments, at)?, count, strings)?;
        }
        Ok(found)
    }
}

/// The offset in the file of an address in memory.
fn place(segments: &[Segment], address: u64) -> Result<u64, Malformed> {
    segments
        .iter()
        .filter(|segment| segment.kind == PT_LOAD)
        .find_map(|segment| {
            let into = address.checked_sub(segment.address)?;
            if into < segment.len { segment.offset.checked_add(into) } else { None }
        })
        .ok_or("an address lies in no segment")
}

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    len: u64,
}

struct File<'a>(&'a [u8]);

impl File<'_> {
    fn get(&self, at: u64, len: u64) -> Result<&[u8], Malformed> {
        let range = || {
            let start = usize::try_from(at).ok()?;
            self.0.get(start..start.checked_add(usize::try_from(len).ok()?)?)
        };
        range().ok_or("it ends too early")
    }

    /// A number of `len` bytes, at most 8.
    fn number(&self, at: u64, len: u64) -> Result<u64, Malformed> {
        let bytes = self.get(at, len)?;
        Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn u32(&self, at: u64) -> Result<u32, Malformed> {
        u32::try_from(self.number(at, 4)?).map_err(|_| "a number is too large")
    }

    fn segments(&self) -> Result<Vec<Segment>, Malformed> {
        let (start, size, count) = (self.number(32, 8)?, self.number(54, 2)?, self.number(56, 2)?);
        (0..count)
            .map(|index| {
                let at = add(start, index * size)?;
                Ok(Segment {
                    kind: self.u32(at)?,
                    offset: self.number(add(at, 8)?, 8)?,
                    address: self.number(add(at, 16)?, 8)?,
                    len: self.number(add(at, 32)?, 8)?,
                })
            })
            .collect()
    }

    /// The dynamic section: tags and values.
    fn entries(&self, segment: &Segment) -> Result<Vec<(u64, u64)>, Malformed> {
        let mut entries = Vec::new();
        for index in 0..segment.len / 16 {
            let at = add(segment.offset, index * 16)?;
            let entry = (self.number(at, 8)?, self.number(add(at, 8)?, 8)?);
            if entry.0 == DT_NULL {
                break;
            }
            entries.push(entry);
        }
        Ok(entries)
    }

    /// A string of the table, up to its zero.
    fn string(&self, table: u64, at: u64) -> Result<String, Malformed> {
        let start = add(table, at)?;
        let rest = usize::try_from(start).ok().and_then(|start| self.0.get(start..));
        let rest = rest.ok_or("a string lies behind its end")?;
        let end = rest.iter().position(|&byte| byte == 0).ok_or("a string does not end")?;
        String::from_utf8(rest[..end].to_vec()).map_err(|_| "a name is not UTF-8")
    }

    /// The names of the version requirements: a list of libraries, each with a list of versions.
    fn versions(&self, start: u64, count: u64, strings: u64) -> Result<Vec<String>, Malformed> {
        let mut names = Vec::new();
        let mut library = start;
        for _ in 0..count {
            let mut version = add(library, self.number(add(library, 8)?, 4)?)?;
            for _ in 0..self.number(add(library, 2)?, 2)? {
                names.push(self.string(strings, self.number(add(version, 8)?, 4)?)?);
                match self.number(add(version, 12)?, 4)? {
                    0 => break,
                    next => version = add(version, next)?,
                }
            }
            match self.number(add(library, 12)?, 4)? {
                0 => break,
                next => library = add(library, next)?,
            }
        }
        Ok(names)
    }
}

fn add(a: u64, b: u64) -> Result<u64, Malformed> {
    a.checked_add(b).ok_or("an offset overflows")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One segment over the whole file, loaded at 0x1000; the dynamic section, strings and versions behind it.
    fn sample() -> Vec<u8> {
        let mut file = vec![0; 0x200];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0x7f, b'E', b'L', b'F', 2, 1]);
        put(32, &64_u64.to_le_bytes());
        put(54, &56_u16.to_le_bytes());
        put(56, &2_u16.to_le_bytes());
        let mut segment = |at: usize, kind: u32, offset: u64, address: u64, len: u64| {
            put(at, &kind.to_le_bytes());
            put(at + 8, &offset.to_le_bytes());
            put(at + 16, &address.to_le_bytes());
            put(at + 32, &len.to_le_bytes());
        };
        segment(64, PT_LOAD, 0, 0x1000, 0x200);
        segment(120, PT_DYNAMIC, 0xb0, 0x10b0, 0x60);
        let entries = [
            (DT_NEEDED, 1_u64),
            (DT_NEEDED, 8),
            (DT_STRTAB, 0x1180),
            (DT_VERNEED, 0x1120),
            (DT_VERNEEDNUM, 1),
            (DT_NULL, 0),
        ];
        for (index, (tag, value)) in entries.into_iter().enumerate() {
            put(0xb0 + index * 16, &tag.to_le_bytes());
            put(0xb8 + index * 16, &value.to_le_bytes());
        }
        // One library with two versions.
        put(0x122, &2_u16.to_le_bytes());
        put(0x128, &16_u32.to_le_bytes());
        put(0x138, &15_u32.to_le_bytes());
        put(0x13c, &16_u32.to_le_bytes());
        put(0x148, &26_u32.to_le_bytes());
        put(0x180, b"\0liba.1\0libb.2\0GLIBC_2.34\0GLIBC_2.5\0");
        file
    }

    #[test]
    fn what_is_needed_is_read() {
        let found = Dynamic::parse(&sample()).unwrap();
        assert_eq!(found.needed, ["liba.1", "libb.2"]);
        assert_eq!(found.versions, ["GLIBC_2.34", "GLIBC_2.5"]);
    }

    #[test]
    fn this_program_needs_the_c_library() {
        let found = Dynamic::read(&std::env::current_exe().unwrap()).unwrap();
        assert!(found.needed.iter().any(|name| name.starts_with("libc.so")), "{found:?}");
        assert!(found.versions.iter().any(|name| name.starts_with("GLIBC_2.")), "{found:?}");
    }

    #[test]
    fn damage_is_an_error_and_never_a_panic() {
        let good = sample();
        assert!(Dynamic::parse(b"#!/bin/sh\n").is_err());
        // All of it that matters lies before the end of the last string.
        for len in 0..0x1a4 {
            assert!(Dynamic::parse(&good[..len]).is_err(), "{len} bytes");
        }
        for at in 0..good.len() {
            for byte in [0, 1, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = byte;
                let _ = Dynamic::parse(&bad);
            }
        }
    }

    #[test]
    fn a_static_program_needs_nothing() {
        let mut file = sample();
        file[120..124].copy_from_slice(&4_u32.to_le_bytes());
        assert_eq!(Dynamic::parse(&file), Ok(Dynamic::default()));
    }
}
