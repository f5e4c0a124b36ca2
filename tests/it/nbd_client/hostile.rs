//! Servers of every style, and servers that answer with what they must not.

use super::{by_hand, io, tool};
use std::time::{Duration, Instant};
use vublk_testkit::nbd::{MULTI_CONN, Setup, Style, Wrong};

const STYLES: [Style; 5] =
    [Style::Oldstyle, Style::Newstyle, Style::Simple, Style::Structured, Style::Extended];

#[test]
fn every_style_of_server_is_understood() {
    for style in STYLES {
        let place = by_hand(Setup::new(style));
        let commands = [
            "write -P 7 4096 70000",
            "write -P 9 -f 512 512",
            "write -z -u 8192 4096",
            "write -z 16384 512",
            "discard 32768 4096",
            "flush",
            "read -P 7 4096 4096",
            "read -P 0 8192 4096",
            "read -P 7 12288 4096",
            "read -P 0 100000 100000",
        ];
        let (ok, said) = io(&place.options(",discard=unmap"), &commands);
        assert!(ok && !said.contains("failed"), "{style:?}: {said}");
        let data = place.server.data();
        assert!(data[4096..8192].iter().all(|&byte| byte == 7), "{style:?}");
        assert!(data[8192..12288].iter().all(|&byte| byte == 0), "{style:?}");
        let known = place.server.commands();
        let flags = |command: u16, offset: u64| {
            known.iter().find(|one| one.0 == command && one.2 == offset).map(|one| one.1)
        };
        // FUA of a write; no hole unless it may be one; the payload's length with extended headers.
        let payload = if style == Style::Extended { 1 << 5 } else { 0 };
        assert_eq!(flags(1, 512), Some(1 | payload), "{style:?}");
        assert_eq!(flags(6, 8192), Some(0), "{style:?}");
        assert_eq!(flags(6, 16384), Some(2), "{style:?}");
        assert_eq!(flags(4, 32768), Some(0), "{style:?}");
        assert!(known.iter().any(|one| one.0 == 3), "{style:?}: no flush");
        assert_eq!(known.last().map(|one| one.0), Some(2), "{style:?}: it did not say goodbye");
    }
}

#[test]
fn maps_come_from_the_server_where_it_has_them() {
    for style in [Style::Structured, Style::Extended] {
        let place = by_hand(Setup::new(style));
        assert!(io(&place.options(""), &["write -P 7 4096 8192"]).0);
        let (ok, said) = tool("qemu-img", &["map", "-f", "raw", "--output=json", &place.name("")]);
        assert!(ok, "{said}");
        let starts = ["\"start\": 0,", "\"start\": 4096,", "\"start\": 12288,"];
        assert!(starts.iter().all(|start| said.contains(start)), "{style:?}: {said}");
        assert_eq!(said.matches("\"zero\": true").count(), 2, "{style:?}: {said}");
    }
}

#[test]
fn sizes_of_blocks_are_obeyed() {
    let sizes = Some([4096, 8192, 65536]);
    let place = by_hand(Setup { sizes, ..Setup::new(Style::Structured) });
    let commands = ["write -P 7 1000 200000", "read -P 7 1000 200000", "read -P 0 0 1000"];
    let (ok, said) = io(&place.options(""), &commands);
    assert!(ok && !said.contains("failed"), "{said}");
    for (command, _, offset, len) in place.server.commands() {
        let fits = offset % 4096 == 0 && len % 4096 == 0 && len <= 65536;
        assert!(command == 2 || command == 3 || fits, "{command} {offset} {len}");
    }
}

#[test]
fn a_disk_may_end_within_a_sector() {
    let place = by_hand(Setup { size: 70_001, ..Setup::new(Style::Simple) });
    let commands = ["write -P 7 69999 2", "read -P 7 69999 2", "read -P 0 0 69999"];
    let (ok, said) = io(&place.options(""), &commands);
    assert!(ok && !said.contains("failed"), "{said}");
    let data = place.server.data();
    assert_eq!(&data[69_998..], [0, 7, 7]);
}

#[test]
fn nonsense_costs_an_error_and_a_line_and_no_hang() {
    let wrongs = [
        Wrong::Cookie,
        Wrong::Long,
        Wrong::Outside,
        Wrong::Twice,
        Wrong::Short,
        Wrong::Endless,
        Wrong::Magic,
        Wrong::Half,
        Wrong::Silence,
    ];
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        for wrong in wrongs {
            // Simple replies can do but a few of them wrong.
            let is_told = style != Style::Simple
                || matches!(wrong, Wrong::Cookie | Wrong::Magic | Wrong::Half | Wrong::Silence);
            if !is_told {
                continue;
            }
            let place = by_hand(Setup { wrong, ..Setup::new(style) });
            let began = Instant::now();
            let read = ["write -P 7 0 1M", "read -P 7 4096 65536"];
            let (_, said) = io(&place.options(",io-timeout=1"), &read);
            assert!(
                said.contains("read failed: Input/output error"),
                "{style:?} {wrong:?}: {said}"
            );
            assert_eq!(said.matches("NBD server").count(), 1, "{style:?} {wrong:?}: {said}");
            assert!(began.elapsed() < Duration::from_secs(10), "{style:?} {wrong:?}");
            // With patience it is asked again, over another connection.
            let place = by_hand(Setup { wrong, ..Setup::new(style) });
            let options = place.options(",io-timeout=1,reconnect-delay=20");
            let (ok, said) = io(&options, &read);
            assert!(ok && !said.contains("failed"), "{style:?} {wrong:?}: {said}");
            assert_eq!(place.server.connections(), 2);
        }
    }
}

#[test]
fn what_was_answered_and_not_flushed_when_a_connection_is_lost_is_told_by_the_next_flush() {
    let setup = Setup { wrong: Wrong::Half, ..Setup::new(Style::Structured) };
    for (commands, told) in [
        (&["write -P 7 0 4096", "read 0 4096"][..], true),
        // The command itself prints nothing.
        (&["write -P 7 0 4096", "read 0 4096", "flush"], false),
        (&["write -P 7 0 4096", "flush", "read 0 4096"], false),
        (&["write -P 7 -f 0 4096", "read 0 4096"], false),
    ] {
        let place = by_hand(setup);
        let options = place.options(",reconnect-delay=20");
        // Otherwise each write is durable at once.
        let mut arguments = vec!["-t", "writeback", "--image-opts", &options];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        let (_, said) = tool("qemu-io", &arguments);
        let found = said.contains("Could not flush the image: Input/output error");
        assert_eq!(found, told, "{commands:?}: {said}");
    }
}

#[test]
fn several_connections_are_made_only_where_that_is_safe() {
    for (flags, most) in [(0, 1), (MULTI_CONN, 1)] {
        let setup = Setup::new(Style::Structured);
        let place = by_hand(Setup { flags: setup.flags | flags, ..setup });
        assert!(io(&place.options(""), &["write 0 4096"]).0);
        assert_eq!(place.server.connections(), most);
    }
}
