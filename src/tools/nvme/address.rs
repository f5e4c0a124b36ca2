//! The PCI address of a function, as `lspci -D` writes it.

use std::fmt;
use std::str::FromStr;

/// A PCI function: `0000:01:00.0` is domain, bus, device and function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl FromStr for Address {
    type Err = String;

    /// Takes an address as `lspci` prints it, with or without the domain.
    fn from_str(text: &str) -> Result<Address, String> {
        parse(text).ok_or_else(|| {
            format!("{text:?} is not the address of a PCI function, such as 0000:01:00.0")
        })
    }
}

fn parse(text: &str) -> Option<Address> {
    let (rest, function) = text.split_once('.')?;
    let mut parts = rest.rsplit(':');
    let device = hex(parts.next()?, 2).filter(|&device| device < 32)?;
    let bus = hex(parts.next()?, 2)?;
    let domain = parts.next().map_or(Some(0), |text| hex(text, 8))?;
    let function = hex(function, 1).filter(|&function| function < 8)?;
    let whole = parts.next().is_none();
    whole.then_some(Address {
        domain,
        bus: bus as u8,
        device: device as u8,
        function: function as u8,
    })
}

/// A number of one to `most` hexadecimal digits.
fn hex(text: &str, most: usize) -> Option<u32> {
    let digits = (1..=most).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    digits.then(|| u32::from_str_radix(text, 16).ok())?
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Address { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_lspci_prints_them() {
        for (text, shown) in [
            ("0000:01:00.0", "0000:01:00.0"),
            ("3b:1F.7", "0000:3b:1f.7"),
            ("10000:e1:00.0", "10000:e1:00.0"),
            ("1:2.3", "0000:01:02.3"),
        ] {
            assert_eq!(text.parse::<Address>().map(|a| a.to_string()), Ok(shown.to_owned()));
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "01:00",
            "01:20.0",
            "01:00.8",
            "0000:01:00.0.0",
            "0:0:0:0.0",
            "+1:00.0",
            "../../../etc",
            "/dev/nvme0n1",
            "0000:001:00.0",
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert!(error.contains("is not the address of a PCI function"), "{error}");
        }
    }
}
