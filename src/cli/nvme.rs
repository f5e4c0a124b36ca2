//! `vublk nvme`: this machine's NVMe controllers, and giving them to processes and back.

use crate::options::{Map, Value, json, size};
use crate::tools::nvme::{
    self, Address, Controller, Function, Group, Machine, Namespace, Obstacle, Use, limits,
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
    /// List controllers, who has them, and what keeps each from being used
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
    /// Say more: identity, IOMMU group, limits
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
                    println!("{}: {VFIO}: nvme://{0}/1", controller.address, VFIO = nvme::VFIO_PCI);
                }
                Ok(())
            }
            Command::Unbind { addresses } => {
                for address in addresses {
                    let controller = nvme::unbind(&machine, address)?;
                    match controller.driver {
                        Some(driver) => println!("{address}: {driver}"),
                        None => println!("{address}: no driver took it: modprobe nvme"),
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
        let found: Vec<_> =
            controllers.into_iter().map(|controller| Found::new(machine, controller)).collect();
        match self.output {
            Output::Human if found.is_empty() => println!("no NVMe controllers"),
            Output::Human => {
                for found in &found {
                    found.print(machine, self.verbose);
                }
            }
            Output::Json => {
                let list = found.iter().map(|found| Value::Map(found.json())).collect();
                println!("{}", json::to_pretty_text(&Value::List(list)));
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
}

impl Found {
    fn new(machine: &Machine, controller: Controller) -> Found {
        let uses = nvme::uses(machine, &controller);
        let obstacles = nvme::obstacles(machine, &controller, &[]);
        Found { controller, uses, obstacles }
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
        println!("{address}  {name}, {driver}, {of_group}");
        for Namespace { id, disk, bytes, block_size, zoned } in namespaces {
            let zoned = if *zoned { ", zoned" } else { "" };
            let bytes = size::human(*bytes);
            println!("    namespace {id}: {disk}, {bytes}, blocks of {block_size} bytes{zoned}");
        }
        if verbose {
            self.print_more(machine);
        }
        for used in &self.uses {
            println!("    in use: {used}");
        }
        for obstacle in &self.obstacles {
            println!("    {obstacle}");
        }
        match self.state() {
            "ready" => println!("    ready: nvme://{address}/1"),
            "free" => println!("    free: vublk nvme bind {address}"),
            _ => {}
        }
    }

    fn print_more(&self, machine: &Machine) {
        let Controller { driver_override, group, identity, numa_node, .. } = &self.controller;
        println!("    ids: {}", self.ids());
        if let Some(identity) = identity {
            println!("    firmware: {}", identity.firmware);
        }
        if let Some(node) = numa_node {
            println!("    NUMA node: {node}");
        }
        if let Some(driver) = driver_override {
            println!("    driver_override: {driver}");
        }
        let Some(Group { number, functions }) = group else { return };
        for Function { address, class, driver } in functions {
            let driver = driver.as_deref().unwrap_or("none");
            println!("    in the group: {address}, class {class:06x}, driver {driver}");
        }
        for (first, last, kind) in limits::reserved_regions(machine, *number) {
            println!("    not to be mapped: {first:#x} to {last:#x} ({kind})");
        }
        if let Some(most) = limits::dma_entries(machine) {
            println!("    DMA mappings: at most {most}");
        }
        match limits::locked_memory() {
            Some(bytes) => {
                println!("    locked memory: at most {} (ulimit -l)", size::human(bytes))
            }
            None => println!("    locked memory: any (ulimit -l)"),
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
