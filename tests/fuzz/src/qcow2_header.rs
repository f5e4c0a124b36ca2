//! Fuzzing the first cluster and the tables of a qcow2 image with arbitrary bytes.
//!
//! There must be no panic, errors are one line, and what was read survives being written and read again.

use super::input::Input;
use vublk::format::qcow2::header::{FIXED_LEN, Header, MAGIC};
use vublk::format::qcow2::layout::{self, Cluster, L2Entry};

/// A header, mostly of a plausible kind; then entries of its tables.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let mut cluster = vec![0; 512 << input.below(8)];
    if input.u8() != 0 {
        plausible(&mut cluster, &mut input);
    }
    for _ in 0..input.u8() % 16 {
        let at = input.below(1 + cluster.len() as u64 / 8) as usize * 8;
        let value = input.edgy().to_be_bytes();
        cluster[at..].iter_mut().zip(value).for_each(|(to, from)| *to = from);
    }
    let at = input.below(cluster.len() as u64) as usize;
    let text = input.bytes(cluster.len() - at);
    cluster[at..][..text.len()].copy_from_slice(text);

    let Some(head) = cluster.first_chunk::<FIXED_LEN>() else { return };
    let mut header = match Header::cluster_bits(head).and_then(|_| Header::parse(&cluster)) {
        Ok(header) => header,
        Err(error) => {
            let shown = error.to_string();
            assert!(!shown.contains('\n') && shown.len() < 1 << 20, "{shown:?}");
            return;
        }
    };
    entries(&header, &mut input);
    let fields = header.fields();
    if let Ok(written) = header.encode() {
        assert_eq!(written.len(), cluster.len());
        let mut again = Header::parse(&written).expect("what was written is read");
        assert_eq!(again.encode().as_ref(), Ok(&written));
        // All but where the backing file's name is, and how long the structure.
        assert_eq!(again.fields()[20..72], fields[20..72]);
    }
}

/// A header that most checks let pass.
fn plausible(cluster: &mut [u8], input: &mut Input) {
    let bits = cluster.len().trailing_zeros();
    let mut put = |at: usize, bytes: &[u8]| cluster[at..][..bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC);
    put(4, &(2 + u32::from(!input.one_in(4))).to_be_bytes());
    put(20, &bits.to_be_bytes());
    put(24, &input.below(1 << 30).to_be_bytes());
    put(36, &0x1_0000u32.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &input.below(8).to_be_bytes()[4..]);
    put(100, &(104 + 8 * input.below(3) as u32).to_be_bytes());
    let mut at = 128;
    while at + 8 < cluster.len() && !input.one_in(4) {
        let known = [0xe279_2acau32, 0x6803_f857, 0x2385_2875, 0x0537_be77, 0x4441_5441, 7];
        let len = input.below(64) as u32;
        cluster[at..][..4].copy_from_slice(&input.pick(&known).to_be_bytes());
        cluster[at + 4..][..4].copy_from_slice(&len.to_be_bytes());
        at += 8 + len.next_multiple_of(8) as usize;
    }
}

/// Entries of tables, as this image's geometry reads them.
fn entries(header: &Header, input: &mut Input) {
    let geometry = header.geometry();
    for _ in 0..8 {
        let entry = L2Entry { word: input.edgy(), bitmap: input.edgy() };
        match geometry.decode(entry) {
            Ok(Cluster::Compressed(found)) => {
                assert!((1..=2 * geometry.cluster_size() + 512).contains(&found.len));
                if let Some(again) = geometry.encode_compressed(found.host, found.len) {
                    assert_eq!(geometry.decode(again), Ok(Cluster::Compressed(found)));
                }
            }
            Ok(Cluster::Normal { host } | Cluster::Zero { host: Some(host) }) => {
                assert!(geometry.is_cluster_start(host));
            }
            Ok(Cluster::Subclusters { allocated, zero, .. }) => assert_eq!(allocated & zero, 0),
            Ok(Cluster::Unallocated | Cluster::Zero { host: None }) | Err(_) => {}
        }
    }
    let mut block = vec![0; 512];
    let entries = 512 * 8 / geometry.refcount_bits() as u64;
    let (index, value) = (input.below(entries) as usize, input.u64() & geometry.refcount_max());
    layout::set_refcount(&mut block, geometry.refcount_order, index, value);
    assert_eq!(layout::refcount(&block, geometry.refcount_order, index), value);
    let ones: u32 = block.iter().map(|byte| byte.count_ones()).sum();
    assert_eq!(ones, value.count_ones());
}
