//! The list of options that new images take, for `-o help`.

use super::{Context, Failed, arguments, outln};
use crate::block::{CreateOption, ValueType, create_options};
use crate::drivers;

/// Prints the options of a format, and, if a file's name is there, those of its protocol.
pub fn print(context: &Context, format: &str, filename: Option<&str>) -> Result<(), Failed> {
    let registry = drivers::registry();
    let driver = arguments::format(format)?;
    let protocol = match filename {
        Some(name) => {
            let mut file = registry.new_file(name)?;
            registry.get(&file.take_required_str("driver").map_err(|e| e.to_string())?)
        }
        None => None,
    };
    let mut options = create_options(driver, protocol)?;
    options.retain(|option| !(option.is_newer && context.is_qemu_img()));
    match protocol {
        Some(_) => list("Supported options:", options),
        None => {
            list(&format!("Supported {format} options:"), options);
            outln!("\nThe protocol level may support further options.");
            outln!("Specify the target filename to include those options.");
        }
    }
    Ok(())
}

/// Prints the options of a format that `amend` can change.
pub fn print_amend(context: &Context, format: &str, options: &[CreateOption]) {
    let mut options = options.to_vec();
    options.retain(|option| !(option.is_newer && context.is_qemu_img()));
    list(&format!("Amend options for '{format}':"), options);
}

/// Prints options in the order of their names.
fn list(head: &str, mut options: Vec<CreateOption>) {
    options.sort_by_key(|option| option.name);
    outln!("{head}");
    for option in options {
        let value = match option.value {
            ValueType::Str | ValueType::Preallocation(_) => "str",
            ValueType::Bool => "bool (on/off)",
            ValueType::Size => "size",
            ValueType::Number => "num",
        };
        let head = format!("{}=<{value}>", option.name);
        match option.value {
            ValueType::Preallocation(modes) => {
                let modes: Vec<_> = modes.iter().map(|mode| mode.name()).collect();
                outln!("  {head:<22} - {} (allowed values: {})", option.help, modes.join(", "));
            }
            _ => outln!("  {head:<22} - {}", option.help),
        }
    }
}
