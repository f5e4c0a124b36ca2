//! Rings made in advance, for workers that start inside the sandbox.
//!
//! A process that is allowed to make rings could make itself one without restrictions.

use super::sync::Mutex;
use super::uring::Uring;
use std::io;

/// The rings that are left. `None`: the process may make what it wants.
static LEFT: Mutex<Option<Vec<Uring>>> = Mutex::new(None);

/// Makes `count` rings, as far as the kernel lets it; from now on workers take those, and when
/// they are used up, threads.
pub fn make_last_rings(count: usize) {
    let rings = (0..count).map_while(|_| Uring::disabled().ok()).collect();
    *LEFT.lock() = Some(rings);
}

/// Whether rings are made as they are needed.
pub fn may_make_rings() -> bool {
    LEFT.lock().is_none()
}

/// A ring for the calling thread.
pub(super) fn take_ring() -> io::Result<Uring> {
    let Some(left) = &mut *LEFT.lock() else { return Uring::new() };
    let ring = left.pop().ok_or_else(|| io::Error::other("the sandbox has none left"))?;
    ring.enable()?;
    Ok(ring)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_rings_serve_the_threads_that_take_them_and_then_there_are_none() {
        // Of this process alone, for it changes all of it.
        let Ok(exe) = std::env::current_exe() else { panic!("this program has no name") };
        if std::env::var_os("VUBLK_LAST_RINGS").is_none() {
            let name = "the_last_rings_serve_the_threads_that_take_them_and_then_there_are_none";
            let test = std::process::Command::new(exe)
                .arg(name)
                .env("VUBLK_LAST_RINGS", "1")
                .output()
                .unwrap();
            assert!(test.status.success(), "{}", String::from_utf8_lossy(&test.stdout));
            return;
        }
        if Uring::new().is_err() {
            return;
        }
        make_last_rings(2);
        for _ in 0..2 {
            std::thread::spawn(|| drop(take_ring().unwrap())).join().unwrap();
        }
        assert_eq!(take_ring().err().unwrap().to_string(), "the sandbox has none left");
    }
}
