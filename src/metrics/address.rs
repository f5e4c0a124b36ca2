//! `--metrics`: the address that metrics are served at, within the host only (there are no passwords).

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// A place to listen at, or to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Unix(PathBuf),
    /// Of the loopback interface.
    Tcp(SocketAddr),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path.is_empty() {
                true => Err("unix: wants a path".into()),
                false => Ok(Address::Unix(path.into())),
            };
        }
        let address: SocketAddr = text
            .parse()
            .map_err(|_| format!("'{text}' is neither unix:PATH nor ADDRESS:PORT in numbers"))?;
        if !address.ip().is_loopback() {
            return Err(format!(
                "'{text}' is not an address of the loopback interface, and metrics are offered on no \
                 other"
            ));
        }
        Ok(Address::Tcp(address))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Tcp(address) => write!(f, "{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_can_be_offered_metrics() {
        for good in ["unix:/run/m.sock", "127.0.0.1:9100", "127.8.8.8:0", "[::1]:9100"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for bad in ["0.0.0.0:9100", "[::]:9100", "192.168.1.1:1", "[::ffff:127.0.0.1]:1"] {
            let error = bad.parse::<Address>().unwrap_err();
            assert!(error.contains("not an address of the loopback"), "{error}");
        }
        for bad in ["", "unix:", "9100", "localhost:9100", "127.0.0.1", "127.0.0.1:99999", "/a"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }
}
