//! Tests of table entries, refcounts and indices against the specification.

use super::*;

fn geometry(cluster_bits: u32) -> Geometry {
    Geometry {
        cluster_bits,
        refcount_order: 4,
        extended_l2: false,
        zero_flag: true,
        external_data: false,
    }
}

#[test]
fn refcounts_of_every_width_are_kept_apart() {
    for order in 0..=6 {
        let bits = 1u32 << order;
        let max = u64::MAX >> (64 - bits);
        let mut block = vec![0u8; 512];
        let n = 512 * 8 / bits as usize;
        let value = |i: usize| (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 3 & max;
        (0..n).for_each(|i| set_refcount(&mut block, order, i, value(i)));
        (0..n).for_each(|i| assert_eq!(refcount(&block, order, i), value(i), "{bits} bits, {i}"));
        set_refcount(&mut block, order, 1, max);
        set_refcount(&mut block, order, 1, 0);
        assert_eq!(refcount(&block, order, 0), value(0));
        assert_eq!(refcount(&block, order, 2), value(2));
    }
}

#[test]
fn narrow_refcounts_begin_at_the_lowest_bit_and_wide_ones_with_the_highest_byte() {
    let mut block = [0u8; 512];
    set_refcount(&mut block, 0, 9, 1);
    assert_eq!(block[..3], [0, 2, 0]);
    set_refcount(&mut block, 1, 0, 3);
    assert_eq!(block[..3], [3, 2, 0]);
    set_refcount(&mut block, 2, 1, 0xa);
    assert_eq!(block[..3], [0xa3, 2, 0]);
    set_refcount(&mut block, 4, 1, 0x1234);
    assert_eq!(block[..4], [0xa3, 2, 0x12, 0x34]);
    set_refcount(&mut block, 6, 1, 0x0102_0304_0506_0708);
    assert_eq!(block[8..16], [1, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn indices_follow_the_specification() {
    let plain = geometry(16);
    let at = (3 << 29) + (5 << 16) + 7;
    assert_eq!((plain.l1_index(at), plain.l2_index(at), plain.offset_in_cluster(at)), (3, 5, 7));
    assert_eq!((plain.l2_entries(), plain.l2_coverage()), (8192, 1 << 29));
    assert_eq!(plain.l1_entries_for((1 << 29) + 1), 2);
    assert_eq!(plain.refcount_block_entries(), 32768);
    let host = (2 << 31) + (9 << 16);
    assert_eq!((plain.refcount_table_index(host), plain.refcount_block_index(host)), (2, 9));
    let extended = Geometry { extended_l2: true, ..plain };
    assert_eq!((extended.l2_entries(), extended.l2_coverage()), (4096, 1 << 28));
    assert_eq!((extended.subcluster_size(), extended.subcluster_index(at + 4096)), (2048, 2));
    let one_bit = Geometry { refcount_order: 0, ..geometry(9) };
    assert_eq!((one_bit.refcount_block_entries(), one_bit.refcount_max()), (4096, 1));
    assert_eq!(Geometry { refcount_order: 6, ..plain }.refcount_max(), u64::MAX);
}

#[test]
fn entries_mean_what_the_specification_says() {
    use BadEntry::*;
    let decode = |g: Geometry, word, bitmap| g.decode(L2Entry { word, bitmap });
    let plain = geometry(16);
    for (word, wanted) in [
        (0, Ok(Cluster::Unallocated)),
        (1, Ok(Cluster::Zero { host: None })),
        (0x50001, Ok(Cluster::Zero { host: Some(0x50000) })),
        (1 << 63 | 0x50000, Ok(Cluster::Normal { host: 0x50000 })),
        (0x00ff_ffff_ffff_0000, Ok(Cluster::Normal { host: 0x00ff_ffff_ffff_0000 })),
        // Without an external data file, nothing is at 0.
        (1 << 63, Ok(Cluster::Unallocated)),
        (2, Err(Reserved)),
        (0x100, Err(Reserved)),
        (1 << 56, Err(Reserved)),
        (1 << 61, Err(Reserved)),
        (0x50200, Err(Unaligned)),
    ] {
        assert_eq!(decode(plain, word, 0), wanted, "{word:#x}");
    }
    assert_eq!(decode(Geometry { zero_flag: false, ..plain }, 1, 0), Err(Reserved));
    let external = Geometry { external_data: true, ..plain };
    assert_eq!(decode(external, 1 << 63, 0), Ok(Cluster::Normal { host: 0 }));
    assert_eq!(decode(external, 1 << 63 | 1, 0), Ok(Cluster::Zero { host: Some(0) }));
    assert_eq!(decode(external, 0, 0), Ok(Cluster::Unallocated));

    let extended = Geometry { extended_l2: true, ..plain };
    let subclusters = |host, allocated, zero| Ok(Cluster::Subclusters { host, allocated, zero });
    assert_eq!(decode(extended, 0, 0), subclusters(None, 0, 0));
    assert_eq!(decode(extended, 0, 5 << 32), subclusters(None, 0, 5));
    assert_eq!(decode(extended, 0x50000, 5 << 32 | 2), subclusters(Some(0x50000), 2, 5));
    assert_eq!(decode(extended, 0x50000, 1 << 32 | 1), Err(Bitmap));
    assert_eq!(decode(extended, 0, 1), Err(Bitmap));
    assert_eq!(decode(extended, 1, 0), subclusters(None, 0, 0));
}

#[test]
fn compressed_clusters_fit_their_entries_exactly() {
    for bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS {
        let g = geometry(bits);
        let last = 1u64 << (62 - (bits - 8)).min(56);
        let most = 512u64 << (bits - 8);
        for host in [0, 1, 511, 512, 0x12_3457, last - 512, last - 1] {
            for len in [1, 511, 512, 513, g.cluster_size() - 1] {
                let entry = g.encode_compressed(host, len).unwrap();
                let Ok(Cluster::Compressed(found)) = g.decode(entry) else { panic!("{entry:?}") };
                assert_eq!(found.host, host);
                assert!(found.len >= len && found.len - len < 512, "{bits} {host:#x} {len}");
                assert_eq!((found.host + found.len) % 512, 0);
            }
        }
        assert_eq!(g.encode_compressed(last, 1), None);
        assert_eq!(g.encode_compressed(0, most + 1), None);
        assert!(g.encode_compressed(0, most).is_some());
    }
    // The example of the default cluster size: x is 54.
    let entry = geometry(16).encode_compressed(0x5_0123, 1024).unwrap();
    assert_eq!(entry.word, 1 << 62 | 2 << 54 | 0x5_0123);
}

#[test]
fn l1_entries_hold_a_table_and_whether_it_is_shared() {
    let entry = L1Entry::new(0x30000, true);
    assert_eq!(entry.0, 0x8000_0000_0003_0000);
    assert!(entry.is_copied() && !entry.has_reserved_bits());
    assert_eq!(entry.l2_table(), 0x30000);
    assert!(L1Entry(1).has_reserved_bits() && L1Entry(1 << 62).has_reserved_bits());
}
