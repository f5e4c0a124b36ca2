//! Man pages: the parts that a command line's definition does not have, and how a page is put together.

use super::manual_texts::{self, Page};
use clap::{Arg, Command};
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, italic, roman};
use std::fs;
use std::io::{self, Write};
use std::path::Path;

/// When the command line changed last.
const DATE: &str = "2026-11-30";

/// Writes a page for the command and for each command under it.
pub fn write(command: Command, folder: &Path) -> io::Result<()> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    write_built(&command, folder)
}

fn write_built(command: &Command, folder: &Path) -> io::Result<()> {
    for below in command.get_subcommands() {
        write_built(below, folder)?;
    }
    let name = file_name(command);
    fs::write(folder.join(format!("{name}.1")), render(command, &name)?)
}

/// `vublk-nvme-list`.
fn file_name(command: &Command) -> String {
    command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned()
}

/// One page.
fn render(command: &Command, name: &str) -> io::Result<Vec<u8>> {
    let texts = manual_texts::find(name);
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .date(DATE)
        .source(concat!("vublk ", env!("CARGO_PKG_VERSION")))
        .manual("vublk's manual");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    synopsis(command, name).to_writer(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    exit_status(texts).to_writer(&mut page)?;
    examples(texts).to_writer(&mut page)?;
    see_also(command, name, texts).to_writer(&mut page)?;
    page.flush()?;
    Ok(page)
}

/// How the command is called, with what its options' values are called.
fn synopsis(command: &Command, name: &str) -> Roff {
    let mut line = vec![bold(name.replace('-', " "))];
    let shown = command.get_arguments().filter(|arg| !arg.is_hide_set());
    let (operands, options): (Vec<&Arg>, Vec<&Arg>) = shown.partition(|arg| arg.is_positional());
    for arg in options.into_iter().chain(operands) {
        line.push(roman(" "));
        let (open, close) = if arg.is_required_set() { ("", "") } else { ("[", "]") };
        line.push(roman(open));
        line.extend(usage(arg));
        line.push(roman(close));
    }
    if command.has_subcommands() {
        line.extend([roman(" "), italic("COMMAND")]);
    }
    let mut roff = Roff::new();
    roff.control("SH", ["SYNOPSIS"]).text(line);
    roff
}

/// `-f|--format FORMAT`.
fn usage(arg: &Arg) -> Vec<Inline> {
    let mut line = Vec::new();
    let short = arg.get_short().map(|short| format!("-{short}"));
    let long = arg.get_long().map(|long| format!("--{long}"));
    match (short, long) {
        (Some(short), Some(long)) => line.extend([bold(short), roman("|"), bold(long)]),
        (short, long) => line.extend(short.or(long).map(bold)),
    }
    if arg.get_action().takes_values() {
        if !arg.is_positional() {
            line.push(roman(" "));
        }
        let names = arg.get_value_names().unwrap_or_default().iter();
        let names = names.map(ToString::to_string).collect::<Vec<_>>().join(" ");
        line.push(italic(names));
        if arg.is_positional() && arg.get_num_args().is_some_and(|n| n.max_values() > 1) {
            line.push(roman("…"));
        }
    }
    line
}

fn exit_status(texts: &Page) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["EXIT STATUS"]);
    for (code, meaning) in texts.exit {
        roff.control("TP", []).text([bold(*code)]).text([roman(*meaning)]);
    }
    roff
}

fn examples(texts: &Page) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["EXAMPLES"]);
    for (what, commands) in texts.examples {
        roff.control("PP", []).text([roman(format!("{what}:"))]);
        roff.control("PP", []).control("RS", ["4"]).control("EX", []);
        for line in commands.lines() {
            roff.text([roman(line)]);
        }
        roff.control("EE", []).control("RE", []);
    }
    roff
}

/// The pages of the commands under this one, or of the program, and those that the texts name.
fn see_also(command: &Command, name: &str, texts: &Page) -> Roff {
    let mut pages: Vec<String> = command.get_subcommands().map(file_name).collect();
    if let Some((above, _)) = name.rsplit_once('-') {
        pages.push(above.to_owned());
    }
    pages.extend(texts.see.iter().map(|page| (*page).to_owned()));
    let mut line = Vec::new();
    for page in pages {
        if !line.is_empty() {
            line.push(roman(", "));
        }
        line.extend([bold(page), roman("(1)")]);
    }
    let mut roff = Roff::new();
    roff.control("SH", ["SEE ALSO"]).text(line);
    roff.control("PP", []).text([roman("/usr/share/doc/vublk has more about each subject.")]);
    roff
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::generate::offered;
    use crate::cli::{command_line, daemon, getopt, img, io as io_command};

    /// The names of a command's page and of those under it.
    fn names(command: &Command) -> Vec<String> {
        let below = command.get_subcommands().flat_map(names);
        below.chain([file_name(command)]).collect()
    }

    /// The words of a line of the shell.
    fn words(line: &str) -> Vec<String> {
        let mut words = vec![String::new()];
        let mut quoted = false;
        for c in line.chars() {
            match c {
                '\'' => quoted = !quoted,
                ' ' if !quoted => words.push(String::new()),
                c => words.last_mut().unwrap().push(c),
            }
        }
        words.retain(|word| !word.is_empty());
        words
    }

    /// Whether a command of an example is one that the program takes.
    fn is_taken(words: &[String]) -> Result<(), String> {
        let (name, rest) = (&*words[1], &words[2..]);
        let options = match img::find(name) {
            Some(tool) => Some(tool.options),
            None => (name == "io").then_some(io_command::OPTIONS),
        };
        if let Some(options) = options {
            let parsed = getopt::parse(name, options, rest, getopt::Operands::Anywhere);
            return parsed.map(drop).map_err(|wrong| format!("{wrong:?}"));
        }
        let parsed = match name {
            "daemon" => daemon::command().try_get_matches_from(&words[1..]),
            _ => command_line().try_get_matches_from(words),
        };
        parsed.map(drop).map_err(|error| error.to_string())
    }

    #[test]
    fn every_command_has_examples_that_it_takes() {
        let mut command = offered();
        command.build();
        for name in names(&command) {
            let texts = manual_texts::find(&name);
            assert_eq!(texts.name, name);
            assert!(!texts.examples.is_empty() && !texts.exit.is_empty(), "{name}");
            let called = name.replace('-', " ");
            let commands: Vec<_> =
                texts.examples.iter().flat_map(|(_, text)| text.lines()).collect();
            assert!(commands.iter().any(|line| line.starts_with(&called)), "{name}: {commands:?}");
            for line in commands.iter().filter(|line| line.starts_with("vublk ")) {
                assert_eq!(is_taken(&words(line.trim_end_matches(" &"))), Ok(()), "{name}: {line}");
            }
        }
    }

    #[test]
    fn a_page_has_values_in_its_synopsis_a_date_and_all_sections() {
        let dir = tempfile::tempdir().unwrap();
        write(offered(), dir.path()).unwrap();
        let page = fs::read_to_string(dir.path().join("vublk-convert.1")).unwrap();
        assert!(
            page.contains(&format!(".TH VUBLK\\-CONVERT 1 {} ", DATE.replace('-', "\\-")))
                || page.contains(&format!(".TH VUBLK-CONVERT 1 {DATE} ")),
            "{page}"
        );
        for section in ["SYNOPSIS", "OPTIONS", "\"EXIT STATUS\"", "EXAMPLES", "\"SEE ALSO\""] {
            assert!(page.contains(&format!(".SH {section}\n")), "no {section}:\n{page}");
        }
        assert!(page.contains("\\-\\-target\\-format\\fR \\fIFORMAT\\fR"), "{page}");
    }

    #[test]
    fn nothing_is_offered_that_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().as_os_str().to_owned();
        assert!(crate::cli::generate::run(&[folder]).is_ok());
        for name in ["vublk-daemon.1", "vublk.bash", "_vublk", "vublk.fish"] {
            let text = fs::read_to_string(dir.path().join(name)).unwrap().replace('\\', "");
            for wrong in ["generate", "stray"] {
                assert!(!text.contains(wrong), "{name} has {wrong}");
            }
        }
        let daemon = fs::read_to_string(dir.path().join("vublk-daemon.1")).unwrap();
        assert!(!daemon.contains("trace"), "the daemon refuses --trace");
        let bash = fs::read_to_string(dir.path().join("vublk.bash")).unwrap();
        assert!(bash.contains("qcow2 qed raw"), "formats are not offered:\n{bash}");
    }
}
