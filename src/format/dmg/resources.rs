//! The tables of chunks ("mish") among an image's resources: in a resource fork, or in base64 in a property list.

use crate::block::Error;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use quick_xml::Reader;
use quick_xml::events::Event;

/// How a table begins. Other resources are passed over.
const MAGIC: &[u8] = b"mish";

/// The tables in a resource fork: its header says where its data is, which is one resource behind the other, each
/// behind its length.
///
/// # Errors
/// Something does not fit in.
pub fn tables_of_fork(fork: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
    let u32_at = |at: usize| Some(u32::from_be_bytes(*fork.get(at..)?.first_chunk()?) as usize);
    let outside = || Error::new("The data of the resource fork is outside of it");
    let (start, len) = u32_at(0).zip(u32_at(8)).ok_or_else(outside)?;
    let end = start.checked_add(len).filter(|&end| end <= fork.len()).ok_or_else(outside)?;
    let mut tables = Vec::new();
    let mut at = start;
    while at < end {
        let resource = u32_at(at).and_then(|len| fork[..end].get(at + 4..)?.get(..len));
        let resource = resource.ok_or_else(|| {
            Error::new(format!("The resource at {at:#x} does not fit into the resource fork"))
        })?;
        if resource.starts_with(MAGIC) {
            tables.push(resource.to_vec());
        }
        at += 4 + resource.len();
    }
    Ok(tables)
}

/// The tables in a property list: in its data elements, wherever they are.
///
/// # Errors
/// It is no XML, or the data no base64.
pub fn tables_of_list(list: &[u8]) -> Result<Vec<Vec<u8>>, Error> {
    let text = std::str::from_utf8(list)
        .map_err(|_| Error::new("The property list is not encoded in UTF-8"))?;
    let mut reader = Reader::from_str(text);
    // It would keep the names of all elements that are open.
    reader.config_mut().check_end_names = false;
    let mut tables = Vec::new();
    // What a data element has so far.
    let mut data: Option<String> = None;
    loop {
        let event = reader.read_event().map_err(|error| {
            let at = reader.error_position();
            Error::new(format!("The property list makes no sense at {at}: {error}"))
        })?;
        match event {
            Event::Start(element) if element.name().as_ref() == "data" => {
                data = Some(String::new());
            }
            Event::Text(text) => {
                if let Some(data) = &mut data {
                    data.extend(text.split_ascii_whitespace());
                }
            }
            Event::End(element) if element.name().as_ref() == "data" => {
                let Some(data) = data.take() else { continue };
                let bytes = STANDARD.decode(data);
                let bytes = bytes.map_err(|error| {
                    Error::new(format!("Data of the property list is no base64: {error}"))
                })?;
                if bytes.starts_with(MAGIC) {
                    tables.push(bytes);
                }
            }
            Event::Eof => return Ok(tables),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_found_in_data_elements_wherever_they_are() {
        let list = "<?xml version=\"1.0\"?><plist><dict><key>blkx</key><array><dict><data>\n\t bWlz\n\
                    aDE=\n</data></dict><data>QUJD</data><data/></array></dict></plist>";
        assert_eq!(tables_of_list(list.as_bytes()), Ok(vec![b"mish1".to_vec()]));
        for wrong in ["<data>bWlz!</data>", "<data", "<data>bWlz"] {
            let found = tables_of_list(wrong.as_bytes());
            assert!(found.is_err() || found == Ok(Vec::new()), "{wrong}: {found:?}");
        }
        assert!(tables_of_list(b"\xff").is_err());
    }

    #[test]
    fn resources_that_do_not_fit_into_the_fork_are_refused() {
        let fork = |len: u32, resource: u32| {
            let header = [16, 0, len, 0].map(u32::to_be_bytes).concat();
            [header, resource.to_be_bytes().to_vec(), b"mish12".to_vec()].concat()
        };
        assert_eq!(tables_of_fork(&fork(10, 6)), Ok(vec![b"mish12".to_vec()]));
        assert_eq!(tables_of_fork(&fork(0, 6)), Ok(Vec::new()));
        for (len, resource) in [(10, 7), (11, 6), (10, 5), (10, u32::MAX), (u32::MAX, 6)] {
            assert!(tables_of_fork(&fork(len, resource)).is_err(), "{len} {resource}");
        }
        assert!(tables_of_fork(&[0; 11]).is_err());
    }
}
