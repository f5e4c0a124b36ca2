//! `vublk daemon`: qemu-storage-daemon's command line.
//!
//! The options are processed in two passes, as its manual says: first those about the process itself, then all others
//! strictly in the order given.

use super::confine::{self, SandboxArgs, SandboxPathArgs, Wanted};
use super::img::{out, outln};
use super::log::{self, LogArgs};
use super::policy::PolicyArgs;
use super::process::{Background, EndSignals, Manager, PidFile};
use super::startup::Startup;
use crate::block::{DriverEntry, Error, Growth};
use crate::crypto::object;
use crate::drivers;
use crate::export;
use crate::export::nbd::ServerOptions;
use crate::io::{self, descriptors};
use crate::metrics;
use crate::monitor::{Chardev, Control};
use crate::options::{bytes, keyval};
use crate::sandbox::{self, Plan};
use crate::service::Service;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, ValueHint};
use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::path::Path;

/// The options that are processed in their order: name, the key that a first bare word stands for,
/// and what the help says.
const ORDERED: [(&str, Option<&str>, &str); 7] = [
    ("blockdev", Some("driver"), "open a node of the block graph (driver=NAME,help lists options)"),
    ("chardev", None, "make a character device"),
    ("export", Some("type"), "serve a node"),
    ("monitor", Some("chardev"), "serve QMP on a character device"),
    ("nbd-server", None, "start an NBD server"),
    ("object", Some("qom-type"), "make an object (help lists types)"),
    ("trace", None, "trace events"),
];

/// Those that are refused whatever their value is.
const REFUSED: [&str; 1] = ["trace"];

/// A word that is not an option. It is refused in its order, like a wrong value.
const STRAY: &str = "stray";

/// The options that do something, as man pages and completions show them.
pub fn offered() -> Command {
    define(|name| !REFUSED.contains(&name))
}

pub fn command() -> Command {
    define(|_| true).arg(Arg::new(STRAY).hide(true).action(ArgAction::Append))
}

/// The command line with the given subset of the ordered options.
fn define(wanted: fn(&str) -> bool) -> Command {
    let ordered = ORDERED.iter().filter(|(name, ..)| wanted(name)).map(|&(name, _, help)| {
        let arg = Arg::new(name).long(name).value_name("OPTIONS").action(ArgAction::Append);
        let arg = arg.allow_hyphen_values(true).help(help).hide(REFUSED.contains(&name));
        if name == "trace" { arg.short('T') } else { arg }
    });
    let command = Command::new("daemon")
        .about("Serve disks to virtual machines; the options are qemu-storage-daemon's")
        .infer_long_args(true)
        .disable_version_flag(true)
        .args(ordered)
        .arg(
            Arg::new("version")
                .short('V')
                .long("version")
                .action(ArgAction::SetTrue)
                .help("show the version"),
        )
        .arg(
            Arg::new("daemonize")
                .long("daemonize")
                .action(ArgAction::SetTrue)
                .help("go to the background once everything is ready"),
        )
        .arg(
            Arg::new("pidfile")
                .long("pidfile")
                .value_name("PATH")
                .value_hint(ValueHint::FilePath)
                .action(ArgAction::Append)
                .help("write the process ID there once everything is ready"),
        )
        .arg(
            Arg::new("metrics")
                .long("metrics")
                .value_name("ADDRESS")
                .value_parser(clap::value_parser!(metrics::Address))
                .help("offer metrics there: unix:PATH, or ADDRESS:PORT of the loopback interface"),
        );
    let command = LogArgs::augment_args(PolicyArgs::augment_args(command));
    SandboxPathArgs::augment_args(SandboxArgs::augment_args(command))
}

/// Runs the daemon until a signal ends it. `program` is the name in error lines.
pub fn run(program: &str, arguments: Vec<OsString>) -> super::Outcome {
    let arguments = arguments.iter().map(|argument| bytes::text_of_name(argument));
    let arguments = std::iter::once(program.to_owned()).chain(arguments);
    let matches = match command().try_get_matches_from(arguments) {
        Ok(matches) => matches,
        Err(error) if error.use_stderr() => return Err(usage_line(&error).into()),
        Err(help) => {
            let _ = help.print();
            return Ok(());
        }
    };
    if matches.get_flag("version") {
        outln!("qemu-storage-daemon version 7.2.0 (vublk {})", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    let signals = EndSignals::block();
    let background = if matches.get_flag("daemonize") { Some(Background::enter()?) } else { None };
    log::start(0, LogArgs::from_arg_matches(&matches).map_err(|error| usage_line(&error))?)?;
    // After the fork: a signalfd tells of the process that made it.
    let stop = signals.descriptor()?;
    descriptors::raise_limit();
    let policy = PolicyArgs::from_arg_matches(&matches).map_err(|error| usage_line(&error))?;
    let service = Service::start(drivers::registry(), policy.policy())?;
    let mut startup = Startup::new(service, stop);
    let service = startup.service().clone();
    service.wait_for_locks(Some(EndSignals::have_come));
    // Monitors may ask for it.
    service.count_requests();
    let address = matches.get_one::<metrics::Address>("metrics");
    let observed = address.map(|_| service.observe());
    let mut control = Control::default();
    for (option, implied_key, value) in in_order(&matches) {
        if option == STRAY {
            return Err(format!("{value}: Unexpected argument").into());
        }
        let done = act(&mut startup, &mut control, option, implied_key, value)
            .map_err(|error| error.at(format!("--{option} {value}")))?;
        if done == Done::Help {
            return Ok(());
        }
    }
    let metrics = address.zip(observed).map(|(at, observed)| {
        metrics::Server::start(at, observed, log::dropped, EndSignals::have_come)
    });
    let metrics = metrics.transpose().map_err(|error| error.at("--metrics"))?;
    let pid_file = matches.get_many::<String>("pidfile").and_then(|mut paths| paths.next_back());
    let pid_file = pid_file.map(|path| PidFile::create(&bytes::path_of(path)));
    let mut pid_file = pid_file.transpose()?;
    let manager = Manager::find();
    confine(&matches, &service, &control, metrics.as_ref(), pid_file.as_ref())?;
    pid_file.as_mut().map(PidFile::write).transpose()?;
    background.map(Background::ready).transpose()?;
    manager.notify(Manager::READY);
    control.serve(&service, startup.stop().as_raw_fd());
    manager.notify(Manager::STOPPING);
    drop(metrics);
    control.finish(&service);
    drop((service, startup));
    drop(pid_file);
    sandbox::report_refused();
    manager.drain();
    Ok(())
}

/// Everything is open: gives up what is not needed any more.
fn confine(
    matches: &ArgMatches,
    service: &Service,
    control: &Control,
    metrics: Option<&metrics::Server>,
    pid_file: Option<&PidFile>,
) -> super::Outcome {
    let args = SandboxArgs::from_arg_matches(matches).map_err(|error| usage_line(&error))?;
    let more = SandboxPathArgs::from_arg_matches(matches).map_err(|error| usage_line(&error))?;
    let mut plan = confine::plan(service);
    plan.own.extend(control.sockets().map(Path::to_owned));
    plan.own.extend(metrics.and_then(metrics::Server::path).map(Path::to_owned));
    let sockets = plan.own.clone();
    plan.own.extend(pid_file.map(|file| file.path().to_owned()));
    let folders = more.paths.into_iter().map(|path| path.0).collect();
    let wanted = Wanted { args: &args, by_default: false, sockets };
    wanted.enter(Plan { folders, grows: control.has_monitors(), ..plan })
}

#[derive(PartialEq, Eq)]
enum Done {
    Acted,
    /// A help text was printed: the program ends with success.
    Help,
}

fn act(
    startup: &mut Startup,
    control: &mut Control,
    option: &str,
    implied_key: Option<&str>,
    value: &str,
) -> Result<Done, Error> {
    if REFUSED.contains(&option) {
        return Err(Error::new("this option is not available"));
    }
    if option == "chardev" && !matches!(value, "help" | "?") {
        let (text, stop) = (value.to_owned(), startup.stop().as_raw_fd());
        let open = async move |_| io::offload(move || Chardev::open(&text, stop)).await;
        control.add_chardev(startup.run("--chardev", open)?, stop)?;
        return Ok(Done::Acted);
    }
    let parsed = keyval::parse_argument(value, implied_key)?;
    let options = parsed.options;
    if parsed.help {
        let Some(text) = help(option, options.get(implied_key.unwrap_or_default())) else {
            return Err(Error::new("Help is not available for this option"));
        };
        out!("{text}");
        return Ok(Done::Help);
    }
    match option {
        "blockdev" => startup
            .run("--blockdev", async move |service| service.blockdev_add(options).await.map(drop)),
        "object" => startup.run("--object", async move |service| service.object_add(options).await),
        "monitor" => control.add_monitor(options),
        "nbd-server" => {
            let options = ServerOptions::read(options, false)?;
            startup.run("--nbd-server", async move |service| service.nbd_start(options).await)
        }
        _ => startup.run("--export", async move |service| service.export_add(options).await),
    }?;
    Ok(Done::Acted)
}

/// The text for `help`: about one driver or type, or the list of all.
fn help(option: &str, about: Option<&crate::options::Value>) -> Option<String> {
    let name = about.and_then(|value| value.as_str());
    match (option, name) {
        ("blockdev", None) => {
            let names = drivers::registry().iter().map(|entry| format!("  {}\n", entry.name));
            Some(format!("Supported block drivers:\n{}", names.collect::<String>()))
        }
        ("blockdev", Some(name)) => drivers::registry().get(name).map(driver_help),
        ("object", None) => {
            Some("List of user creatable objects:\n  iothread\n  secret\n  secret_keyring\n".into())
        }
        ("object", Some("iothread")) => Some(
            "iothread options:\n  aio-max-batch=<int>\n  poll-grow=<int>\n  poll-max-ns=<int>\n  \
             poll-shrink=<int>\n  thread-pool-max=<int>\n  thread-pool-min=<int>\n"
                .into(),
        ),
        ("object", Some(name)) => object::help(name).map(str::to_owned),
        ("chardev", None) => Some("Available chardev backend types: \n  socket\n".into()),
        ("export", None) => {
            let names = export::LIST.iter().map(|entry| format!("  {}\n", entry.name));
            Some(format!("Supported export types:\n{}", names.collect::<String>()))
        }
        _ => None,
    }
}

/// A driver's own options, in the form of `--object TYPE,help`.
fn driver_help(entry: &DriverEntry) -> String {
    let lines = entry.options.iter().map(|option| {
        let head = format!("{}=<{}>", option.name, option.value);
        format!("  {head:<28} - {}\n", option.help)
    });
    let mut text = format!("{} options:\n{}", entry.name, lines.collect::<String>());
    let features: Vec<_> = entry.features.names().collect();
    if !features.is_empty() {
        text += &format!("Its images can have: {}\n", features.join(", "));
    }
    if let Growth::Own(modes) = entry.growth {
        let modes: Vec<_> = modes.iter().map(|mode| mode.name()).collect();
        text += &format!("Preallocation of new space: {}\n", modes.join(", "));
    }
    text
}

/// The ordered options as they were given.
fn in_order(matches: &ArgMatches) -> Vec<(&'static str, Option<&'static str>, &str)> {
    let mut all = Vec::new();
    let named = ORDERED.iter().map(|&(name, implied_key, _)| (name, implied_key));
    for (name, implied_key) in named.chain([(STRAY, None)]) {
        let places = matches.indices_of(name).into_iter().flatten();
        let values = matches.get_many::<String>(name).into_iter().flatten();
        all.extend(places.zip(values).map(|(place, value)| (place, name, implied_key, value)));
    }
    all.sort_by_key(|&(place, ..)| place);
    all.into_iter().map(|(_, name, key, value)| (name, key, &**value)).collect()
}

/// A wrong command line in the words of getopt and of qemu-storage-daemon.
fn usage_line(error: &clap::Error) -> String {
    let argument = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        _ => String::new(),
    };
    let given = argument(ContextKind::InvalidArg);
    let name = given.split([' ', '=']).next().unwrap_or_default();
    match error.kind() {
        ErrorKind::UnknownArgument if given.starts_with('-') && !given.starts_with("--") => {
            format!("invalid option -- '{}'", given.chars().nth(1).unwrap_or('-'))
        }
        ErrorKind::UnknownArgument if given.starts_with('-') => {
            format!("unrecognized option '{given}'")
        }
        ErrorKind::InvalidValue if argument(ContextKind::InvalidValue).is_empty() => {
            format!("option '{name}' requires an argument")
        }
        ErrorKind::TooManyValues => format!("option '{name}' doesn't allow an argument"),
        _ => error.to_string().lines().next().unwrap_or_default().replace("error: ", ""),
    }
}
