//! The commands: their names, how many words they take, and what the help says.

/// One command.
pub struct Command {
    pub name: &'static str,
    /// A letter that stands for it; empty for none.
    pub short: &'static str,
    /// How many words it takes; none is any number.
    pub least: usize,
    pub most: Option<usize>,
    /// Works without an open image.
    pub without_image: bool,
    /// The letters of its options, those with a value followed by a colon.
    pub options: &'static str,
    pub words: &'static str,
    pub about: &'static str,
}

const fn command(
    (name, short): (&'static str, &'static str),
    (least, most): (usize, Option<usize>),
    options: &'static str,
    words: &'static str,
    about: &'static str,
) -> Command {
    Command { name, short, least, most, without_image: false, options, words, about }
}

const fn free(command: Command) -> Command {
    Command { without_image: true, ..command }
}

const NONE: (usize, Option<usize>) = (0, Some(0));
const ONE: (usize, Option<usize>) = (1, Some(1));
const TRANSFER: (usize, Option<usize>) = (2, None);

/// In the order of their names.
pub static COMMANDS: &[Command] = &[
    free(command(("abort", ""), NONE, "", "", "simulate a program crash using abort(3)")),
    command(("aio_flush", ""), NONE, "", "", "completes all outstanding aio requests"),
    command(
        ("aio_read", ""),
        TRANSFER,
        "CP:iqv",
        "[-Ciqv] [-P pattern] off len [len..]",
        "asynchronously reads a number of bytes",
    ),
    command(
        ("aio_write", ""),
        TRANSFER,
        "CfiP:quz",
        "[-Cfiquz] [-P pattern] off len [len..]",
        "asynchronously writes a number of bytes",
    ),
    command(
        ("alloc", "a"),
        (1, Some(2)),
        "",
        "offset [count]",
        "checks if offset is allocated in the file",
    ),
    command(
        ("break", ""),
        (2, Some(2)),
        "",
        "event tag",
        "sets a breakpoint on event and tags the stopped request as tag",
    ),
    command(("close", "c"), NONE, "", "", "close the current open file"),
    command(
        ("discard", "d"),
        TRANSFER,
        "Cq",
        "[-Cq] off len",
        "discards a number of bytes at a specified offset",
    ),
    command(("flush", "f"), NONE, "", "", "flush all in-core file state to disk"),
    free(command(("help", "?"), (0, Some(1)), "", "[command]", "help for one or all commands")),
    command(("info", "i"), NONE, "", "", "prints information about the current file"),
    command(("length", "l"), NONE, "", "", "gets the length of the current file"),
    command(("map", ""), NONE, "", "", "prints the allocated areas of a file"),
    free(command(
        ("open", "o"),
        (1, None),
        "snCro:ki:t:d:U",
        "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
        "open the file specified by path",
    )),
    free(command(("quit", "q"), (0, None), "", "", "exit the program")),
    command(
        ("read", "r"),
        TRANSFER,
        "bCl:pP:qs:v",
        "[-abCqv] [-P pattern [-s off] [-l len]] off len",
        "reads a number of bytes at a specified offset",
    ),
    command(
        ("readv", ""),
        TRANSFER,
        "CP:qv",
        "[-Cqv] [-P pattern] off len [len..]",
        "reads a number of bytes at a specified offset",
    ),
    command(("remove_break", ""), ONE, "", "tag", "remove a breakpoint by tag"),
    command(
        ("reopen", ""),
        (0, None),
        "c:o:rw",
        "[(-r|-w)] [-c cache] [-o options]",
        "reopens an image with new options",
    ),
    command(("resume", ""), ONE, "", "tag", "resumes the request tagged as tag"),
    free(command(("sigraise", ""), ONE, "", "signal", "raises a signal")),
    free(command(("sleep", ""), ONE, "", "", "waits for the given value in milliseconds")),
    command(
        ("truncate", "t"),
        (1, Some(3)),
        "m:",
        "[-m prealloc_mode] off",
        "truncates the current file at the given offset",
    ),
    command(("wait_break", ""), ONE, "", "tag", "waits for the suspension of a request"),
    command(
        ("write", "w"),
        TRANSFER,
        "bcCfnpP:qs:uz",
        "[-bcCfnquz] [-P pattern | -s source_file] off len",
        "writes a number of bytes at a specified offset",
    ),
    command(
        ("writev", ""),
        TRANSFER,
        "CfP:q",
        "[-Cfq] [-P pattern] off len [len..]",
        "writes a number of bytes at a specified offset",
    ),
];

/// The command of this name.
pub fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name || command.short == name)
}

impl Command {
    /// How it is used, on one line.
    pub fn usage(&self) -> String {
        let blank = if self.words.is_empty() { "" } else { " " };
        // The second blank is QEMU's.
        let map = if self.name == "map" { " " } else { "" };
        format!("{}{blank}{}{map} -- {}", self.name, self.words, self.about)
    }

    /// The error in this number of words, if there is one.
    pub fn wrong_count(&self, count: usize) -> Option<String> {
        let Command { name, least, most, .. } = *self;
        if count >= least && most.is_none_or(|most| count <= most) {
            return None;
        }
        let expected = match most {
            None => format!("at least {least}"),
            Some(most) if most == least => least.to_string(),
            Some(most) => format!("between {least} and {most}"),
        };
        Some(format!("bad argument count {count} to {name}, expected {expected} arguments"))
    }
}
