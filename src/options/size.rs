//! Sizes as QEMU writes them: `64k` and `1.5G` in, `1.5 GiB` out. All units are powers of 1024.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Visitor};

/// A size in bytes as a field of an option struct.
///
/// From text it takes suffixes (`64k`); JSON must give a plain number that is not negative.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

impl Size {
    /// How [`super::de`] recognises the type.
    pub(super) const TOKEN: &'static str = "$size";
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl Visitor<'_> for Bytes {
            type Value = Size;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size in bytes")
            }
            fn visit_u64<E>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }
        }
        deserializer.deserialize_newtype_struct(Size::TOKEN, Bytes)
    }
}

/// Why a text is no size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadSize {
    /// It is no number, or has a suffix that is no unit, or is negative.
    NotASize,
    /// It is 2^64 bytes or more.
    OutOfRange,
}

impl fmt::Display for BadSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BadSize::NotASize => "expects a non-negative number below 2^64",
            BadSize::OutOfRange => "is out of range",
        })
    }
}

impl std::error::Error for BadSize {}

/// Reads a size in bytes; a number without a suffix is bytes.
pub fn parse(text: &str) -> Result<u64, BadSize> {
    parse_with_unit(text, 'B')
}

/// Reads a size; a number without a suffix counts `default_unit`, one of `bBkKmMgGtTpPeE`.
///
/// Decimal, with a fraction where a unit above bytes follows (`1.5k`), or hexadecimal (`0x200`).
/// The nearest byte is taken, halves upwards.
pub fn parse_with_unit(text: &str, default_unit: char) -> Result<u64, BadSize> {
    let text = text.trim_ascii_start();
    let text = text.strip_prefix('+').unwrap_or(text);
    let (whole, fraction, rest) = match strip_0x(text) {
        Some(hex) => {
            let (digits, rest) = split_while(hex, |b| b.is_ascii_hexdigit());
            // `b` and `B` are digits here, so bytes need no suffix and other units stand apart.
            (number(digits, 16)?, "", rest)
        }
        None => {
            let (digits, rest) = split_while(text, |b| b.is_ascii_digit());
            let (fraction, rest) = match rest.strip_prefix('.') {
                Some(tail) => split_while(tail, |b| b.is_ascii_digit()),
                None => ("", rest),
            };
            (number(digits, 10)?, fraction, rest)
        }
    };
    let mut suffix = rest.chars();
    let unit = suffix.next().unwrap_or(default_unit);
    if suffix.next().is_some() {
        return Err(BadSize::NotASize);
    }
    let shift = shift_of(unit).ok_or(BadSize::NotASize)?;
    let whole = whole.ok_or(BadSize::OutOfRange)?;
    let part = fraction_of(fraction, shift)?;
    let bytes = (u128::from(whole) << shift) + u128::from(part);
    u64::try_from(bytes).map_err(|_| BadSize::OutOfRange)
}

fn strip_0x(text: &str) -> Option<&str> {
    text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"))
}

fn split_while(text: &str, keep: impl Fn(u8) -> bool) -> (&str, &str) {
    let n = text.bytes().take_while(|&b| keep(b)).count();
    text.split_at(n)
}

/// `Ok(None)` where there are digits, but too many of them.
fn number(digits: &str, radix: u32) -> Result<Option<u64>, BadSize> {
    if digits.is_empty() {
        return Err(BadSize::NotASize);
    }
    Ok(u64::from_str_radix(digits, radix).ok())
}

fn shift_of(unit: char) -> Option<u32> {
    Some(match unit.to_ascii_uppercase() {
        'B' => 0,
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        'P' => 50,
        'E' => 60,
        _ => return None,
    })
}

/// The decimal fraction `0.digits` of `1 << shift`, rounded. Bytes have no fraction but zero.
fn fraction_of(digits: &str, shift: u32) -> Result<u64, BadSize> {
    // 19 digits decide the byte of an exbibyte; what follows only could move an exact half.
    let digits = &digits[..digits.len().min(19)];
    if digits.bytes().all(|b| b == b'0') {
        return Ok(0);
    }
    if shift == 0 {
        return Err(BadSize::NotASize);
    }
    let scale = 10u128.pow(digits.len() as u32);
    let parts: u128 = digits.parse().map_err(|_| BadSize::NotASize)?;
    let rounded = ((parts << shift) + scale / 2) / scale;
    u64::try_from(rounded).map_err(|_| BadSize::OutOfRange)
}

/// The size with three significant digits and a unit, as `qemu-img info` prints it: `512 B`,
/// `1.18 MiB`, `0.977 GiB`. The unit changes at 1000, and `999.5` rounds to `1e+03`, as there.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    // bytes / 1024^unit >= 1000, without rounding.
    while u128::from(bytes) >= 1000u128 << (10 * unit) {
        unit += 1;
    }
    let scaled = bytes as f64 / (1u64 << (10 * unit)) as f64;
    format!("{} {}", three_digits(scaled), UNITS[unit])
}

/// C's `%0.3g`, for numbers from 0 up to 1000.
fn three_digits(n: f64) -> String {
    let scientific = format!("{n:.2e}");
    let (mantissa, exponent) = scientific.split_once('e').expect("the e format has an exponent");
    let exponent: i32 = exponent.parse().expect("the exponent is a number");
    if exponent >= 3 {
        return format!("{}e+{exponent:02}", trim_zeroes(mantissa));
    }
    let decimals = (2 - exponent).clamp(0, 6) as usize;
    trim_zeroes(&format!("{n:.decimals$}")).to_owned()
}

fn trim_zeroes(number: &str) -> &str {
    if !number.contains('.') {
        return number;
    }
    number.trim_end_matches('0').trim_end_matches('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        for (text, wanted) in [
            ("0", 0),
            ("1", 1),
            ("1b", 1),
            ("1B", 1),
            ("0b", 0),
            ("010", 10),
            ("+3", 3),
            (" 3", 3),
            ("1k", 1 << 10),
            ("1K", 1 << 10),
            ("1m", 1 << 20),
            ("1G", 1 << 30),
            ("1t", 1 << 40),
            ("1P", 1 << 50),
            ("1E", 1 << 60),
            ("1.5k", 1536),
            ("1.25G", 1342177280),
            ("1.0001k", 1024),
            ("1.0005k", 1025),
            ("1.9999k", 2048),
            ("0.0001k", 0),
            ("5.", 5),
            ("5.k", 5120),
            ("1.0", 1),
            ("1.000b", 1),
            ("1.5E", 1729382256910270464),
            ("0x10", 16),
            ("0X10k", 16384),
            ("0x10b", 0x10b),
            ("9223372036854775807", i64::MAX as u64),
            ("18446744073709551615", u64::MAX),
            ("1.99999999999999999999999999999999999999k", 2048),
        ] {
            assert_eq!(parse(text), Ok(wanted), "{text}");
        }
        assert_eq!(parse_with_unit("5", 'M'), Ok(5 << 20));
        assert_eq!(parse_with_unit("5k", 'M'), Ok(5 << 10));
    }

    #[test]
    fn what_is_no_size_is_reported_from_what_is_too_big() {
        for text in [
            "", "k", "abc", "-1", "-0", "-1k", ".5k", "0.1", "1.5", "1.5b", "1e3", "1E3", "1e3k",
            "0x", "0xk", "0x1.8k", "1 ", "1 k", "1kk", "1KiB", "1Q", "1,5k", "inf", "nan", "１",
        ] {
            assert_eq!(parse(text), Err(BadSize::NotASize), "{text}");
        }
        for text in ["16E", "99E", "18446744073709551616", "15.99999999999999999999E"] {
            assert_eq!(parse(text), Err(BadSize::OutOfRange), "{text}");
        }
    }

    #[test]
    fn sizes_are_printed_with_three_digits_and_a_unit() {
        for (bytes, wanted) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (1000448, "977 KiB"),
            (1023488, "1e+03 KiB"),
            (1024000, "0.977 MiB"),
            (1047040, "0.999 MiB"),
            (1234944, "1.18 MiB"),
            (10000384, "9.54 MiB"),
            (10 << 20, "10 MiB"),
            (1000000000, "954 MiB"),
            (1048063488, "1e+03 MiB"),
            (1063004672, "0.99 GiB"),
            (1342177280, "1.25 GiB"),
            (10 << 30, "10 GiB"),
            (1 << 60, "1 EiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human(bytes), wanted, "{bytes}");
        }
    }
}
