//! The whole catalogue, read from the file: which clusters it names.

use super::header::{self, Header};
use super::mapping::Entry;
use crate::block::{Error, Node};
use crate::cow::{Run, read_padded};
use crate::io::{AlignedBuf, Errno, IoResult};

/// Bytes of the catalogue that are read at once.
const PIECE: u64 = 1 << 20;
/// Unnamed runs of clusters that are remembered: a crash leaves fewer.
const MOST_GAPS: usize = 1 << 12;

/// Shows all entries of the catalogue that name a cluster: their indices, and the entries.
///
/// # Errors
/// I/O failed.
pub async fn for_each_named(
    file: &Node,
    header: &Header,
    mut see: impl FnMut(u32, u32),
) -> IoResult {
    let len = u64::from(header.entries) * 4;
    for at in (0..len).step_by(PIECE as usize) {
        let count = (len - at).min(PIECE) as usize;
        let mut bytes = AlignedBuf::new(count, 4096).ok_or(Errno::ENOMEM)?;
        read_padded(file, header::LEN as u64 + at, &bytes.io_vec()).await?;
        let entries = bytes[..count].chunks_exact(4).map(Entry::parse).enumerate();
        for (index, entry) in entries.filter(|(_, entry)| entry.0 != 0) {
            see((at / 4) as u32 + index as u32, entry.0);
        }
    }
    Ok(())
}

/// Which clusters of a file are named, in an image that may be written.
#[derive(Debug, Default, PartialEq)]
pub struct Named {
    /// The first cluster behind all that are named.
    pub end: u64,
    /// Clusters before it that nothing names; most of them, where there are very many.
    pub gaps: Vec<Run>,
}

/// The clusters that the catalogue of an image names, each once and inside the file.
///
/// # Errors
/// The catalogue is damaged, or I/O failed.
pub async fn scan(file: &Node, header: &Header) -> Result<Named, Error> {
    let file_len = file.driver().len();
    let mut damage = None;
    let mut places = Vec::new();
    let see = |index, entry| match header.offset_of(entry).filter(|&at| at < file_len) {
        Some(at) => places.push(at),
        None => {
            damage.get_or_insert(format!("cluster {index} is outside the image"));
        }
    };
    let read = for_each_named(file, header, see).await;
    read.map_err(|errno| Error::os("Could not read the catalogue", errno))?;
    places.sort_unstable();
    let overlap = places.windows(2).find(|pair| pair[1] - pair[0] < header.cluster_size());
    if let Some(pair) = overlap {
        damage.get_or_insert(format!("the cluster at {:#x} has two owners", pair[1]));
    }
    match damage {
        Some(damage) => Err(Error::new(format!(
            "The Parallels catalogue is damaged ({damage}): repair the image (check -r all), or open it with \
             read-only=on"
        ))),
        None => Ok(named(header, &places)),
    }
}

fn named(header: &Header, places: &[u64]) -> Named {
    let mut named = Named::default();
    for &place in places {
        let cluster_end = header.clusters_before(place + header.cluster_size());
        // The first that it lies in, in part where it is not aligned.
        let first = place.saturating_sub(header.data_start()) / header.cluster_size();
        if first > named.end && named.gaps.len() < MOST_GAPS {
            let count = first - named.end;
            named.gaps.push(Run { first: named.end, count, is_fresh: false });
        }
        named.end = named.end.max(cluster_end);
    }
    named
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_lie_between_named_clusters() {
        let header = Header::for_new(16 << 20, 1 << 20).unwrap();
        let named = |places: &[u64]| named(&header, places);
        let run = |first, count| Run { first, count, is_fresh: false };
        assert_eq!(named(&[]), Named::default());
        let mib = 1 << 20;
        assert_eq!(named(&[mib, 2 * mib]), Named { end: 2, gaps: vec![] });
        assert_eq!(named(&[2 * mib, 5 * mib]), Named { end: 5, gaps: vec![run(0, 1), run(2, 2)] });
        // Not aligned: both clusters that it lies in are in use.
        assert_eq!(named(&[2 * mib + 512]), Named { end: 3, gaps: vec![run(0, 1)] });
    }
}
