//! Cylinders, heads and sectors: the size of a disk as old programs compute it.

use crate::block::SECTOR;

/// Cylinders, heads and sectors of a track.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Geometry {
    pub cylinders: u16,
    pub heads: u8,
    pub track: u8,
}

impl Geometry {
    /// The largest one. It means that the disk is at least so large.
    pub const MAX: Geometry = Geometry { cylinders: 65535, heads: 16, track: 255 };

    /// Sectors of a disk of this geometry.
    pub fn sectors(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.track)
    }

    /// The geometry that the specification gives a disk of so many sectors, which may have a few less.
    fn of_specification(sectors: u64) -> Geometry {
        let sectors = sectors.min(Geometry::MAX.sectors());
        let (mut track, mut heads, mut tracks);
        if sectors >= 65535 * 16 * 63 {
            (track, heads) = (255, 16);
            tracks = sectors / track;
        } else {
            track = 17;
            tracks = sectors / track;
            heads = tracks.div_ceil(1024).max(4);
            if tracks >= heads * 1024 || heads > 16 {
                (track, heads) = (31, 16);
                tracks = sectors / track;
            }
            if tracks >= heads * 1024 {
                (track, heads) = (63, 16);
                tracks = sectors / track;
            }
        }
        // Each is below its limit.
        Geometry { cylinders: (tracks / heads) as u16, heads: heads as u8, track: track as u8 }
    }

    /// The smallest geometry of a disk of at least so many bytes, and how many bytes the disk has then: more, where no
    /// geometry has as many, and just as many, where the largest one has fewer.
    pub fn around(size: u64) -> (Geometry, u64) {
        let sectors = size.div_ceil(SECTOR);
        let wanted = sectors.min(Geometry::MAX.sectors());
        let mut geometry = Geometry::default();
        let mut tried = wanted;
        while geometry.sectors() < wanted {
            geometry = Geometry::of_specification(tried);
            tried += 1;
        }
        match geometry {
            Geometry::MAX => (geometry, sectors * SECTOR),
            _ => (geometry, geometry.sectors() * SECTOR),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up_to_what_a_geometry_can_say() {
        // As QEMU 7.2 rounds them.
        for (size, rounded, geometry) in [
            (0, 0, (0, 0, 0)),
            (512, 34816, (1, 4, 17)),
            (1 << 20, 1079296, (31, 4, 17)),
            (1234567, 1253376, (36, 4, 17)),
            (64 << 20, 67125248, (964, 8, 17)),
            (100 << 20, 104865792, (1004, 12, 17)),
            (1 << 30, 1073995776, (2081, 16, 63)),
            (10 << 30, 10737893376, (20806, 16, 63)),
            (127 << 30, 136365219840, (65279, 16, 255)),
            (128 << 30, 128 << 30, (65535, 16, 255)),
        ] {
            let (cylinders, heads, track) = geometry;
            let wanted = (Geometry { cylinders, heads, track }, rounded);
            assert_eq!(Geometry::around(size), wanted, "{size}");
            // A size that a geometry has stays as it is.
            assert_eq!(Geometry::around(rounded).1, rounded, "{size}");
        }
    }
}
