//! `vublk nvme`: this machine's NVMe controllers, and giving them to processes and back.

use super::img::outln;
use crate::options::{Map, Value, json, size};
use crate::tools::nvme::{
    self, Address, Controller, Function, Group, Machine, Namespace, Obstacle, Use, health, limits,
};
use std::path::PathBuf;

/// Look at this machine's NVMe controllers, give them to vfio-pci and back
#[derive(clap::Args)]
pub struct Nvme {
    /// Look at the machine whose /sys, /proc and /dev are below DIR
    #[arg(long, value_name = "DIR", default_value = "/", global = true)]
    sysroot: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List controllers, their users, and what keeps each from being used
    List(List),
    /// Give controllers to vfio-pci, for `nvme://`; those in use are refused
    Bind {
        /// Addresses, such as 0000:01:00.0; of one IOMMU group all together
        #[arg(required = true, value_name = "ADDRESS")]
        addresses: Vec<Address>,
    },
    /// Give controllers back to the kernel's driver; those in use are refused
    Unbind {
        #[arg(required = true, value_name = "ADDRESS")]
        addresses: Vec<Address>,
    },
}

#[derive(clap::Args)]
struct List {
    /// Only these controllers
    #[arg(value_name = "ADDRESS")]
    addresses: Vec<Address>,
    /// How to print it
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Say more: identity, health, errors, IOMMU group, limits
    #[arg(short, long)]
    verbose: bool,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Output {
    #[default]
    Human,
    Json,
}

impl Nvme {
    pub fn run(self) -> super::Outcome {
        let machine = Machine::new(self.sysroot);
        match self.command {
            Command::List(list) => list.run(&machine),
            Command::Bind { addresses } => {
                for controller in nvme::bind(&machine, &addresses)? {
                    outln!("{}: {VFIO}: nvme://{0}/1", controller.address, VFIO = nvme::VFIO_PCI);
                }
                Ok(())
            }
            Command::Unbind { addresses } => {
                for address in addresses {
                    let controller = nvme::unbind(&machine, address)?;
                    match controller.driver {
                        Some(driver) => outln!("{address}: {driver}"),
                        None => outln!("{address}: no driver took it: modprobe nvme"),
                    }
                }
                Ok(())
            }
        }
    }
}

impl List {
    fn run(self, machine: &Machine) -> super::Outcome {
        let controllers = match &*self.addresses {
            [] => Controller::all(machine),
            some => some
                .iter()
                .map(|&address| Controller::at(machine, address))
                .collect::<Result<_, _>>()?,
        };
        let found: Vec<_> = controllers
            .into_iter()
            .map(|controller| Found::new(machine, controller, self.verbose))
            .collect();
        match self.output {
            Output::Human if found.is_empty() => outln!("no NVMe controllers"),
            Output::Human => {
                for found in &found {
                    found.print(machine, self.verbose);
                }
            }
            Output::Json => {
                let list = found.iter().map(|found| Value::Map(found.json())).collect();
                outln!("{}", json::to_pretty_text(&Value::List(list)));
            }
        }
        Ok(())
    }
}

/// A controller and what is to say about using it.
struct Found {
    controller: Controller,
    uses: Vec<Use>,
    obstacles: Vec<Obstacle>,
    /// Its health, where it was asked and the driver that has it can report it.
    reported: Option<Result<health::Report, String>>,
}

impl Found {
    fn new(machine: &Machine, controller: Controller, verbose: bool) -> Found {
        let uses = nvme::uses(machine, &controller);
        let obstacles = nvme::obstacles(machine, &controller, &[]);
        let mut found = Found { controller, uses, obstacles, reported: None };
        if verbose {
            let is_used = found.state() != "ready";
            found.reported = health::ask(machine, &found.controller, is_used).transpose();
        }
        found
    }

    /// One word for scripts.
    fn state(&self) -> &'static str {
        match self {
            Found { uses, .. } if !uses.is_empty() => "in-use",
            Found { obstacles, .. } if !obstacles.is_empty() => "blocked",
            Found { controller, .. } if controller.has_vfio() => "ready",
            Found { .. } => "free",
        }
    }

    fn print(&self, machine: &Machine, verbose: bool) {
        let Controller { address, driver, group, identity, namespaces, .. } = &self.controller;
        let name = match identity {
            Some(identity) => format!("{}, serial {}", identity.model, identity.serial),
            None => self.ids(),
        };
        let driver = driver.as_deref().map_or("no driver".into(), |name| format!("driver {name}"));
        let of_group = match group {
            Some(group) => format!("IOMMU group {}", group.number),
            None => "no IOMMU group".to_owned(),
        };
        outln!("{address}  {name}, {driver}, {of_group}");
        for Namespace { id, disk, bytes, block_size, zoned } in namespaces {
            let zoned = if *zoned { ", zoned" } else { "" };
            let bytes = size::human(*bytes);
            outln!("    namespace {id}: {disk}, {bytes}, blocks of {block_size} bytes{zoned}");
        }
        if verbose {
            self.print_more(machine);
        }
        for used in &self.uses {
            outln!("    in use: {used}");
        }
        for obstacle in &self.obstacles {
            outln!("    {obstacle}");
        }
        match self.state() {
            "ready" => outln!("    ready: nvme://{address}/1"),
            "free" => outln!("    free: vublk nvme bind {address}"),
            _ => {}
        }
    }

    fn print_more(&self, machine: &Machine) {
        let Controller { driver_override, group, identity, numa_node, .. } = &self.controller;
        outln!("    ids: {}", self.ids());
        if let Some(identity) = identity {
            outln!("    firmware: {}", identity.firmware);
        }
        if let Some(node) = numa_node {
            outln!("    NUMA node: {node}");
        }
        if let Some(driver) = driver_override {
            outln!("    driver_override: {driver}");
        }
        match &self.reported {
            Some(Ok(reported)) => print_health(reported),
            Some(Err(error)) => outln!("    health: {error}"),
            None => {}
        }
        let Some(Group { number, functions }) = group else { return };
        for Function { address, class, driver } in functions {
            let driver = driver.as_deref().unwrap_or("none");
            outln!("    in the group: {address}, class {class:06x}, driver {driver}");
        }
        for (first, last, kind) in limits::reserved_regions(machine, *number) {
            outln!("    not to be mapped: {first:#x} to {last:#x} ({kind})");
        }
        if let Some(most) = limits::dma_entries(machine) {
            outln!("    DMA mappings: at most {most}");
        }
        match limits::locked_memory() {
            Some(bytes) => {
                outln!("    locked memory: at most {} (ulimit -l)", size::human(bytes))
            }
            None => outln!("    locked memory: any (ulimit -l)"),
        }
    }

    fn ids(&self) -> String {
        let (vendor, device) = self.controller.ids;
        format!("{vendor:04x}:{device:04x}")
    }

    fn json(&self) -> Map {
        let Controller { address, driver, driver_override, group, identity, .. } = &self.controller;
        let text = |text: &Option<String>| text.clone().map_or(Value::Null, Value::from);
        let mut map = Map::new();
        map.insert("address", address.to_string());
        map.insert("ids", self.ids());
        if let Some(identity) = identity {
            map.insert("model", identity.model.clone());
            map.insert("serial", identity.serial.clone());
            map.insert("firmware", identity.firmware.clone());
        }
        if let Some(Ok(reported)) = &self.reported {
            map.insert("health", Value::Map(health_json(reported)));
        }
        map.insert("driver", text(driver));
        map.insert("driver-override", text(driver_override));
        map.insert(
            "iommu-group",
            group.as_ref().map_or(Value::Null, |g| u64::from(g.number).into()),
        );
        let functions = group.iter().flat_map(|group| &group.functions);
        let functions = functions.map(|function| {
            Value::Map(Map::from_iter([
                ("address", Value::from(function.address.to_string())),
                ("class", Value::from(format!("{:06x}", function.class))),
                ("driver", text(&function.driver)),
            ]))
        });
        map.insert("group-functions", Value::List(functions.collect()));
        let namespaces = self.controller.namespaces.iter().map(|namespace| {
            Value::Map(Map::from_iter([
                ("nsid", Value::from(namespace.id)),
                ("disk", Value::from(namespace.disk.clone())),
                ("size", Value::from(namespace.bytes)),
                ("block-size", Value::from(namespace.block_size)),
                ("zoned", Value::from(namespace.zoned)),
            ]))
        });
        map.insert("namespaces", Value::List(namespaces.collect()));
        map.insert("state", self.state());
        let lines = |lines: Vec<String>| Value::List(lines.into_iter().map(Value::from).collect());
        map.insert("uses", lines(self.uses.iter().map(Use::to_string).collect()));
        map.insert("obstacles", lines(self.obstacles.iter().map(Obstacle::to_string).collect()));
        map
    }
}

/// Errors of its log that are shown.
const ERRORS: usize = 4;

fn print_health(reported: &health::Report) {
    let health = &reported.health;
    outln!("    health: {health}");
    let bytes =
        |units: u128| size::human(units.saturating_mul(512_000).min(u64::MAX.into()) as u64);
    outln!(
        "    in its life: {} written, {} read, {} hours, {} errors logged",
        bytes(health.units_written),
        bytes(health.units_read),
        health.power_on_hours,
        health.error_entries
    );
    for error in reported.errors.iter().take(ERRORS) {
        outln!("    {error}");
    }
}

fn health_json(reported: &health::Report) -> Map {
    let health = &reported.health;
    let number = |number: u128| Value::from(number.min(u64::MAX.into()) as u64);
    let small = |number: u8| Value::from(u64::from(number));
    let errors = reported.errors.iter().map(|error| {
        Value::Map(Map::from_iter([
            ("number", Value::from(error.number)),
            ("queue", u64::from(error.queue).into()),
            ("status", u64::from(error.status.code()).into()),
            ("nsid", u64::from(error.namespace).into()),
            ("block", error.lba.into()),
        ]))
    });
    Map::from_iter([
        ("critical-warning", small(health.warnings)),
        ("temperature-kelvin", u64::from(health.temperature).into()),
        ("spare-percent", small(health.spare)),
        ("spare-threshold-percent", small(health.spare_threshold)),
        ("used-percent", small(health.used)),
        ("data-units-read", number(health.units_read)),
        ("data-units-written", number(health.units_written)),
        ("power-on-hours", number(health.power_on_hours)),
        ("power-cycles", number(health.power_cycles)),
        ("unsafe-shutdowns", number(health.unsafe_shutdowns)),
        ("media-errors", number(health.media_errors)),
        ("logged-errors", number(health.error_entries)),
        ("errors", Value::List(errors.collect())),
    ])
}
