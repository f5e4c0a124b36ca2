//! Command lines parsed as by getopt_long, which QEMU's tools use, with its messages.
//!
//! Options and operands come in any order, short options in clusters, and long names may be abbreviated.
//!
//! The rule held here: a command's options are listed once, and parsing, help texts, man pages and
//! shell completions follow from the list.

use crate::drivers;
use crate::options::similar::similar;
use crate::tools::Cache;
use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction};

/// One option of a command.
#[derive(Clone, Copy, Debug)]
pub struct Opt {
    /// One letter; empty for none.
    pub short: &'static str,
    /// Empty for none.
    pub long: &'static str,
    /// What its value is called; none for a switch.
    pub value: Option<&'static str>,
    pub help: &'static str,
    /// What versions of QEMU after 7.2 call it besides: letters and long names. A long name of 7.2 that is cut
    /// short stays that name, whatever else begins so.
    pub newer: &'static [&'static str],
}

/// A switch: `-q`.
pub const fn switch(short: &'static str, long: &'static str, help: &'static str) -> Opt {
    Opt { short, long, value: None, help, newer: &[] }
}

/// A switch that has a long name alone: `--image-opts`.
pub const fn long_switch(long: &'static str, help: &'static str) -> Opt {
    Opt { short: "", long, value: None, help, newer: &[] }
}

/// An option with a value: `-f FORMAT`.
pub const fn valued(
    short: &'static str,
    long: &'static str,
    value: &'static str,
    help: &'static str,
) -> Opt {
    Opt { short, long, value: Some(value), help, newer: &[] }
}

/// An option with a value and a long name alone: `--output FORMAT`.
pub const fn long_valued(long: &'static str, value: &'static str, help: &'static str) -> Opt {
    Opt { short: "", long, value: Some(value), help, newer: &[] }
}

impl Opt {
    /// The same with names that later versions of QEMU have for it.
    pub const fn newer(self, newer: &'static [&'static str]) -> Opt {
        Opt { newer, ..self }
    }

    /// What it goes by in a parsed line: the long name, or the short one where there is no other, or the first
    /// of the newer ones.
    fn key(&self) -> &'static str {
        [self.long, self.short]
            .into_iter()
            .chain(self.newer.iter().copied())
            .find(|name| !name.is_empty())
            .unwrap_or_default()
    }

    fn has_letter(&self, letter: char) -> bool {
        let is_match = |name: &str| name.chars().eq([letter]);
        is_match(self.short) || self.newer.iter().any(|name| is_match(name))
    }

    /// All its letters and long names.
    pub fn flags(&self) -> impl Iterator<Item = String> {
        let names = [self.short, self.long].into_iter().chain(self.newer.iter().copied());
        names.filter(|name| !name.is_empty()).map(|name| match name.chars().count() {
            1 => format!("-{name}"),
            _ => format!("--{name}"),
        })
    }
}

/// The error in a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The argument that getopt points at; the one before, if the option stands inside a cluster.
    Unrecognized(String),
    MissingValue(String),
}

/// A command line, parsed: options and values in the order given, and operands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    options: Vec<(&'static str, String)>,
    pub operands: Vec<String>,
    /// `-h` or `--help` came before anything that is wrong.
    pub help: bool,
}

impl Line {
    pub fn has(&self, key: &str) -> bool {
        self.options.iter().any(|(name, _)| *name == key)
    }

    /// The last value given.
    pub fn get(&self, key: &str) -> Option<&str> {
        let found = self.options.iter().rev().find(|(name, _)| *name == key);
        found.map(|(_, value)| &**value)
    }

    /// All values given.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.options.iter().filter(move |(name, _)| *name == key).map(|(_, value)| &**value)
    }

    /// Options and their values in the order given.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.options.iter().map(|(name, value)| (*name, &**value))
    }
}

/// Where options end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operands {
    /// They may stand between options.
    Anywhere,
    /// The first one ends the options; it and all that follows are operands.
    Last,
}

/// Parses the arguments behind `called`, the name of the program or command. `-h` and `--help` are
/// known to every command and end the parsing.
pub fn parse(
    called: &str,
    options: &[Opt],
    arguments: &[String],
    operands: Operands,
) -> Result<Line, Wrong> {
    let mut line = Line::default();
    let mut at = 0;
    while at < arguments.len() {
        let argument = &arguments[at];
        at += 1;
        if argument == "--" {
            line.operands.extend_from_slice(&arguments[at..]);
            break;
        }
        if let Some(long) = argument.strip_prefix("--") {
            let (name, value) = match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (long, None),
            };
            let unrecognized = || Wrong::Unrecognized(argument.clone());
            let Some(option) = find_long(options, name).ok_or_else(unrecognized)? else {
                if value.is_some() {
                    return Err(unrecognized());
                }
                line.help = true;
                return Ok(line);
            };
            let value = match (option.value, value) {
                (None, None) => String::new(),
                (None, Some(_)) => return Err(unrecognized()),
                (Some(_), Some(value)) => value,
                (Some(_), None) => {
                    take(arguments, &mut at).ok_or_else(|| Wrong::MissingValue(argument.clone()))?
                }
            };
            line.options.push((option.key(), value));
        } else if argument.len() > 1 && argument.starts_with('-') {
            // getopt has moved on only when a cluster is done.
            let this = at;
            let before = |line: &Line| match line.operands.last() {
                Some(operand) => operand.clone(),
                None if this >= 2 => arguments[this - 2].clone(),
                None => called.to_owned(),
            };
            let mut rest = argument[1..].chars();
            while let Some(short) = rest.next() {
                let found = options.iter().find(|option| option.has_letter(short));
                let Some(option) = found else {
                    if short == 'h' {
                        line.help = true;
                        return Ok(line);
                    }
                    let last = rest.as_str().is_empty();
                    return Err(Wrong::Unrecognized(if last {
                        argument.clone()
                    } else {
                        before(&line)
                    }));
                };
                let value = match option.value {
                    None => String::new(),
                    Some(_) if !rest.as_str().is_empty() => rest.as_str().to_owned(),
                    Some(_) => take(arguments, &mut at)
                        .ok_or_else(|| Wrong::MissingValue(argument.clone()))?,
                };
                let taken = option.value.is_some();
                line.options.push((option.key(), value));
                if taken {
                    break;
                }
            }
        } else if operands == Operands::Last {
            line.operands.extend_from_slice(&arguments[at - 1..]);
            break;
        } else {
            line.operands.push(argument.clone());
        }
    }
    Ok(line)
}

fn take(arguments: &[String], at: &mut usize) -> Option<String> {
    let value = arguments.get(*at).cloned();
    *at += 1;
    value
}

/// The option of a long name, whole or cut short as far as it is still one option's: `Some(None)` is
/// help, `None` no option's or several options'.
fn find_long<'a>(options: &'a [Opt], name: &str) -> Option<Option<&'a Opt>> {
    if name == "help" {
        return Some(None);
    }
    let is_whole = |option: &&Opt| {
        // A letter is no long name.
        option.long == name || name.len() > 1 && option.newer.contains(&name)
    };
    if let Some(option) = options.iter().find(is_whole).filter(|_| !name.is_empty()) {
        return Some(Some(option));
    }
    let mut fitting = options.iter().filter(|o| !o.long.is_empty() && o.long.starts_with(name));
    match (fitting.next(), fitting.next(), "help".starts_with(name)) {
        (Some(option), None, false) => return Some(Some(option)),
        (None, None, true) => return Some(None),
        (None, None, false) => {}
        _ => return None,
    }
    let begins = |newer: &&str| newer.len() > 1 && newer.starts_with(name);
    let mut fitting = options.iter().filter(|option| option.newer.iter().any(begins));
    match (fitting.next(), fitting.next()) {
        (Some(option), None) => Some(Some(option)),
        _ => None,
    }
}

/// Advice on an argument that is no option: the long name that may have been meant.
pub fn advice(options: &[Opt], argument: &str) -> Option<String> {
    let name = argument.strip_prefix("--")?.split('=').next()?;
    let names = options
        .iter()
        .flat_map(|option| [option.long].into_iter().chain(option.newer.iter().copied()));
    let meant = similar(name, names.filter(|name| name.len() > 1))?;
    Some(format!("Did you mean '--{meant}'?"))
}

/// The definition that man pages and completions are made from.
pub fn command(
    name: &'static str,
    about: &'static str,
    options: &[Opt],
    operands: &'static str,
) -> clap::Command {
    let args = options.iter().map(|option| {
        let mut arg = Arg::new(option.key()).help(option.help);
        if let Some(short) = option.short.chars().next() {
            arg = arg.short(short);
        }
        let newer = option.newer.iter().copied().filter(|name| name.len() > 1);
        let mut long = Some(option.long).filter(|name| !name.is_empty()).into_iter().chain(newer);
        if let Some(long) = long.next() {
            arg = arg.long(long);
        }
        arg = arg.visible_aliases(long);
        match option.value {
            Some(value) => {
                let arg = arg.value_name(value).action(ArgAction::Append);
                match choices(value) {
                    Some(choices) => arg.value_parser(PossibleValuesParser::new(choices)),
                    None if value == "FILE" => arg.value_hint(clap::ValueHint::FilePath),
                    None => arg,
                }
            }
            None => arg.action(ArgAction::SetTrue),
        }
    });
    let rest = Arg::new("operands").value_name(operands).action(ArgAction::Append);
    let rest = rest.value_hint(clap::ValueHint::FilePath);
    clap::Command::new(name).about(about).disable_version_flag(true).args(args).arg(rest)
}

/// The words that a value can be, by what it is called: `FORMAT`, `CACHE`, or the words themselves, `leaks|all`.
fn choices(value: &'static str) -> Option<Vec<&'static str>> {
    match value {
        "FORMAT" => Some(drivers::formats().collect()),
        "CACHE" => Some(Cache::NAMES.to_vec()),
        _ => value.contains('|').then(|| value.split('|').collect()),
    }
}

/// How the command is used, on one line: `info [--object OBJECT] [-f FORMAT] FILE`.
pub fn usage(name: &str, options: &[Opt], operands: &str) -> String {
    let shown = options.iter().map(|option| {
        let flag = option.flags().next().unwrap_or_default();
        match option.value {
            Some(value) if flag.starts_with("--") => format!(" [{flag}={value}]"),
            Some(value) => format!(" [{flag} {value}]"),
            None => format!(" [{flag}]"),
        }
    });
    format!("{name}{} {operands}", shown.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: &[Opt] = &[
        switch("q", "", ""),
        switch("s", "", ""),
        valued("f", "format", "FORMAT", ""),
        long_switch("image-opts", ""),
        long_valued("output", "FORMAT", ""),
        long_valued("object", "OBJECT", ""),
        valued("F", "", "FORMAT", "").newer(&["B", "backing-format", "other-format"]),
        long_switch("", "").newer(&["limits", "image-limits"]),
    ];

    fn read(text: &str) -> Result<(String, String), Wrong> {
        let arguments: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        let line = parse("info", OPTIONS, &arguments, Operands::Anywhere)?;
        if line.help {
            return Ok(("help".into(), String::new()));
        }
        let options: Vec<_> = line.iter().map(|(name, value)| format!("{name}={value}")).collect();
        Ok((options.join(" "), line.operands.join(" ")))
    }

    #[test]
    fn options_and_operands_come_in_any_order() {
        for (text, options, operands) in [
            ("a", "", "a"),
            ("a -q b -fraw", "q= format=raw", "a b"),
            ("-qsf raw a", "q= s= format=raw", "a"),
            ("-f -q", "format=-q", ""),
            ("--output json --image --out=x -", "output=json image-opts= output=x", "-"),
            ("--format= -- -q", "format=", "-q"),
            ("-Braw -F a --backing-format b --other=c", "F=raw F=a F=b F=c", ""),
            ("-qBraw", "q= F=raw", ""),
            // What 7.2 takes cut short stays what it is.
            ("--image --limits --li", "image-opts= limits= limits=", ""),
        ] {
            assert_eq!(read(text), Ok((options.into(), operands.into())), "{text}");
        }
        assert_eq!(read("-q --he -x").unwrap().0, "help");
        assert_eq!(read("-qhx").unwrap().0, "help");
    }

    #[test]
    fn wrong_options_are_reported_as_getopt_points_at_them() {
        for (text, wrong) in [
            ("-x", "-x"),
            ("a -qx", "-qx"),
            ("-xq", "info"),
            ("-q -xq", "-q"),
            ("a -q -xq", "a"),
            ("--bogus", "--bogus"),
            ("--o json", "--o"),
            ("--B raw", "--B"),
            ("--image-opts=1", "--image-opts=1"),
            ("--help=1", "--help=1"),
        ] {
            assert_eq!(read(text), Err(Wrong::Unrecognized(wrong.into())), "{text}");
        }
        assert_eq!(read("a -qf"), Err(Wrong::MissingValue("-qf".into())));
        assert_eq!(read("--out"), Err(Wrong::MissingValue("--out".into())));
    }
}
