//! Tests of the JSON reader: accepted input, refused input, and messages.

use super::*;

#[test]
fn every_kind_of_value_is_read_and_written() {
    for (given, wanted) in [
        ("null", "null"),
        (" [ true , false ]\n", "[true, false]"),
        ("{}", "{}"),
        ("[]", "[]"),
        ("-0", "0"),
        ("18446744073709551615", "18446744073709551615"),
        ("-9223372036854775808", "-9223372036854775808"),
        ("9007199254740993", "9007199254740993"),
        ("1.0", "1.0"),
        ("1e3", "1000.0"),
        ("18446744073709551616", "1.8446744073709552e19"),
        (r#"{"a":{"b":[1,"x"]}}"#, r#"{"a": {"b": [1, "x"]}}"#),
        (r#"{'a':'it"s'}"#, r#"{"a": "it\"s"}"#),
        (r#""\"\\\/\b\f\n\r\t\'""#, r#""\"\\/\b\f\n\r\t'""#),
        (r#""é😀\u00e9\ud83d\ude00""#, r#""\u00E9\uD83D\uDE00\u00E9\uD83D\uDE00""#),
        (r#""\u007f\u0001""#, r#""\u007F\u0001""#),
    ] {
        assert_eq!(to_text(&parse(given).unwrap()), wanted, "{given}");
    }
}

#[test]
fn pretty_text_is_indented_and_means_the_same() {
    let value = parse(r#"{"a":[1,{"b":[]}],"c":{}}"#).unwrap();
    let text = to_pretty_text(&value);
    let lines = [
        "{",
        "    \"a\": [",
        "        1,",
        "        {",
        "            \"b\": [",
        "            ]",
        "        }",
        "    ],",
        "    \"c\": {}",
        "}",
    ];
    assert_eq!(text, lines.join("\n"));
    assert_eq!(parse(&text).unwrap(), value);
}

#[test]
fn bad_json_is_refused_in_qemus_words() {
    for (given, wanted) in [
        ("", "Expecting a JSON value"),
        ("  ", "Expecting a JSON value"),
        ("{", "JSON parse error, premature EOI"),
        (r#"{"a":"b""#, "JSON parse error, premature EOI"),
        (r#"{"a":1} x"#, "Expecting at most one JSON value"),
        (r#"{"a":1}}"#, "Expecting at most one JSON value"),
        (r#"{"a":1}{"a":1}"#, "Expecting at most one JSON value"),
        (r#"{"a":1,"a":2}"#, "JSON parse error, duplicate key"),
        ("{1:2}", "JSON parse error, key is not a string in object"),
        ("{,}", "JSON parse error, expecting value"),
        ("{]", "JSON parse error, expecting value"),
        (r#"{"a":}"#, "JSON parse error, expecting value"),
        (r#"{"a":1,}"#, "JSON parse error, expecting value"),
        ("[1,]", "JSON parse error, expecting value"),
        (r#"{"a" 1}"#, "JSON parse error, missing : in object pair"),
        ("[1 2]", "JSON parse error, expected separator in list"),
        (r#"{"a":1 "b":2}"#, "JSON parse error, expected separator in dict"),
        ("bogus", "JSON parse error, invalid keyword 'bogus'"),
        (r#""\x""#, "JSON parse error, invalid escape sequence in string"),
        (r#""\ud800""#, "JSON parse error, \\ud800 is not a valid Unicode character"),
        (r#""\ud800\u0041""#, "JSON parse error, \\ud800 is not a valid Unicode character"),
        (r#""\udc00""#, "JSON parse error, \\udc00 is not a valid Unicode character"),
        (r#""\u0000""#, "JSON parse error, \\u0000 is not a valid Unicode character"),
        ("\"a", "JSON parse error, stray '\"a'"),
        ("01", "JSON parse error, stray '01'"),
        ("-", "JSON parse error, stray '-'"),
        ("[-0123]", "JSON parse error, stray '-01'"),
        ("[1.é]", "JSON parse error, stray '1.é'"),
        ("1e999", "JSON parse error, number out of range"),
        ("&", "JSON parse error, stray '&'"),
    ] {
        assert_eq!(parse(given).unwrap_err().to_string(), wanted, "{given}");
    }
}

#[test]
fn depth_and_keys_are_bounded() {
    let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
    assert!(parse(&nested(MAX_DEPTH)).is_ok());
    assert!(parse(&nested(MAX_DEPTH + 1)).is_err());
    assert!(parse(&"[".repeat(1 << 20)).is_err());
    let keys: Vec<_> = (0..2000).map(|i| format!("\"{i}\":1")).collect();
    assert!(parse(&format!("{{{}}}", keys.join(","))).is_err());
}

#[test]
fn a_tree_of_serde_json_converts_with_exact_integers() {
    let text = r#"{"a": [18446744073709551615, -5, 1.5, "x", null, true]}"#;
    let parsed: serde_json::Value = serde_json::from_str(text).unwrap();
    assert_eq!(Value::from(parsed), parse(text).unwrap());
}
