//! Inputs that are nearly right: where a parser's mistakes are.

/// Numbers that look random and are the same every time: SplitMix64.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers that follow from a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        let below = self.number() % limit as u64;
        usize::try_from(below).unwrap_or(0)
    }

    /// One of several.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// A range within `len`, mostly a short one.
    fn range(&mut self, len: usize) -> std::ops::Range<usize> {
        let start = self.below(len + 1);
        let most = if self.below(8) == 0 { len - start } else { (len - start).min(32) };
        start..start + self.below(most + 1)
    }
}

/// What sizes and counts go wrong at.
const NUMBERS: [u64; 14] = [
    0,
    1,
    2,
    7,
    8,
    255,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

/// What JSON is made of.
const TOKENS: [&[u8]; 14] = [
    b"{", b"}", b"[", b"]", b",", b":", b"\"", b"null", b"true", b"-1", b"1e9", b"0.5", b"[]",
    b"\\u0000",
];

/// Longer inputs take more time and show nothing new.
const LONGEST: usize = 64 << 10;

/// `base`, changed in one to four ways; `other` is another input of the same kind.
///
/// Every other JSON text stays one, mostly: what a parser refuses shows nothing of what comes after it.
#[must_use]
pub fn mutate(random: &mut Random, base: &[u8], other: &[u8]) -> Vec<u8> {
    let mut data = base.to_vec();
    let gentle = base.starts_with(b"{") && random.below(4) != 0;
    let most = 1 + random.below(4);
    for _ in 0..=random.below(most) {
        match random.below(8) {
            _ if !gentle => change(random, &mut data, other),
            0..4 => number(random, &mut data),
            4..6 => word(random, &mut data),
            _ => element(random, &mut data),
        }
        data.truncate(LONGEST);
    }
    data
}

fn change(random: &mut Random, data: &mut Vec<u8>, other: &[u8]) {
    if data.is_empty() {
        data.extend_from_slice(other);
        return;
    }
    let at = random.below(data.len());
    match random.below(12) {
        0 => data[at] ^= 1 << random.below(8),
        1 => data[at] = u8::try_from(random.below(256)).unwrap_or(0),
        2 => data.truncate(at),
        3 => drop(data.drain(random.range(data.len()))),
        // A piece of it once more, here or elsewhere.
        4 => {
            let piece = data[random.range(data.len())].to_vec();
            drop(data.splice(at..at, piece));
        }
        // A piece of another.
        5 => {
            let piece = other[random.range(other.len())].to_vec();
            let into = random.range(data.len());
            drop(data.splice(into, piece));
        }
        // The beginning of this and the end of that.
        6 => {
            data.truncate(at);
            data.extend_from_slice(&other[random.below(other.len() + 1)..]);
        }
        7 => drop(data.splice(at..at, random.pick(&TOKENS).iter().copied())),
        8 => binary_number(random, data, at),
        9 => word(random, data),
        _ => number(random, data),
    }
}

/// Another number where one stands in the text, or wherever it stands: sizes that agree go on to agree.
fn number(random: &mut Random, data: &mut Vec<u8>) {
    // Not those inside of words.
    let numbers: Vec<std::ops::Range<usize>> = runs(data, |byte| byte.is_ascii_alphanumeric())
        .filter(|run| data[run.clone()].iter().all(u8::is_ascii_digit))
        .collect();
    if numbers.is_empty() {
        return;
    }
    let chosen = random.pick(&numbers).clone();
    let old = data[chosen.clone()].to_vec();
    let value: u64 = String::from_utf8_lossy(&old).parse().unwrap_or(0);
    let new = match random.below(6) {
        0 => value.wrapping_add(1),
        1 => value.wrapping_sub(1),
        2 => value.wrapping_mul(2),
        3 => value / 2,
        4 => 1 << random.below(64),
        _ => *random.pick(&NUMBERS),
    };
    let new = new.to_string().into_bytes();
    if random.below(3) == 0 {
        drop(data.splice(chosen, new));
        return;
    }
    for run in numbers.into_iter().rev().filter(|run| data[run.clone()] == old).collect::<Vec<_>>()
    {
        drop(data.splice(run, new.iter().copied()));
    }
}

/// A word of the text in place of another.
fn word(random: &mut Random, data: &mut Vec<u8>) {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.';
    let (Some(from), Some(to)) = (run(random, data, is_word), run(random, data, is_word)) else {
        return;
    };
    let word = data[from].to_vec();
    drop(data.splice(to, word));
}

/// A list or object of the text once more, beside itself or in place of another.
fn element(random: &mut Random, data: &mut Vec<u8>) {
    let (Some(from), Some(to)) = (balanced(random, data), balanced(random, data)) else { return };
    let element = data[from.clone()].to_vec();
    if random.below(2) == 0 {
        drop(data.splice(to, element));
    } else {
        drop(data.splice(from.end..from.end, [b",", element.as_slice()].concat()));
    }
}

/// From an opening bracket, some way from a random place, to the closing one.
fn balanced(random: &mut Random, data: &[u8]) -> Option<std::ops::Range<usize>> {
    let from = random.below(data.len().max(1));
    let start = from + data[from..].iter().position(|byte| b"{[".contains(byte))?;
    let mut depth = 0_usize;
    for (index, byte) in data.iter().enumerate().skip(start) {
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' if depth == 1 => return Some(start..index + 1),
            b'}' | b']' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// A run of bytes of one kind.
fn run(
    random: &mut Random,
    data: &[u8],
    is_part: impl Fn(u8) -> bool,
) -> Option<std::ops::Range<usize>> {
    let all: Vec<_> = runs(data, is_part).collect();
    (!all.is_empty()).then(|| random.pick(&all).clone())
}

/// Every run of bytes of one kind.
fn runs(data: &[u8], is_part: impl Fn(u8) -> bool) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut start = 0;
    let all = data.chunk_by(move |&a, &b| is_part(a) == is_part(b)).map(move |run| {
        start += run.len();
        start - run.len()..start
    });
    all.filter(move |run| {
        run.clone().next().is_some_and(|first| data[first].is_ascii_alphanumeric())
    })
}

/// A number in place of bytes: little-endian of some width, or of as many bytes as it takes seven bits at a time.
fn binary_number(random: &mut Random, data: &mut Vec<u8>, at: usize) {
    let number = *random.pick(&NUMBERS);
    let bytes = match random.below(4) {
        0 => number.to_le_bytes()[..4].to_vec(),
        1 => number.to_le_bytes().to_vec(),
        _ => {
            let (mut left, mut bytes) = (number, Vec::new());
            while left >= 0x80 {
                bytes.push(left.to_le_bytes()[0] | 0x80);
                left >>= 7;
            }
            bytes.push(left.to_le_bytes()[0]);
            bytes
        }
    };
    // In place of one byte, as most numbers of the binary formats take, or of as many as it has.
    let replaced = if random.below(2) == 0 { 1 } else { bytes.len() };
    drop(data.splice(at..data.len().min(at + replaced), bytes));
}
