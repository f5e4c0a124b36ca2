//! The handshake: the server's greeting, the client's flags, the headers of options and of their replies.

use super::fields::{Fields, Put};
use super::{ClientFlags, ExportFlags, Malformed, ServerFlags};

/// "NBDMAGIC", before all else.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": the server knows options; and before each of the client's options.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// The server knows no options.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
pub const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Options.
pub const OPT_EXPORT_NAME: u32 = 1;
pub const OPT_ABORT: u32 = 2;
pub const OPT_LIST: u32 = 3;
pub const OPT_STARTTLS: u32 = 5;
pub const OPT_INFO: u32 = 6;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED_REPLY: u32 = 8;
pub const OPT_LIST_META_CONTEXT: u32 = 9;
pub const OPT_SET_META_CONTEXT: u32 = 10;
pub const OPT_EXTENDED_HEADERS: u32 = 11;

/// Types of replies to options.
pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
pub const REP_META_CONTEXT: u32 = 4;
/// Set in all that are errors.
pub const REP_ERR: u32 = 1 << 31;
pub const REP_ERR_UNSUP: u32 = REP_ERR | 1;
pub const REP_ERR_POLICY: u32 = REP_ERR | 2;
pub const REP_ERR_INVALID: u32 = REP_ERR | 3;
pub const REP_ERR_PLATFORM: u32 = REP_ERR | 4;
pub const REP_ERR_TLS_REQD: u32 = REP_ERR | 5;
pub const REP_ERR_UNKNOWN: u32 = REP_ERR | 6;
pub const REP_ERR_SHUTDOWN: u32 = REP_ERR | 7;
pub const REP_ERR_BLOCK_SIZE_REQD: u32 = REP_ERR | 8;
pub const REP_ERR_TOO_BIG: u32 = REP_ERR | 9;
pub const REP_ERR_EXT_HEADER_REQD: u32 = REP_ERR | 10;

/// Bytes of the two magic numbers that every server begins with.
pub const GREETING_LEN: usize = 16;
/// Bytes of a newstyle server's whole greeting.
pub const NEWSTYLE_GREETING_LEN: usize = 18;
/// Bytes of what an oldstyle server says after the magic numbers.
pub const OLDSTYLE_LEN: usize = 136;
pub const OPTION_LEN: usize = 16;
pub const OPTION_REPLY_LEN: usize = 20;
/// Zeroes after the reply to `EXPORT_NAME`, unless both sides leave them out.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// Bytes of that reply without the zeroes.
pub const EXPORT_NAME_REPLY_LEN: usize = 10;

/// An option's name in messages, in QEMU's words.
pub fn option_name(option: u32) -> &'static str {
    match option {
        OPT_EXPORT_NAME => "export name",
        OPT_ABORT => "abort",
        OPT_LIST => "list",
        4 => "peek",
        OPT_STARTTLS => "starttls",
        OPT_INFO => "info",
        OPT_GO => "go",
        OPT_STRUCTURED_REPLY => "structured reply",
        OPT_LIST_META_CONTEXT => "list meta context",
        OPT_SET_META_CONTEXT => "set meta context",
        OPT_EXTENDED_HEADERS => "extended headers",
        _ => "<unknown>",
    }
}

/// The name of a reply's type in messages.
pub fn reply_name(kind: u32) -> &'static str {
    match kind {
        REP_ACK => "ack",
        REP_SERVER => "server",
        REP_INFO => "info",
        REP_META_CONTEXT => "meta context",
        REP_ERR_UNSUP => "unsupported",
        REP_ERR_POLICY => "denied by policy",
        REP_ERR_INVALID => "invalid",
        REP_ERR_PLATFORM => "platform lacks support",
        REP_ERR_TLS_REQD => "TLS required",
        REP_ERR_UNKNOWN => "export unknown",
        REP_ERR_SHUTDOWN => "server shutting down",
        REP_ERR_BLOCK_SIZE_REQD => "block size required",
        REP_ERR_TOO_BIG => "option payload too big",
        REP_ERR_EXT_HEADER_REQD => "extended headers required",
        _ => "<unknown>",
    }
}

/// How a server negotiates, by its first [`GREETING_LEN`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Flags of 16 bits follow.
    Newstyle,
    /// [`OLDSTYLE_LEN`] bytes follow, and then requests.
    Oldstyle,
}

/// Reads how a server greets.
///
/// # Errors
/// It is no NBD server.
pub fn style(bytes: &[u8; GREETING_LEN]) -> Result<Style, Malformed> {
    let mut fields = Fields::new("the server's greeting", bytes);
    let magic = fields.u64()?;
    if magic != NBD_MAGIC {
        return Err(Malformed::magic("the server's greeting", magic, NBD_MAGIC));
    }
    match fields.u64()? {
        IHAVEOPT => Ok(Style::Newstyle),
        OLDSTYLE_MAGIC => Ok(Style::Oldstyle),
        other => Err(Malformed(format!("the server greets with an unknown magic {other:#x}"))),
    }
}

/// The greeting of a newstyle server.
pub fn greeting(flags: ServerFlags) -> [u8; NEWSTYLE_GREETING_LEN] {
    Put::new().u64(NBD_MAGIC).u64(IHAVEOPT).u16(flags.bits()).done()
}

/// What an oldstyle server says after the magic numbers: the size in bytes, and the flags.
pub fn oldstyle(bytes: &[u8; OLDSTYLE_LEN]) -> Result<(u64, ExportFlags), Malformed> {
    let mut fields = Fields::new("an oldstyle greeting", bytes);
    let size = fields.u64()?;
    let flags = fields.u32()?;
    // The upper half is global flags, of which none has a meaning.
    Ok((size, ExportFlags::from_bits_retain(flags as u16)))
}

/// A server's flags, which follow its greeting.
pub fn server_flags(bytes: [u8; 2]) -> ServerFlags {
    ServerFlags::from_bits_retain(u16::from_be_bytes(bytes))
}

/// The client's answer to a newstyle greeting.
pub fn client_flags(flags: ClientFlags) -> [u8; 4] {
    flags.bits().to_be_bytes()
}

/// Reads that answer.
///
/// # Errors
/// A flag is not known, so that its meaning cannot be obeyed.
pub fn read_client_flags(bytes: [u8; 4]) -> Result<ClientFlags, Malformed> {
    let bits = u32::from_be_bytes(bytes);
    ClientFlags::from_bits(bits)
        .ok_or_else(|| Malformed(format!("the client's flags {bits:#x} are not known")))
}

/// The header of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    pub option: u32,
    /// Bytes that follow.
    pub len: u32,
}

impl OptionHeader {
    /// # Errors
    /// It has another magic.
    pub fn decode(bytes: &[u8; OPTION_LEN]) -> Result<OptionHeader, Malformed> {
        let mut fields = Fields::new("an option", bytes);
        let magic = fields.u64()?;
        if magic != IHAVEOPT {
            return Err(Malformed::magic("an option", magic, IHAVEOPT));
        }
        Ok(OptionHeader { option: fields.u32()?, len: fields.u32()? })
    }

    pub fn encode(self) -> [u8; OPTION_LEN] {
        Put::new().u64(IHAVEOPT).u32(self.option).u32(self.len).done()
    }
}

/// The header of a reply to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// The option that is replied to.
    pub option: u32,
    pub kind: u32,
    /// Bytes that follow.
    pub len: u32,
}

impl OptionReply {
    /// # Errors
    /// It has another magic.
    pub fn decode(bytes: &[u8; OPTION_REPLY_LEN]) -> Result<OptionReply, Malformed> {
        let mut fields = Fields::new("a reply to an option", bytes);
        let magic = fields.u64()?;
        if magic != REPLY_MAGIC {
            return Err(Malformed::magic("a reply to an option", magic, REPLY_MAGIC));
        }
        Ok(OptionReply { option: fields.u32()?, kind: fields.u32()?, len: fields.u32()? })
    }

    pub fn encode(self) -> [u8; OPTION_REPLY_LEN] {
        Put::new().u64(REPLY_MAGIC).u32(self.option).u32(self.kind).u32(self.len).done()
    }

    pub fn is_error(self) -> bool {
        self.kind & REP_ERR != 0
    }
}

/// The reply to `EXPORT_NAME`, which is no [`OptionReply`]: the size in bytes, and the flags.
pub fn export_name_reply(size: u64, flags: ExportFlags) -> [u8; EXPORT_NAME_REPLY_LEN] {
    Put::new().u64(size).u16(flags.bits()).done()
}

/// Reads it.
pub fn read_export_name_reply(bytes: &[u8; EXPORT_NAME_REPLY_LEN]) -> (u64, ExportFlags) {
    let [size @ .., high, low] = *bytes;
    (u64::from_be_bytes(size), ExportFlags::from_bits_retain(u16::from_be_bytes([high, low])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_tells_the_style() {
        let greeting = greeting(ServerFlags::all());
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let begin: &[u8; 16] = greeting.first_chunk().unwrap();
        assert_eq!(style(begin), Ok(Style::Newstyle));
        assert_eq!(server_flags([greeting[16], greeting[17]]), ServerFlags::all());
        let mut old = *begin;
        old[8..].copy_from_slice(&OLDSTYLE_MAGIC.to_be_bytes());
        assert_eq!(style(&old), Ok(Style::Oldstyle));
        old[15] ^= 1;
        assert!(style(&old).is_err());
        let ssh = style(b"SSH-2.0-OpenSSH_").unwrap_err().to_string();
        assert!(ssh.contains("0x5353482d322e302d"), "{ssh}");
        let mut said = [0; OLDSTYLE_LEN];
        said[7] = 9;
        said[11] = 3;
        let flags = ExportFlags::HAS_FLAGS | ExportFlags::READ_ONLY;
        assert_eq!(oldstyle(&said), Ok((9, flags)));
    }

    #[test]
    fn headers_of_options_and_replies_go_there_and_back() {
        let option = OptionHeader { option: OPT_GO, len: 7 };
        assert_eq!(OptionHeader::decode(&option.encode()), Ok(option));
        let reply = OptionReply { option: OPT_GO, kind: REP_ERR_POLICY, len: 0 };
        assert_eq!(OptionReply::decode(&reply.encode()), Ok(reply));
        assert!(reply.is_error());
        let mut bytes = option.encode();
        bytes[0] ^= 0x80;
        assert!(OptionHeader::decode(&bytes).is_err());
        let mut bytes = reply.encode();
        bytes[7] ^= 1;
        assert!(OptionReply::decode(&bytes).is_err());
        let flags = ExportFlags::HAS_FLAGS | ExportFlags::SEND_FLUSH;
        assert_eq!(read_export_name_reply(&export_name_reply(1 << 40, flags)), (1 << 40, flags));
    }

    #[test]
    fn flags_of_a_client_that_nobody_knows_are_refused() {
        assert_eq!(read_client_flags([0, 0, 0, 3]), Ok(ClientFlags::all()));
        assert_eq!(client_flags(ClientFlags::all()), [0, 0, 0, 3]);
        let error = read_client_flags([0, 0, 0, 5]).unwrap_err().to_string();
        assert_eq!(error, "the client's flags 0x5 are not known");
    }
}
