//! Headers of replies to commands (simple, and those of chunks), and what chunks carry.

use super::fields::{Fields, Put};
use super::{ChunkFlags, Headers, MAX_EXTENTS, Malformed, cut};

pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
pub const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
pub const EXTENDED_MAGIC: u32 = 0x6e8a_278c;
pub const SIMPLE_LEN: usize = 16;
pub const STRUCTURED_LEN: usize = 20;
pub const EXTENDED_LEN: usize = 32;
/// Bytes of a data chunk's payload before its data: the offset.
pub const DATA_PREFIX: usize = 8;

/// Types of chunks.
pub const CHUNK_NONE: u16 = 0;
pub const CHUNK_OFFSET_DATA: u16 = 1;
pub const CHUNK_OFFSET_HOLE: u16 = 2;
pub const CHUNK_BLOCK_STATUS: u16 = 5;
pub const CHUNK_BLOCK_STATUS_EXT: u16 = 6;
/// Set in all that are errors.
pub const CHUNK_ERR: u16 = 1 << 15;
pub const CHUNK_ERROR: u16 = CHUNK_ERR | 1;
pub const CHUNK_ERROR_OFFSET: u16 = CHUNK_ERR | 2;

/// The header of a reply, whichever kind it is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    Simple(Simple),
    Chunk(Chunk),
}

/// The whole of a reply, before the data of a read that has not failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Simple {
    /// An error's number on the wire; 0: none.
    pub error: u32,
    pub cookie: u64,
}

/// The header of one chunk of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Flags that nobody knows are kept.
    pub flags: ChunkFlags,
    pub kind: u16,
    pub cookie: u64,
    /// The request's, with extended headers; otherwise 0.
    pub offset: u64,
    /// Bytes of payload.
    pub length: u64,
}

impl Headers {
    /// Bytes of the longest header of a reply. A simple one is shorter: see [`Reply::len_by_magic`].
    pub const fn reply_len(self) -> usize {
        match self {
            Headers::Simple => SIMPLE_LEN,
            Headers::Structured => STRUCTURED_LEN,
            Headers::Extended => EXTENDED_LEN,
        }
    }
}

impl Reply {
    /// Bytes of a header that begins with these.
    ///
    /// # Errors
    /// None begins so, or none that was agreed on.
    pub fn len_by_magic(headers: Headers, begin: [u8; 4]) -> Result<usize, Malformed> {
        match (headers, u32::from_be_bytes(begin)) {
            (Headers::Simple | Headers::Structured, SIMPLE_MAGIC) => Ok(SIMPLE_LEN),
            (Headers::Structured, STRUCTURED_MAGIC) => Ok(STRUCTURED_LEN),
            (Headers::Extended, EXTENDED_MAGIC) => Ok(EXTENDED_LEN),
            (_, magic) => {
                Err(Malformed(format!("a reply begins with {magic:#x}, which was not agreed on")))
            }
        }
    }

    /// Reads a header, whose length [`Reply::len_by_magic`] tells.
    ///
    /// # Errors
    /// It is of a kind that was not agreed on, or of another length.
    pub fn decode(headers: Headers, bytes: &[u8]) -> Result<Reply, Malformed> {
        let mut fields = Fields::new("a reply", bytes);
        let magic = fields.u32()?;
        Reply::len_by_magic(headers, magic.to_be_bytes())?;
        let reply = if magic == SIMPLE_MAGIC {
            Reply::Simple(Simple { error: fields.u32()?, cookie: fields.u64()? })
        } else {
            let flags = ChunkFlags::from_bits_retain(fields.u16()?);
            let (kind, cookie) = (fields.u16()?, fields.u64()?);
            let (offset, length) = match headers {
                Headers::Extended => (fields.u64()?, fields.u64()?),
                Headers::Simple | Headers::Structured => (0, fields.u32()?.into()),
            };
            Reply::Chunk(Chunk { flags, kind, cookie, offset, length })
        };
        fields.end()?;
        Ok(reply)
    }
}

impl Simple {
    pub fn encode(self) -> [u8; SIMPLE_LEN] {
        Put::new().u32(SIMPLE_MAGIC).u32(self.error).u64(self.cookie).done()
    }
}

impl Chunk {
    /// The header with a length of 32 bits, which must be enough.
    pub fn encode_structured(&self) -> [u8; STRUCTURED_LEN] {
        debug_assert!(self.length <= u32::MAX.into());
        let put = Put::new().u32(STRUCTURED_MAGIC).u16(self.flags.bits()).u16(self.kind);
        put.u64(self.cookie).u32(self.length as u32).done()
    }

    pub fn encode_extended(&self) -> [u8; EXTENDED_LEN] {
        let put = Put::new().u32(EXTENDED_MAGIC).u16(self.flags.bits()).u16(self.kind);
        put.u64(self.cookie).u64(self.offset).u64(self.length).done()
    }

    pub fn is_last(&self) -> bool {
        self.flags.contains(ChunkFlags::DONE)
    }

    pub fn is_error(&self) -> bool {
        self.kind & CHUNK_ERR != 0
    }
}

/// The payload of a chunk of the type [`CHUNK_OFFSET_HOLE`]: bytes that read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hole {
    pub offset: u64,
    pub length: u32,
}

impl Hole {
    pub const LEN: usize = 12;

    /// # Errors
    /// It has another length, or is empty.
    pub fn decode(bytes: &[u8]) -> Result<Hole, Malformed> {
        let mut fields = Fields::new("a hole", bytes);
        let hole = Hole { offset: fields.u64()?, length: fields.u32()? };
        fields.end()?;
        match hole.length {
            0 => Err(Malformed("a hole is empty".into())),
            _ => Ok(hole),
        }
    }

    pub fn encode(self) -> [u8; Hole::LEN] {
        Put::new().u64(self.offset).u32(self.length).done()
    }
}

/// The payload of an error's chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ErrorChunk<'a> {
    /// On the wire, never 0.
    pub error: u32,
    /// For people. May be empty.
    pub message: &'a str,
    /// The first byte that it concerns.
    pub offset: Option<u64>,
}

impl<'a> ErrorChunk<'a> {
    /// Reads the payload of a chunk of type `kind`. Of types that nobody knows the beginning is the same.
    ///
    /// # Errors
    /// It is too short, says that there is no error, or has a message that is too long or no UTF-8.
    pub fn decode(kind: u16, bytes: &'a [u8]) -> Result<ErrorChunk<'a>, Malformed> {
        let mut fields = Fields::new("an error's chunk", bytes);
        let error = fields.u32()?;
        if error == 0 {
            return Err(Malformed("an error's chunk says that there is none".into()));
        }
        let len = fields.u16()?;
        let message = fields.string(len.into())?;
        let offset = match kind {
            CHUNK_ERROR_OFFSET => Some(fields.u64()?),
            _ => None,
        };
        if matches!(kind, CHUNK_ERROR | CHUNK_ERROR_OFFSET) {
            fields.end()?;
        }
        Ok(ErrorChunk { error, message, offset })
    }

    /// The payload of a chunk of the type [`ErrorChunk::kind`]. A message that is too long is cut.
    pub fn encode(&self) -> Vec<u8> {
        let message = cut(self.message);
        let mut bytes = self.error.to_be_bytes().to_vec();
        bytes.extend((message.len() as u16).to_be_bytes());
        bytes.extend(message.as_bytes());
        bytes.extend(self.offset.iter().flat_map(|offset| offset.to_be_bytes()));
        bytes
    }

    pub fn kind(&self) -> u16 {
        if self.offset.is_some() { CHUNK_ERROR_OFFSET } else { CHUNK_ERROR }
    }
}

/// One extent of block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// In bytes. The last one of a chunk may go beyond what was asked about.
    pub length: u64,
    /// Their meaning is the context's.
    pub flags: u64,
}

/// The payload of a chunk of block status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The context's.
    pub id: u32,
    /// At least one, none of them empty.
    pub extents: Vec<Extent>,
}

impl Status {
    /// Reads the payload of a chunk of type `kind`, [`CHUNK_BLOCK_STATUS`] or [`CHUNK_BLOCK_STATUS_EXT`].
    ///
    /// # Errors
    /// Lengths do not fit together; there are no extents, too many, or empty ones.
    pub fn decode(kind: u16, bytes: &[u8]) -> Result<Status, Malformed> {
        let mut fields = Fields::new("block status", bytes);
        let id = fields.u32()?;
        let wide = kind == CHUNK_BLOCK_STATUS_EXT;
        let told = if wide { Some(fields.u32()? as usize) } else { None };
        let size = if wide { 16 } else { 8 };
        let count = fields.len() / size;
        if count == 0 || count > MAX_EXTENTS || told.is_some_and(|told| told != count) {
            let told = told.unwrap_or(count);
            return Err(Malformed(format!(
                "block status has {told} extents in {} bytes",
                fields.len()
            )));
        }
        let mut extents = Vec::with_capacity(count);
        for _ in 0..count {
            let extent = match wide {
                true => Extent { length: fields.u64()?, flags: fields.u64()? },
                false => Extent { length: fields.u32()?.into(), flags: fields.u32()?.into() },
            };
            if extent.length == 0 {
                return Err(Malformed("block status has an empty extent".into()));
            }
            extents.push(extent);
        }
        fields.end()?;
        Ok(Status { id, extents })
    }

    /// The payload of a chunk of type `kind`. Lengths and flags must fit into it.
    pub fn encode(&self, kind: u16) -> Vec<u8> {
        let mut bytes = self.id.to_be_bytes().to_vec();
        if kind == CHUNK_BLOCK_STATUS_EXT {
            bytes.extend((self.extents.len() as u32).to_be_bytes());
        }
        for &Extent { length, flags } in &self.extents {
            if kind == CHUNK_BLOCK_STATUS_EXT {
                bytes.extend(length.to_be_bytes());
                bytes.extend(flags.to_be_bytes());
            } else {
                debug_assert!(length <= u32::MAX.into() && flags <= u32::MAX.into());
                bytes.extend((length as u32).to_be_bytes());
                bytes.extend((flags as u32).to_be_bytes());
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests;
