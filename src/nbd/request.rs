//! Headers of commands: compact ones, and extended ones with lengths of 64 bits.

use super::fields::{Fields, Put};
use super::{CommandFlags, Headers, Malformed};

/// Commands.
pub const CMD_READ: u16 = 0;
pub const CMD_WRITE: u16 = 1;
pub const CMD_DISC: u16 = 2;
pub const CMD_FLUSH: u16 = 3;
pub const CMD_TRIM: u16 = 4;
pub const CMD_CACHE: u16 = 5;
pub const CMD_WRITE_ZEROES: u16 = 6;
pub const CMD_BLOCK_STATUS: u16 = 7;

pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub const COMPACT_LEN: usize = 28;
pub const EXTENDED_LEN: usize = 32;

/// The header of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Flags that nobody knows are kept.
    pub flags: CommandFlags,
    pub command: u16,
    /// Returned in the reply as it is.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
    /// In bytes: of the range, or of the payload ([`CommandFlags::PAYLOAD_LEN`]). Compact headers have 32 bits for it.
    pub length: u64,
}

impl Headers {
    /// Bytes of a command's header.
    pub const fn request_len(self) -> usize {
        match self {
            Headers::Extended => EXTENDED_LEN,
            Headers::Simple | Headers::Structured => COMPACT_LEN,
        }
    }
}

impl Request {
    /// Reads a header of [`Headers::request_len`] bytes.
    ///
    /// # Errors
    /// It has another magic or another length.
    pub fn decode(headers: Headers, bytes: &[u8]) -> Result<Request, Malformed> {
        let mut fields = Fields::new("a request", bytes);
        let extended = headers == Headers::Extended;
        let wanted = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let magic = fields.u32()?;
        if magic != wanted {
            return Err(Malformed::magic("a request", magic.into(), wanted.into()));
        }
        let request = Request {
            flags: CommandFlags::from_bits_retain(fields.u16()?),
            command: fields.u16()?,
            cookie: fields.u64()?,
            offset: fields.u64()?,
            length: if extended { fields.u64()? } else { fields.u32()?.into() },
        };
        fields.end()?;
        Ok(request)
    }

    /// The compact header. The length must have at most 32 bits.
    pub fn encode_compact(&self) -> [u8; COMPACT_LEN] {
        debug_assert!(self.length <= u32::MAX.into());
        let put = Put::new().u32(REQUEST_MAGIC).u16(self.flags.bits()).u16(self.command);
        put.u64(self.cookie).u64(self.offset).u32(self.length as u32).done()
    }

    pub fn encode_extended(&self) -> [u8; EXTENDED_LEN] {
        let put = Put::new().u32(EXTENDED_REQUEST_MAGIC).u16(self.flags.bits()).u16(self.command);
        put.u64(self.cookie).u64(self.offset).u64(self.length).done()
    }

    /// Bytes of payload that follow the header.
    pub fn payload_len(&self, headers: Headers) -> u64 {
        let says_so =
            headers == Headers::Extended && self.flags.contains(CommandFlags::PAYLOAD_LEN);
        if self.command == CMD_WRITE || says_so { self.length } else { 0 }
    }
}

/// A command's name in messages.
pub fn command_name(command: u16) -> &'static str {
    match command {
        CMD_READ => "read",
        CMD_WRITE => "write",
        CMD_DISC => "disconnect",
        CMD_FLUSH => "flush",
        CMD_TRIM => "trim",
        CMD_CACHE => "cache",
        CMD_WRITE_ZEROES => "write zeroes",
        CMD_BLOCK_STATUS => "block status",
        _ => "<unknown>",
    }
}

/// The payload of a `BLOCK_STATUS` that names the contexts that it wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatusQuery {
    /// Bytes of the disk that are asked about.
    pub length: u64,
    /// The contexts.
    pub ids: Vec<u32>,
}

impl StatusQuery {
    /// # Errors
    /// It has a length that none can have.
    pub fn decode(bytes: &[u8]) -> Result<StatusQuery, Malformed> {
        let mut fields = Fields::new("a query of block status", bytes);
        let length = fields.u64()?;
        let mut ids = Vec::with_capacity(fields.len() / 4);
        while fields.len() > 0 {
            ids.push(fields.u32()?);
        }
        Ok(StatusQuery { length, ids })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.length.to_be_bytes().to_vec();
        bytes.extend(self.ids.iter().flat_map(|id| id.to_be_bytes()));
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_go_there_and_back() {
        let request = Request {
            flags: CommandFlags::FUA | CommandFlags::from_bits_retain(0x8000),
            command: CMD_WRITE,
            cookie: 0x0102_0304_0506_0708,
            offset: 1 << 40,
            length: 4096,
        };
        let compact = request.encode_compact();
        assert_eq!(&compact[..8], b"\x25\x60\x95\x13\x80\x01\x00\x01");
        assert_eq!(Request::decode(Headers::Simple, &compact), Ok(request));
        assert_eq!(Request::decode(Headers::Structured, &compact), Ok(request));
        let long = Request { length: 1 << 35, ..request };
        assert_eq!(Request::decode(Headers::Extended, &long.encode_extended()), Ok(long));
        Request::decode(Headers::Extended, &compact).unwrap_err();
        Request::decode(Headers::Simple, &long.encode_extended()).unwrap_err();
        Request::decode(Headers::Simple, &compact[..27]).unwrap_err();
    }

    #[test]
    fn payload_follows_writes_and_what_says_so() {
        let request = |command, flags| Request { flags, command, cookie: 0, offset: 0, length: 9 };
        let write = request(CMD_WRITE, CommandFlags::empty());
        let status = request(CMD_BLOCK_STATUS, CommandFlags::PAYLOAD_LEN);
        let lens = [Headers::Simple, Headers::Structured, Headers::Extended]
            .map(|headers| (write.payload_len(headers), status.payload_len(headers)));
        assert_eq!(lens, [(9, 0), (9, 0), (9, 9)]);
        let query = StatusQuery { length: 1 << 40, ids: vec![1, 3] };
        assert_eq!(StatusQuery::decode(&query.encode()), Ok(query.clone()));
        StatusQuery::decode(&query.encode()[..13]).unwrap_err();
    }
}
