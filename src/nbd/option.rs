//! What options and their replies carry.

use super::fields::{Fields, Put};
use super::{ExportFlags, MAX_MINIMUM_BLOCK, Malformed};

/// Types of information about an export.
pub const INFO_EXPORT: u16 = 0;
pub const INFO_NAME: u16 = 1;
pub const INFO_DESCRIPTION: u16 = 2;
pub const INFO_BLOCK_SIZE: u16 = 3;

/// What `INFO` and `GO` carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Go<'a> {
    pub name: &'a str,
    /// Types of information that the client asks for.
    pub wanted: Vec<u16>,
}

impl<'a> Go<'a> {
    /// # Errors
    /// Lengths do not fit together, or the name is too long or no UTF-8.
    pub fn decode(bytes: &'a [u8]) -> Result<Go<'a>, Malformed> {
        let mut fields = Fields::new("a request for an export", bytes);
        let name = fields.counted_string()?;
        let count = fields.u16()?;
        let wanted = fields.bytes(2 * usize::from(count))?;
        fields.end()?;
        let wanted = wanted.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
        Ok(Go { name, wanted: wanted.collect() })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = counted(self.name);
        bytes.extend((self.wanted.len() as u16).to_be_bytes());
        bytes.extend(self.wanted.iter().flat_map(|kind| kind.to_be_bytes()));
        bytes
    }
}

/// What `LIST_META_CONTEXT` and `SET_META_CONTEXT` carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaQueries<'a> {
    pub export: &'a str,
    pub queries: Vec<&'a str>,
}

impl<'a> MetaQueries<'a> {
    /// # Errors
    /// Lengths do not fit together, or a string is too long or no UTF-8.
    pub fn decode(bytes: &'a [u8]) -> Result<MetaQueries<'a>, Malformed> {
        let mut fields = Fields::new("a query for contexts", bytes);
        let export = fields.counted_string()?;
        let count = fields.u32()?;
        let mut queries = Vec::new();
        // Each takes at least four bytes, so that the count cannot ask for more than is there.
        for _ in 0..count {
            queries.push(fields.counted_string()?);
        }
        fields.end()?;
        Ok(MetaQueries { export, queries })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = counted(self.export);
        bytes.extend((self.queries.len() as u32).to_be_bytes());
        bytes.extend(self.queries.iter().flat_map(|query| counted(query)));
        bytes
    }
}

/// A string behind its length.
fn counted(string: &str) -> Vec<u8> {
    let mut bytes = (string.len() as u32).to_be_bytes().to_vec();
    bytes.extend(string.as_bytes());
    bytes
}

/// The block sizes of an export, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    pub minimum: u32,
    pub preferred: u32,
    /// Of the data that a request carries.
    pub maximum: u32,
}

/// One piece of information about an export: what a reply of the type `REP_INFO` carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Info<'a> {
    /// The size in bytes, and what it is and can do.
    Export(u64, ExportFlags),
    Name(&'a str),
    Description(&'a str),
    BlockSize(BlockSizes),
    /// Of another type, which may be ignored.
    Other(u16),
}

impl<'a> Info<'a> {
    /// # Errors
    /// It is too short or too long for its type, or block sizes are none.
    pub fn decode(bytes: &'a [u8]) -> Result<Info<'a>, Malformed> {
        let mut fields = Fields::new("information about an export", bytes);
        match fields.u16()? {
            INFO_EXPORT => {
                let (size, flags) = (fields.u64()?, fields.u16()?);
                fields.end()?;
                Ok(Info::Export(size, ExportFlags::from_bits_retain(flags)))
            }
            INFO_NAME => fields.last_string().map(Info::Name),
            INFO_DESCRIPTION => fields.last_string().map(Info::Description),
            INFO_BLOCK_SIZE => {
                let minimum = fields.u32()?;
                let preferred = fields.u32()?;
                let maximum = fields.u32()?;
                fields.end()?;
                BlockSizes { minimum, preferred, maximum }.check().map(Info::BlockSize)
            }
            other => Ok(Info::Other(other)),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let string = |kind: u16, string: &str| [&kind.to_be_bytes(), string.as_bytes()].concat();
        match *self {
            Info::Export(size, flags) => {
                Put::<12>::new().u16(INFO_EXPORT).u64(size).u16(flags.bits()).done().to_vec()
            }
            Info::Name(name) => string(INFO_NAME, name),
            Info::Description(text) => string(INFO_DESCRIPTION, text),
            Info::BlockSize(BlockSizes { minimum, preferred, maximum }) => {
                let put = Put::<14>::new().u16(INFO_BLOCK_SIZE);
                put.u32(minimum).u32(preferred).u32(maximum).done().to_vec()
            }
            Info::Other(kind) => kind.to_be_bytes().to_vec(),
        }
    }
}

impl BlockSizes {
    /// What the protocol says of block sizes.
    fn check(self) -> Result<BlockSizes, Malformed> {
        let BlockSizes { minimum, preferred, maximum } = self;
        let at_most = |what: &str, size: u32, most: u32| {
            Malformed(format!("the {what} block size {size} is beyond {most}"))
        };
        if !minimum.is_power_of_two() {
            return Err(Malformed(format!("the minimum block size {minimum} is no power of two")));
        }
        if minimum > MAX_MINIMUM_BLOCK {
            return Err(at_most("minimum", minimum, MAX_MINIMUM_BLOCK));
        }
        if !preferred.is_power_of_two() || preferred < minimum {
            return Err(Malformed(format!(
                "the preferred block size {preferred} is no power of two of at least {minimum}"
            )));
        }
        if maximum < minimum || (maximum != u32::MAX && maximum % minimum != 0) {
            return Err(Malformed(format!(
                "the maximum block size {maximum} is no multiple of the minimum {minimum}"
            )));
        }
        Ok(self)
    }
}

/// An export as a reply of the type `REP_SERVER` lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed<'a> {
    pub name: &'a str,
    /// For people. May be empty.
    pub description: &'a str,
}

impl<'a> Listed<'a> {
    /// # Errors
    /// Lengths do not fit together, or a string is too long or no UTF-8.
    pub fn decode(bytes: &'a [u8]) -> Result<Listed<'a>, Malformed> {
        let mut fields = Fields::new("an entry of the list of exports", bytes);
        let name = fields.counted_string()?;
        Ok(Listed { name, description: fields.last_string()? })
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = counted(self.name);
        bytes.extend(self.description.as_bytes());
        bytes
    }
}

/// A context as a reply of the type `REP_META_CONTEXT` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context<'a> {
    /// How chunks of block status name it.
    pub id: u32,
    pub name: &'a str,
}

impl<'a> Context<'a> {
    /// # Errors
    /// It is too short, or the name is too long or no UTF-8.
    pub fn decode(bytes: &'a [u8]) -> Result<Context<'a>, Malformed> {
        let mut fields = Fields::new("a context", bytes);
        Ok(Context { id: fields.u32()?, name: fields.last_string()? })
    }

    pub fn encode(&self) -> Vec<u8> {
        [&self.id.to_be_bytes(), self.name.as_bytes()].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::super::MAX_STRING;
    use super::*;

    #[test]
    fn what_options_carry_goes_there_and_back() {
        let go = Go { name: "vol", wanted: vec![INFO_BLOCK_SIZE, INFO_NAME] };
        assert_eq!(go.encode(), b"\0\0\0\x03vol\0\x02\0\x03\0\x01");
        assert_eq!(Go::decode(&go.encode()), Ok(go));
        let queries = MetaQueries { export: "", queries: vec!["base:", "qemu:dirty-bitmap:b"] };
        assert_eq!(MetaQueries::decode(&queries.encode()), Ok(queries));
        let listed = Listed { name: "vol", description: "for people" };
        assert_eq!(Listed::decode(&listed.encode()), Ok(listed));
        let context = Context { id: 7, name: "base:allocation" };
        assert_eq!(Context::decode(&context.encode()), Ok(context));
        let sizes = BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 };
        for info in [
            Info::Export(1 << 40, ExportFlags::all()),
            Info::Name("vol"),
            Info::Description(""),
            Info::BlockSize(sizes),
            Info::Other(99),
        ] {
            assert_eq!(Info::decode(&info.encode()), Ok(info));
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        let whole = Go { name: "vol", wanted: vec![3] }.encode();
        for len in 0..whole.len() {
            Go::decode(&whole[..len]).unwrap_err();
        }
        let long = [&whole[..], b"x"].concat();
        assert!(Go::decode(&long).unwrap_err().to_string().ends_with("is 1 bytes too long"));
        let huge = Go::decode(b"\xff\xff\xff\xffvol\0\0").unwrap_err().to_string();
        assert!(huge.contains("a string of 4294967295 bytes"), "{huge}");
        let name = "n".repeat(MAX_STRING + 1);
        Go::decode(&Go { name: &name, wanted: vec![] }.encode()).unwrap_err();
        Go::decode(&Go { name: &name[1..], wanted: vec![] }.encode()).unwrap();
        // Four thousand million queries, of which none is there.
        MetaQueries::decode(b"\0\0\0\0\xff\xff\xff\xff").unwrap_err();
        Listed::decode(b"\0\0\0\x02\xff\xfe").unwrap_err();
    }

    #[test]
    fn block_sizes_that_are_none_are_refused() {
        let decode = |minimum, preferred, maximum| {
            Info::decode(&Info::BlockSize(BlockSizes { minimum, preferred, maximum }).encode())
                .is_ok()
        };
        assert!(decode(512, 4096, 32 << 20) && decode(4096, 4096, u32::MAX));
        assert!(!decode(0, 4096, 1 << 20) && !decode(3, 4096, 1 << 20));
        assert!(!decode(128 << 10, 128 << 10, 1 << 20));
        assert!(!decode(4096, 512, 1 << 20) && !decode(4096, 4096, 4095));
        assert!(!decode(4096, 4096, 6000));
    }
}
