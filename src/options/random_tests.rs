//! Tests with random trees, which must survive a round trip, and random text, which must break no parser.
//!
//! `VUBLK_SEED` repeats a run; the seed is printed when one fails.

use fastrand::Rng;

use super::*;

/// Runs `check` on `rounds` generators and names the seed of the one that failed.
fn with_seeds(rounds: u64, check: impl Fn(&mut Rng) + std::panic::RefUnwindSafe) {
    let given = std::env::var("VUBLK_SEED").ok().map(|s| s.parse().expect("VUBLK_SEED: a number"));
    let first = given.unwrap_or(1u64);
    let rounds = if given.is_some() { 1 } else { rounds };
    for seed in (0..rounds).map(|i| first.wrapping_add(i)) {
        let outcome = std::panic::catch_unwind(|| check(&mut Rng::with_seed(seed)));
        if let Err(panic) = outcome {
            eprintln!("failed with VUBLK_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

fn any_text(rng: &mut Rng) -> String {
    let alphabet = ['a', 'Z', ',', '=', '.', '{', '"', '\\', '\n', '\u{1}', ' ', 'é', '😀', '0'];
    (0..rng.usize(..6)).map(|_| alphabet[rng.usize(..alphabet.len())]).collect()
}

fn name(rng: &mut Rng) -> String {
    let tail: String =
        (0..rng.usize(..4)).map(|_| *rng.choice(b"a1-_Z").unwrap() as char).collect();
    format!("{}{tail}", rng.alphabetic())
}

/// A tree as JSON can hold it (`typed`), or as keyval can: text only, nothing empty.
fn tree(rng: &mut Rng, depth: usize, typed: bool) -> Value {
    let least = usize::from(!typed);
    match rng.u8(..if depth == 0 { 6 } else { 8 }) {
        _ if !typed && depth == 0 => Value::Text(any_text(rng)),
        0..=5 if !typed => Value::Text(any_text(rng)),
        0 => Value::Null,
        1 => Value::Bool(rng.bool()),
        2 => Value::Int(rng.i64(..).into()),
        3 => Value::Int(rng.u64(..).into()),
        4 => Value::Num(f64::from(rng.i16(..)) / 4.0),
        5 => Value::Str(any_text(rng)),
        6 => Value::List((least..rng.usize(1..4)).map(|_| tree(rng, depth - 1, typed)).collect()),
        _ => Value::Map(object(rng, depth - 1, typed, least)),
    }
}

fn object(rng: &mut Rng, depth: usize, typed: bool, least: usize) -> Map {
    let keys = rng.usize(least..4);
    (0..keys).map(|_| (name(rng), tree(rng, depth, typed))).collect()
}

#[test]
fn every_tree_survives_json() {
    with_seeds(3000, |rng| {
        let before = tree(rng, 5, true);
        let text = json::to_text(&before);
        assert_eq!(json::parse(&text).as_ref(), Ok(&before), "{text}");
        let theirs: serde_json::Value = serde_json::from_str(&text).expect("valid JSON");
        assert_eq!(json::parse(&theirs.to_string()), Ok(before), "{text}");

        // Serde_json rounds such numbers, so this one is ours alone.
        let number = Value::Num((rng.f64() - 0.5) * 10f64.powi(rng.i32(-300..300)));
        assert_eq!(json::parse(&json::to_text(&number)), Ok(number));
    });
}

#[test]
fn every_tree_of_text_survives_keyval_and_every_tree_survives_flattening() {
    with_seeds(3000, |rng| {
        let mut before = object(rng, 4, false, 0);
        remove_empty_lists(&mut before);
        let flat = before.clone().flatten().unwrap();
        let escape = |v: &Value| v.as_str().unwrap().replace(',', ",,");
        let text: Vec<_> = flat.iter().map(|(k, v)| format!("{k}={}", escape(v))).collect();
        let text = text.join(",");
        assert_eq!(keyval::parse(&text, None).unwrap().options, before, "{text}");
        assert_eq!(flat.crumple().as_ref(), Ok(&before), "{text}");

        let typed = object(rng, 4, true, 0);
        assert_eq!(typed.clone().flatten().unwrap().crumple(), Ok(typed));
    });
}

/// Keyval has no spelling for an empty list or object.
fn remove_empty_lists(map: &mut Map) {
    fn clean(value: Value) -> Option<Value> {
        match value {
            Value::Map(m) => {
                let m: Map = m.into_iter().filter_map(|(k, v)| Some((k, clean(v)?))).collect();
                (!m.is_empty()).then_some(Value::Map(m))
            }
            Value::List(l) => {
                let l: Vec<_> = l.into_iter().filter_map(clean).collect();
                (!l.is_empty()).then_some(Value::List(l))
            }
            plain => Some(plain),
        }
    }
    *map = match clean(Value::Map(std::mem::take(map))) {
        Some(Value::Map(m)) => m,
        _ => Map::new(),
    };
}

#[test]
fn our_json_reader_accepts_what_serde_json_accepts() {
    // No single quotes: ours takes them, as QEMU does.
    let pieces = r#"{ } [ ] , : "a" "b\n" "\u00e9" "\ud83d" "\ude00" 1 - 0 .5 e3 E+ true null ""#;
    let pieces: Vec<_> = pieces.split(' ').chain([" "]).collect();
    with_seeds(20_000, |rng| {
        let text: String = (0..rng.usize(..9)).map(|_| pieces[rng.usize(..pieces.len())]).collect();
        match (json::parse(&text), serde_json::from_str::<serde_json::Value>(&text)) {
            (Ok(ours), Err(theirs)) => panic!("{text}: {ours:?} but {theirs}"),
            (Err(e), Ok(_)) => assert!(e.to_string().contains("duplicate key"), "{text}: {e}"),
            _ => {}
        }
    });
}

#[test]
fn no_text_breaks_a_parser_and_every_error_is_one_line() {
    let pieces = "driver a = , ,, . 0 1 { } [ ] \" ' : \\u d800 \\ json: file: nbd: / help no - k \
                  9999999999999999999 é \0 on __ _ 1.5 E";
    let pieces: Vec<_> = pieces.split(' ').chain([" ", "\n"]).collect();
    with_seeds(20_000, |rng| {
        let text: String =
            (0..rng.usize(..12)).map(|_| pieces[rng.usize(..pieces.len())]).collect();
        let one_line = |e: Error| assert!(!e.to_string().contains('\n'), "{text:?}: {e}");
        let implied = rng.bool().then_some("driver");
        match keyval::parse_argument(&text, implied) {
            Ok(parsed) => {
                from_map::<Anything>(parsed.options).map(|_| ()).unwrap_or_else(one_line);
            }
            Err(e) => one_line(e),
        }
        match qemuopts::parse(&text, implied) {
            Ok(parsed) => parsed.options.crumple().map(|_| ()).unwrap_or_else(one_line),
            Err(e) => one_line(e),
        }
        if let Err(e) = filename::json_options(&text) {
            one_line(e);
        }
        if let Err(e) = filename::resolve(&text, "a") {
            one_line(e);
        }
        if let Ok(value) = json::parse(&text) {
            from_value::<Anything>(value).map(|_| ()).unwrap_or_else(one_line);
        }
        if let Ok(bytes) = size::parse(&text) {
            size::human(bytes);
        }
    });
}

#[derive(serde::Deserialize, Default)]
#[serde(default)]
#[allow(dead_code)] // Read only for what reading does.
struct Anything {
    driver: String,
    a: Option<Vec<Value>>,
    file: Option<NodeRefOrNull>,
    on: Option<Size>,
}

#[test]
fn long_text_is_read_in_linear_time_or_refused() {
    // 256 KiB of each: anything quadratic would take minutes.
    let n = tree::MAX_TEXT / 16;
    let many = |piece: &str| piece.repeat(n / piece.len());
    for text in [many("a"), many(","), many("a=,"), many("a."), many(",,a"), many("a.0=1,")] {
        let _ = keyval::parse(&text, Some("driver"));
        let _ = keyval::parse(&format!("a={text}"), None);
        let _ = qemuopts::parse(&text, None);
        let _ = filename::split_protocol(&text);
        let _ = filename::json_options(&format!("json:{text}"));
        let _ = size::parse(&text);
    }
    for text in [many("["), many("\"a\":"), many("\\u0041"), many("9"), many(" "), many("[],")] {
        let _ = json::parse(&text);
        let _ = json::parse(&format!("[\"{text}\"]"));
        let _ = json::parse(&format!("[{text}1]"));
        let _ = json::parse(&format!("{{{text}"));
    }
    let numbers = "9".repeat(n);
    assert!(size::parse(&numbers).is_err());
    assert!(json::parse(&"9".repeat(tree::MAX_TEXT + 1)).is_err());
}
