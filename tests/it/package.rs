//! The Debian package: built, inspected, installed into a root of its own, and its unit started.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use vublk_testkit::{Disk, Options, Server};

use crate::cli::VUBLK;
use crate::metrics::{connect, page};
use crate::vhost_user::{LIMIT, new_image};

/// Runs a program that succeeds; gives what it printed.
fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let said = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "{command:?}: {status}: {said}");
    String::from_utf8(stdout).unwrap()
}

/// The package of the program under test, packed in haste.
fn build(dir: &Path) -> PathBuf {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(tree.join("dist/deb/build.sh"));
    command.arg(VUBLK).arg(dir).env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
    command.env("DPKG_DEB_COMPRESSOR_TYPE", "gzip").env("DPKG_DEB_COMPRESSOR_LEVEL", "1");
    run(&mut command).trim().into()
}

/// Makes a root in which dpkg can install packages.
fn prepare(root: &Path) {
    std::fs::create_dir_all(root.join("var/lib/dpkg/info")).unwrap();
    std::fs::create_dir_all(root.join("var/lib/dpkg/updates")).unwrap();
    std::fs::create_dir_all(root.join("etc")).unwrap();
    std::fs::write(root.join("var/lib/dpkg/status"), "").unwrap();
}

/// Has dpkg install the package in a root, its scripts included.
fn install(package: &Path, root: &Path) {
    run(dpkg(root).arg("-i").arg(package));
}

/// Has dpkg remove it, with all that it leaves.
fn purge(root: &Path) {
    run(dpkg(root).args(["--purge", "vublk"]));
}

/// dpkg for a root.
fn dpkg(root: &Path) -> Command {
    let mut command = Command::new("dpkg");
    command.arg(format!("--root={}", root.display()));
    // Without the packages that it depends on, and without a chroot, which would lack them.
    command.args(["--force-depends", "--force-script-chrootless", "--force-not-root"]);
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    command.env("PATH", path);
    command
}

/// The values of a setting of a unit, in their order.
fn settings<'a>(unit: &'a str, name: &str) -> Vec<&'a str> {
    let values = unit.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    values.collect()
}

/// The words of the unit's command line for an instance, made as systemd makes them.
fn command_line(unit: &str, root: &Path, instance: &str) -> Vec<String> {
    let here = |text: &str| {
        let text = text.replace("%i", instance);
        ["/usr/bin/", "/var/lib/vublk/", "/run/vublk/", "/etc/vublk/"]
            .iter()
            .fold(text, |t, path| t.replace(path, &format!("{}{path}", root.display())))
    };
    let mut variables = HashMap::new();
    let mut assign = |text: &str| {
        let (name, value) = text.split_once('=').unwrap();
        variables.insert(name.to_owned(), here(value));
    };
    settings(unit, "Environment")[0].split(' ').for_each(&mut assign);
    let file = here(settings(unit, "EnvironmentFile")[0].strip_prefix('-').unwrap());
    let file = std::fs::read_to_string(file).unwrap_or_default();
    file.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).for_each(assign);
    let mut words = Vec::new();
    for word in settings(unit, "ExecStart")[0].split(' ') {
        match word.strip_prefix("${").and_then(|name| name.strip_suffix('}')) {
            Some(name) => words.push(variables[name].clone()),
            None => match word.strip_prefix('$') {
                Some(name) => words.extend(variables[name].split_whitespace().map(str::to_owned)),
                None => words.push(here(word)),
            },
        }
    }
    words
}

#[test]
fn the_package_holds_what_it_should_installs_and_starts() {
    let dir = tempfile::tempdir().unwrap();
    let package = build(dir.path());
    let listed = run(Command::new("dpkg-deb").arg("-c").arg(&package));
    let files: Vec<_> = listed.lines().filter_map(|line| line.split_whitespace().nth(5)).collect();
    for wanted in [
        "./usr/bin/vublk",
        "./usr/lib/systemd/system/vublk@.service",
        "./usr/share/man/man1/vublk.1.gz",
        "./usr/share/man/man1/vublk-serve.1.gz",
        "./usr/share/man/man1/vublk-top.1.gz",
        "./usr/share/bash-completion/completions/vublk",
        "./usr/share/zsh/vendor-completions/_vublk",
        "./usr/share/fish/vendor_completions.d/vublk.fish",
        "./usr/share/qemu/vhost-user/50-vublk.json",
        "./usr/share/doc/vublk/copyright",
        "./usr/share/doc/vublk/README.md",
        "./usr/share/doc/vublk/docs/operating.md",
        "./usr/share/doc/vublk/examples/libvirt-disk.xml",
        "./usr/share/doc/vublk/examples/qemu.sh",
        "./usr/share/doc/vublk/examples/cloud-hypervisor.sh",
        "./usr/share/doc/vublk/examples/disk.conf",
        "./usr/share/doc/vublk/examples/grafana-dashboard.json",
    ] {
        assert!(files.contains(&wanted), "no {wanted} in\n{listed}");
    }
    assert!(listed.contains("./usr/libexec/vhost-user-block -> ../bin/vublk"), "{listed}");
    // Who wants those names makes the links.
    for file in files {
        assert!(!file.contains("/bin/qemu-"), "{file}");
    }
    let depends = run(Command::new("dpkg-deb").arg("-f").arg(&package).arg("Depends"));
    assert!(depends.contains("libc6 (>= "), "{depends}");

    let root = dir.path().join("root");
    prepare(&root);
    install(&package, &root);
    let status = std::fs::read_to_string(root.join("var/lib/dpkg/status")).unwrap();
    assert!(status.contains("Package: vublk\nStatus: install ok installed\n"), "{status}");
    let users = std::fs::read_to_string(root.join("etc/passwd")).unwrap();
    assert!(users.lines().any(|user| user.starts_with("vublk:")), "{users}");

    let unit = std::fs::read_to_string(root.join("usr/lib/systemd/system/vublk@.service")).unwrap();
    for folder in ["var/lib/vublk", "run/vublk", "etc/vublk"] {
        std::fs::create_dir_all(root.join(folder)).unwrap();
    }
    new_image(&root.join("var/lib/vublk/web.img"), 1 << 20);
    // The example with all that it offers.
    let example = root.join("usr/share/doc/vublk/examples/disk.conf");
    let example = std::fs::read_to_string(example).unwrap().replace("NAME", "web");
    let settings = example.lines().map(|line| line.strip_prefix('#').unwrap_or(line));
    let settings = settings.filter(|line| {
        line.split_once('=')
            .is_some_and(|(name, _)| ["IMAGE", "FORMAT", "METRICS", "OPTIONS"].contains(&name))
    });
    let configuration: String = settings.map(|line| format!("{line}\n")).collect();
    assert_eq!(configuration.lines().count(), 4, "{example}");
    // A port may be another program's.
    let configuration = configuration.replace("127.0.0.1:9100", "unix:/run/vublk/web.metrics");
    std::fs::write(root.join("etc/vublk/web.conf"), configuration).unwrap();
    let words = command_line(&unit, &root, "web");
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).stdout(std::process::Stdio::null());
    let mut server = Server::spawn(command).unwrap();
    let socket = root.join("run/vublk/web.sock");
    server.wait_socket(&socket, LIMIT).unwrap();
    let mut disk = Disk::open(&socket, &Options::default()).unwrap();
    disk.write(8, &[7; 512]).unwrap();
    let reported = page(connect(&root.join("run/vublk/web.metrics")));
    assert!(reported.contains("vublk_export_connected{export=\"web\"} 1\n"), "{reported}");
    drop(disk);
    server.signal(libc::SIGTERM).unwrap();
    assert!(server.wait_exit(LIMIT).unwrap().success(), "{}", server.stderr());
    for name in ["web.sock", "web.metrics"] {
        assert!(!root.join("run/vublk").join(name).exists(), "{name} is left");
    }
    let image = std::fs::read(root.join("var/lib/vublk/web.img")).unwrap();
    assert_eq!(image[4096..4608], [7; 512]);

    // A purge leaves images and their user; without images it leaves nothing.
    let has_user = || {
        let users = std::fs::read_to_string(root.join("etc/passwd")).unwrap();
        users.lines().any(|user| user.starts_with("vublk:"))
    };
    purge(&root);
    assert!(root.join("var/lib/vublk/web.img").exists() && has_user());
    std::fs::remove_file(root.join("var/lib/vublk/web.img")).unwrap();
    std::fs::remove_file(root.join("etc/vublk/web.conf")).unwrap();
    install(&package, &root);
    purge(&root);
    assert!(!root.join("var/lib/vublk").exists() && !root.join("etc/vublk").exists());
    assert!(!has_user());
}

#[test]
fn systemd_finds_the_unit_right_and_well_confined() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vublk@.service");
    let tree = Path::new(env!("CARGO_MANIFEST_DIR"));
    let unit = std::fs::read_to_string(tree.join("dist/vublk@.service")).unwrap();
    // It looks whether the program is there.
    std::fs::write(&file, unit.replace("/usr/bin/vublk", VUBLK)).unwrap();
    let mut command = Command::new("systemd-analyze");
    let Output { status, stderr, .. } =
        command.args(["verify", "--man=no"]).arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&stderr);
    assert!(status.success() && !said.contains("vublk"), "{said}");
    // It fails if the exposure is above a fifth of what there can be.
    let mut command = Command::new("systemd-analyze");
    run(command.args(["security", "--offline=true", "--threshold=20"]).arg(&file));
}
