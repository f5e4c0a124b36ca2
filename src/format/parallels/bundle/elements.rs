//! XML as descriptors need it: elements and the text in them, no deeper than a limit, without declarations of any kind.

use crate::block::Error;
use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// Elements in each other.
const DEPTH: usize = 16;

/// What is met in a text: the names of elements below the first one.
pub enum Met<'a> {
    /// An element begins.
    Begin(&'a [&'a str]),
    /// An element ends that has no other in it, and this text.
    Leaf(&'a [&'a str], &'a str),
}

fn wrong(what: &str) -> Error {
    Error::new(format!("The Parallels disk descriptor makes no sense: {what}"))
}

fn line(error: impl std::fmt::Display) -> Error {
    let text: String = error.to_string().chars().take(200).collect();
    wrong(&text.escape_debug().to_string())
}

/// Goes through the elements of a text whose first element is `root`, telling `hear` what is met below that; returns its
/// version.
///
/// # Errors
/// The text is not well-formed, or has another first element, or `hear` fails.
pub fn for_each_leaf(
    text: &[u8],
    root: &str,
    mut hear: impl FnMut(Met<'_>) -> Result<(), Error>,
) -> Result<Option<String>, Error> {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    let text = std::str::from_utf8(text).map_err(|_| wrong("it is not encoded in UTF-8"))?;
    let mut reader = Reader::from_str(text);
    reader.config_mut().expand_empty_elements = true;
    let mut path: Vec<String> = Vec::new();
    let mut version = None;
    // The text of the element that began last, until another begins or it ends.
    let mut leaf: Option<String> = None;
    let mut is_over = false;
    loop {
        match reader.read_event().map_err(line)? {
            Event::Start(element) => {
                if path.len() == DEPTH {
                    return Err(wrong("its elements are too deep in each other"));
                }
                let name = element.name().as_ref().to_owned();
                if path.is_empty() {
                    if is_over || name != root {
                        return Err(wrong(&format!("it is not one element '{root}'")));
                    }
                    version = attribute(&element, "Version")?;
                }
                path.push(name);
                hear(Met::Begin(&below(&path)))?;
                leaf = Some(String::new());
            }
            Event::End(_) => {
                if let Some(text) = leaf.take() {
                    hear(Met::Leaf(&below(&path), text.trim_ascii()))?;
                }
                path.pop();
                is_over = path.is_empty();
            }
            Event::Text(text) => push(&mut leaf, &text),
            Event::CData(text) => push(&mut leaf, &text),
            Event::GeneralRef(reference) => {
                let number = reference.resolve_char_ref().map_err(line)?;
                let known = match &*reference {
                    "amp" => Some('&'),
                    "lt" => Some('<'),
                    "gt" => Some('>'),
                    "quot" => Some('"'),
                    "apos" => Some('\''),
                    _ => None,
                };
                let Some(char) = number.or(known) else {
                    return Err(wrong("it refers to an entity that XML does not have"));
                };
                push(&mut leaf, char.encode_utf8(&mut [0; 4]));
            }
            Event::DocType(_) => return Err(wrong("it declares a type of document")),
            Event::Eof if is_over => return Ok(version),
            Event::Eof => return Err(wrong("it ends in the middle")),
            Event::Decl(_) | Event::PI(_) | Event::Comment(_) => {}
            Event::Empty(_) => {}
        }
    }
}

fn push(leaf: &mut Option<String>, text: &str) {
    if let Some(leaf) = leaf {
        leaf.push_str(text);
    }
}

/// The names of elements below the first.
fn below(path: &[String]) -> Vec<&str> {
    path.iter().skip(1).map(String::as_str).collect()
}

fn attribute(element: &BytesStart<'_>, name: &str) -> Result<Option<String>, Error> {
    for attribute in element.attributes() {
        let attribute = attribute.map_err(line)?;
        if attribute.key.as_ref() == name {
            return Ok(Some(attribute.value.to_string()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves(text: &str) -> Result<Vec<(String, String)>, Error> {
        let mut leaves = Vec::new();
        for_each_leaf(text.as_bytes(), "a", |met| {
            if let Met::Leaf(path, text) = met {
                leaves.push((path.join("/"), text.to_owned()));
            }
            Ok(())
        })?;
        Ok(leaves)
    }

    #[test]
    fn elements_and_the_text_in_them_are_met() {
        let found = leaves(
            "<?xml version='1.0'?><!-- x --><a><b> 1 </b><c><d/><e>&lt;&#65;<![CDATA[<]]></e></c></a>",
        );
        let found = found.unwrap();
        let wanted = [("b", "1"), ("c/d", ""), ("c/e", "<A<")];
        assert_eq!(found, wanted.map(|(path, text)| (path.to_owned(), text.to_owned())));
    }

    #[test]
    fn what_is_not_well_formed_or_too_deep_is_refused_in_one_line() {
        let deep = "<a>".repeat(1000);
        for text in [
            "",
            "<b/>",
            "<a>",
            "<a></b>",
            "<a/><a/>",
            "<a>&x;</a>",
            "<!DOCTYPE a [<!ENTITY x 'y'>]><a/>",
            &deep,
        ] {
            let error = leaves(text).unwrap_err().to_string();
            assert!(!error.contains('\n') && error.len() < 400, "{error}");
        }
    }
}
