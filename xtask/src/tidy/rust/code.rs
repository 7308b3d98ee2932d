//! Tells Rust code from comments and literals, as far as the rules need it.

use std::{iter::Peekable, str::Chars};

/// The text with comments, strings and characters blanked out; lines stay where they are.
pub(super) fn code_only(text: &str) -> String {
    let mut scanner =
        Scanner { rest: text.chars().peekable(), code: String::with_capacity(text.len()) };
    while scanner.step() {}
    scanner.code
}

struct Scanner<'a> {
    rest: Peekable<Chars<'a>>,
    code: String,
}

impl Scanner<'_> {
    /// Consumes one token; false at the end.
    fn step(&mut self) -> bool {
        let Some(&next) = self.rest.peek() else { return false };
        match next {
            '/' => self.slash(),
            '"' => self.string(),
            '\'' => self.quote(),
            c if c == '_' || c.is_alphanumeric() => self.word(),
            _ => self.keep(),
        }
        true
    }

    fn keep(&mut self) {
        self.code.extend(self.rest.next());
    }

    /// Replaces the next character by a blank, and returns it.
    fn blank(&mut self) -> Option<char> {
        let c = self.rest.next()?;
        self.code.push(if c == '\n' { '\n' } else { ' ' });
        Some(c)
    }

    fn slash(&mut self) {
        let mut ahead = self.rest.clone();
        ahead.next();
        match ahead.next() {
            Some('/') => {
                while self.rest.peek().is_some_and(|&c| c != '\n') {
                    self.blank();
                }
            }
            Some('*') => self.block_comment(),
            _ => self.keep(),
        }
    }

    /// Block comments nest.
    fn block_comment(&mut self) {
        let mut depth = 0_usize;
        loop {
            let Some(c) = self.blank() else { return };
            match (c, self.rest.peek()) {
                ('/', Some('*')) => {
                    self.blank();
                    depth += 1;
                }
                ('*', Some('/')) => {
                    self.blank();
                    depth -= 1;
                    if depth == 0 {
                        return;
                    }
                }
                _ => {}
            }
        }
    }

    fn string(&mut self) {
        self.blank();
        while let Some(c) = self.blank() {
            match c {
                '"' => return,
                '\\' => drop(self.blank()),
                _ => {}
            }
        }
    }

    /// A raw string, from its first `#` or quote; nothing if this is none (`r#type`).
    fn raw_string(&mut self) {
        let hashes = self.rest.clone().take_while(|&c| c == '#').count();
        if self.rest.clone().nth(hashes) != Some('"') {
            return;
        }
        for _ in 0..=hashes {
            self.blank();
        }
        while let Some(c) = self.blank() {
            if c == '"' && self.rest.clone().take(hashes).filter(|&c| c == '#').count() == hashes {
                for _ in 0..hashes {
                    self.blank();
                }
                return;
            }
        }
    }

    /// A character or a lifetime.
    fn quote(&mut self) {
        let mut ahead = self.rest.clone().skip(1);
        match (ahead.next(), ahead.next()) {
            (Some('\\'), _) => {
                self.blank();
                self.blank();
                self.blank();
                while self.blank().is_some_and(|c| c != '\'') {}
            }
            (Some(_), Some('\'')) => {
                self.blank();
                self.blank();
                self.blank();
            }
            _ => self.keep(),
        }
    }

    fn word(&mut self) {
        let start = self.code.len();
        while self.rest.peek().is_some_and(|&c| c == '_' || c.is_alphanumeric()) {
            self.keep();
        }
        if matches!(&self.code[start..], "r" | "br" | "cr") {
            self.raw_string();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::code_only;

    #[test]
    fn comments_and_literals_are_blanked() {
        for (text, words) in [
            ("a // b\nc", "a c"),
            ("a /* b /* c */ d */ e", "a e"),
            (r#"a "b \" c" d"#, "a d"),
            ("a r#\"b \" c\"# d", "a r d"),
            ("a br\"b\\\" d", "a br d"),
            ("r#type x", "r#type x"),
            ("fn f<'a>(x: &'a str)", "fn f<'a>(x: &'a str)"),
            (r"a '\'' b '\u{1F600}' c '\\' d", "a b c d"),
            ("a '\"' b '/' c", "a b c"),
            ("a / b", "a / b"),
            ("\"not closed", ""),
        ] {
            let code: Vec<_> = code_only(text).split_whitespace().map(str::to_owned).collect();
            assert_eq!(code.join(" "), words, "{text}");
        }
    }

    #[test]
    fn lines_stay_where_they_are() {
        let text = "a\n/* b\nc */\n\"d\ne\"\nf\n";
        assert_eq!(code_only(text).lines().count(), text.lines().count());
        assert_eq!(code_only(text).lines().nth(5), Some("f"));
    }
}
