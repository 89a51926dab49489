//! The codec against itself, against hostile streams, and against images `qemu-img convert -c` makes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::qcow2::format::{Header, L1Entry, L2Entry, Policy};

const BOTH: [Compression; 2] = [Compression::Deflate, Compression::Zstd];

/// Bytes that compress well and refer back as far as they can.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let run = (state % 97) as usize + 1;
        match state >> 8 & 3 {
            0 => out.extend(std::iter::repeat_n(state as u8, run)),
            1 if out.len() > 5000 => {
                let from = out.len() - 5000;
                let again = out[from..from + run].to_vec();
                out.extend(again);
            }
            _ => out.extend_from_slice(&state.to_le_bytes()),
        }
    }
    out.truncate(len);
    out
}

#[test]
fn every_cluster_size_comes_back() {
    for bits in 9..=21 {
        for kind in BOTH {
            let plain = pattern(1 << bits, bits as u64);
            let Some(mut packed) = compress(kind, &plain) else { continue };
            assert!(packed.len() < plain.len());
            // What follows in the last sector is not ours.
            packed.extend_from_slice(&[0xa5; 511]);
            let mut out = vec![0; plain.len()];
            decompress(kind, &packed, &mut out).unwrap();
            assert!(out == plain, "{kind:?} 2^{bits}");
        }
    }
}

#[test]
fn what_does_not_shrink_is_not_compressed() {
    let mut state = 88172645463325252u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(65536)
    .collect();
    for kind in BOTH {
        assert_eq!(compress(kind, &noise), None);
    }
}

#[test]
fn short_and_damaged_streams_are_refused() {
    for kind in BOTH {
        let plain = pattern(65536, 7);
        let packed = compress(kind, &plain).unwrap();
        let mut out = vec![0; plain.len()];
        assert_eq!(decompress(kind, &packed[..packed.len() / 2], &mut out), Err(BadStream));
        assert_eq!(decompress(kind, &[], &mut out), Err(BadStream));
        assert_eq!(decompress(kind, &[0xff; 600], &mut out), Err(BadStream));
        // A stream of half a cluster.
        let half = compress(kind, &plain[..32768]).unwrap();
        assert_eq!(decompress(kind, &half, &mut out), Err(BadStream));
        // The same decoder works afterwards.
        decompress(kind, &packed, &mut out).unwrap();
        assert!(out == plain);
    }
}

#[test]
fn a_deflate_stream_may_go_on_a_zstd_frame_may_not() {
    let plain = pattern(65536, 9);
    let mut out = vec![0; 32768];
    let packed = compress(Compression::Deflate, &plain).unwrap();
    decompress(Compression::Deflate, &packed, &mut out).unwrap();
    assert!(out == plain[..32768]);
    let packed = compress(Compression::Zstd, &plain).unwrap();
    assert_eq!(decompress(Compression::Zstd, &packed, &mut out), Err(BadStream));
}

#[test]
fn zstd_frames_add_up() {
    let plain = pattern(65536, 11);
    let mut packed = compress(Compression::Zstd, &plain[..20000]).unwrap();
    packed.extend(compress(Compression::Zstd, &plain[20000..]).unwrap());
    let mut out = vec![0; 65536];
    decompress(Compression::Zstd, &packed, &mut out).unwrap();
    assert!(out == plain);
}

#[test]
fn a_bomb_fills_one_cluster_and_no_more() {
    let bomb = zstd::bulk::compress(&vec![0u8; 64 << 20], 3).unwrap();
    let mut out = vec![1; 65536];
    assert_eq!(decompress(Compression::Zstd, &bomb, &mut out), Err(BadStream));
}

#[test]
fn a_window_above_8_mib_is_refused() {
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    encoder.set_parameter(CParameter::WindowLog(24)).unwrap();
    std::io::Write::write_all(&mut encoder, &pattern(65536, 3)).unwrap();
    let packed = encoder.finish().unwrap();
    let mut out = vec![0; 65536];
    assert_eq!(decompress(Compression::Zstd, &packed, &mut out), Err(BadStream));
}

#[test]
fn qemu_img_s_clusters_decode() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    let image = dir.path().join("image");
    let plain = pattern(3 << 20, 5);
    std::fs::write(&raw, &plain).unwrap();
    for kind in ["zlib", "zstd"] {
        for bits in [12, 16, 21] {
            let options = format!("compression_type={kind},cluster_size={}", 1u64 << bits);
            let done = Command::new("qemu-img")
                .args(["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options])
                .args([&raw, &image])
                .status()
                .unwrap();
            assert!(done.success());
            assert!(read_all(&std::fs::read(&image).unwrap()) == plain, "{options}");
        }
    }
}

/// The guest's view of an image in memory, compressed and plain clusters.
fn read_all(file: &[u8]) -> Vec<u8> {
    let header = Header::parse(file, Policy::default()).unwrap();
    let g = header.geometry();
    let word = |at: u64| u64::from_be_bytes(file[at as usize..at as usize + 8].try_into().unwrap());
    let mut out = vec![0; header.virtual_size() as usize];
    let mut compressed = 0;
    for (i, cluster) in out.chunks_mut(g.cluster_size() as usize).enumerate() {
        let guest = i as u64 * g.cluster_size();
        let l1 = L1Entry(word(header.l1_offset + g.l1_index(guest) * 8));
        let Some(table) = l1.table(g).unwrap() else { continue };
        match L2Entry::decode(word(table + g.l2_index(guest) * 8), 0, g).unwrap() {
            L2Entry::Normal { host, .. } => cluster.copy_from_slice(&file[host as usize..][..cluster.len()]),
            L2Entry::Compressed { offset, len } => {
                compressed += 1;
                let end = file.len().min((offset + len) as usize);
                let mut whole = vec![0; g.cluster_size() as usize];
                decompress(header.compression, &file[offset as usize..end], &mut whole).unwrap();
                cluster.copy_from_slice(&whole[..cluster.len()]);
            }
            _ => {}
        }
    }
    assert!(compressed > 0);
    out
}

proptest! {
    #[test]
    fn any_cluster_comes_back(bits in 9usize..14, bytes in proptest::collection::vec(0u8..4, 8192)) {
        let plain = &bytes[..(1 << bits).min(8192)];
        for kind in BOTH {
            if let Some(packed) = compress(kind, plain) {
                let mut out = vec![0; plain.len()];
                decompress(kind, &packed, &mut out).unwrap();
                prop_assert_eq!(&out[..], plain);
            }
        }
    }

    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let mut out = vec![0; 4096];
        for kind in BOTH {
            let _ = decompress(kind, &bytes, &mut out);
        }
    }
}
