//! The second opinion must be right itself: it agrees with QEMU on good images of every sort, and on damaged ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use conformance::rng::Rng;
use ringblk_replay::image::Image;
use ringblk_replay::qemu::{Exported, Verdict, must};
use ringblk_replay::reference::{self, Chain, Header};
use ringblk_replay::scenario::{self, Format, Qcow2, Subject};

fn qemu_is_here() -> bool {
    let here = std::process::Command::new("qemu-img").arg("--version").output().is_ok();
    if !here {
        eprintln!("skipped: qemu-img is not installed");
    }
    here
}

/// The files of a scenario after QEMU has worked on them: writes, zeroes, discards, and snapshots where they are possible.
fn used(scenario: &Qcow2, subject: &Subject, seed: u64) -> Exported {
    let exported = Exported::new(&subject.files).unwrap();
    let source: Vec<String> = scenario.source("image.qcow2");
    let source: Vec<&str> = source.iter().map(String::as_str).collect();
    let mut rng = Rng::new(seed);
    for round in 0..3 {
        let mut commands = Vec::new();
        for _ in 0..12 {
            let at = rng.below(scenario.size / 512) * 512;
            let len = ((1 + rng.below(40)) * 512).min(scenario.size - at);
            commands.push(match rng.below(6) {
                0 => format!("write -z {at} {len}"),
                1 => format!("write -zu {at} {len}"),
                2 => format!("discard {at} {len}"),
                _ => format!("write -P {} {at} {len}", 1 + rng.below(250)),
            });
        }
        let commands: Vec<&str> = commands.iter().flat_map(|c| ["-c", c.as_str()]).collect();
        let args = [&["-d", "unmap"][..], &source, &commands];
        must(exported.dir(), "qemu-io", &args.concat()).unwrap();
        let Format::Qcow2 { data: None, secret: None } = &subject.format else { continue };
        if !scenario.create.contains("refcount_bits=1") {
            must(exported.dir(), "qemu-img", &["snapshot", "-c", &format!("s{round}"), "image.qcow2"])
                .unwrap();
        }
    }
    exported
}

#[test]
fn reads_and_checks_what_qemu_makes() {
    if !qemu_is_here() {
        return;
    }
    for scenario in scenario::qcow2() {
        let subject = scenario.make().unwrap();
        let exported = used(&scenario, &subject, 7);
        let image = exported.load("image.qcow2").unwrap();
        let report = reference::check(&image).unwrap();
        assert_eq!((report.corruptions, report.leaks), (vec![], 0), "{}", scenario.name);
        let Format::Qcow2 { data, secret: None } = &subject.format else { continue };
        let data = data.as_ref().map(|d| exported.load(d).unwrap());
        let header = Header::read(&image).unwrap();
        let chain = Chain { image: &image, data: data.as_ref(), backing: subject.backing.as_deref() };
        let ours =
            reference::read_guest(&chain, &header, header.l1_offset, header.l1_size, header.size).unwrap();
        assert!(ours == exported.content(&["-f", "qcow2", "image.qcow2"]).unwrap(), "{}", scenario.name);
        for s in header.snapshot_table(&image).unwrap().0 {
            let ours = reference::read_guest(&chain, &header, s.l1_offset, s.l1_size, s.size).unwrap();
            let name = format!("snapshot.name={}", s.name);
            let theirs = exported.content(&["-f", "qcow2", "-l", &name, "image.qcow2"]).unwrap();
            assert!(ours == theirs, "{}, {}", scenario.name, s.name);
        }
    }
}

/// Changes one field of the metadata.
fn damage(image: &mut Image, header: &Header, rng: &mut Rng) -> String {
    let word = |image: &Image, at: u64| u64::from_be_bytes(image.bytes(at, 8).try_into().unwrap());
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let block = word(image, header.rt_offset) & OFFSET;
    let tables: Vec<u64> = (0..u64::from(header.l1_size))
        .map(|i| word(image, header.l1_offset + i * 8) & OFFSET)
        .filter(|t| *t != 0)
        .collect();
    let table = tables[rng.below(tables.len() as u64) as usize];
    let clusters = image.len() / header.cluster();
    let (what, at, value) = match rng.below(6) {
        0 => {
            let at = block + rng.below(clusters) * 2;
            let value = rng.below(3) as u16;
            image.write(at, &value.to_be_bytes());
            return format!("refcount at {at:#x} = {value}");
        }
        1 => ("L1 entry", header.l1_offset + rng.below(header.l1_size.into()) * 8, None),
        _ => ("L2 entry", table + rng.below(header.size / header.cluster()) * 8, None),
    };
    let old = word(image, at);
    let value = value.unwrap_or_else(|| match rng.below(5) {
        0 => old ^ 1 << 63,
        1 => old ^ header.cluster(),
        2 => 0,
        3 => old | 512,
        _ => (1 << 63) | (rng.below(2 * clusters) * header.cluster()),
    });
    image.write(at, &value.to_be_bytes());
    format!("{what} at {at:#x}: {old:#x} -> {value:#x}")
}

#[test]
fn agrees_with_qemu_on_damage() {
    if !qemu_is_here() {
        return;
    }
    let scenario = scenario::named("snapshots").unwrap();
    let subject = scenario.make().unwrap();
    let good = used(&scenario, &subject, 3).load("image.qcow2").unwrap();
    let header = Header::read(&good).unwrap();
    let (mut bad, mut leaks) = (0, 0);
    for seed in 0..60 {
        let mut image = good.clone();
        let what = damage(&mut image, &header, &mut Rng::new(seed));
        let report = reference::check(&image).unwrap();
        let theirs = Exported::new(&[("image.qcow2".to_owned(), image)]).unwrap();
        let theirs = theirs.check(&["-f", "qcow2", "image.qcow2"]).unwrap();
        let ours = match (report.corruptions.is_empty(), report.leaks) {
            (false, _) => "bad",
            (true, 0) => "clean",
            _ => "leaks",
        };
        let same = match &theirs {
            Verdict::Clean => ours == "clean",
            Verdict::Leaks => ours == "leaks",
            Verdict::Bad(_) => ours == "bad",
        };
        assert!(same, "seed {seed}, {what}: {ours}, {:?}; QEMU: {theirs:?}", report.corruptions);
        bad += u32::from(ours == "bad");
        leaks += u32::from(ours == "leaks");
    }
    assert!(bad > 20 && leaks > 0, "{bad} bad, {leaks} leaky");
}
