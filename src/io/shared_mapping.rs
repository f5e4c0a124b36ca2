//! Mappings of shared files that survive truncation by the other process.
//!
//! Touching a page that the file does not hold any more raises SIGBUS, which would end the process and with it the
//! disks of all guests. A handler looks the address up among our mappings, puts zeroes of our own instead of what is
//! broken, and marks the mapping as lost; its users ask for that ([`losses`], [`SharedMapping::is_lost`]) and stop.
//! The kernel is given such pages too: its transfers into them fail with EFAULT and raise no signal. A SIGBUS
//! anywhere else does what it did before.
//!
//! The rule held here: the handler finds its way by atomics alone and calls nothing but mmap and
//! sigaction, for it may interrupt anything.

use super::sync::Mutex;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{NonNull, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release, SeqCst},
    fence,
};

/// A file mapped into our memory, shared with other processes that map it. Unmapped when dropped.
#[derive(Debug)]
pub struct SharedMapping {
    /// The first byte that was asked for.
    first: NonNull<u8>,
    /// What the kernel has mapped: whole pages.
    start: usize,
    len: usize,
    place: &'static Place,
}

// SAFETY: the mapping is reached through raw pointers only, whose users answer for it.
unsafe impl Send for SharedMapping {}
// SAFETY: as above.
unsafe impl Sync for SharedMapping {}

impl SharedMapping {
    /// Maps `len` bytes at `offset`, to be read and written. The file may be closed afterwards.
    ///
    /// # Errors
    /// The kernel's: EINVAL where the offset is inside a page, which is not refused where pages are huge, because
    /// front ends count in small ones.
    pub fn map(file: &File, offset: u64, len: usize) -> io::Result<SharedMapping> {
        let overflow = || io::Error::from_raw_os_error(libc::EOVERFLOW);
        install_handler();
        let huge = huge_page(file)?;
        let skipped = huge.map_or(0, |page| offset as usize & (page - 1));
        let page = huge.unwrap_or(1);
        let wanted = len.checked_add(skipped).and_then(|len| len.checked_next_multiple_of(page));
        let wanted = wanted.ok_or_else(overflow)?;
        let from = libc::off_t::try_from(offset - skipped as u64).map_err(|_| overflow())?;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let start = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
            libc::mmap(null_mut(), wanted, prot, flags, file.as_raw_fd(), from)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let place = Place::take(start as usize, wanted, huge.unwrap_or(base_page()));
        let first = NonNull::new(start.cast::<u8>().wrapping_add(skipped)).ok_or_else(overflow)?;
        Ok(SharedMapping { first, start: start as usize, len: wanted, place })
    }

    /// The first byte. What is behind it may change at any time.
    pub fn as_ptr(&self) -> *mut u8 {
        self.first.as_ptr()
    }

    /// Whether pages of it were found missing. What was read since is zeroes, what was written since
    /// reaches nobody.
    pub fn is_lost(&self) -> bool {
        self.place.lost.load(Acquire)
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        self.place.give_up();
        // SAFETY: exactly what `map` has mapped, or what the handler has put in its place; the code that used it has
        // dropped it.
        unsafe { libc::munmap(self.start as *mut libc::c_void, self.len) };
    }
}

/// How often this process has found pages missing. Who sees another number than before asks its own
/// mappings; a number that stays costs a look at memory that nobody writes.
pub fn losses() -> usize {
    LOSSES.load(Acquire)
}

static LOSSES: AtomicUsize = AtomicUsize::new(0);

/// Bytes of a page of the file's, if they are huge ones.
fn huge_page(file: &File) -> io::Result<Option<usize>> {
    // SAFETY: all zeroes are a valid statfs, which the call fills in.
    let found = unsafe {
        let mut found = std::mem::zeroed::<libc::statfs>();
        if libc::fstatfs(file.as_raw_fd(), &mut found) != 0 {
            return Err(io::Error::last_os_error());
        }
        found
    };
    let page = found.f_bsize as usize;
    Ok((found.f_type == libc::HUGETLBFS_MAGIC && page.is_power_of_two()).then_some(page))
}

fn base_page() -> usize {
    // SAFETY: takes no memory; every system knows its page size.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// Where a mapping is, for the handler.
#[derive(Debug)]
struct Place {
    /// Odd while the place changes hands.
    version: AtomicUsize,
    /// First address, and the first behind; both zero: free.
    start: AtomicUsize,
    end: AtomicUsize,
    /// Bytes of its pages.
    page: AtomicUsize,
    lost: AtomicBool,
}

/// Places are never freed, so that the handler may walk through them at any time.
struct Table {
    places: [Place; 512],
    more: AtomicPtr<Table>,
}

static FIRST: Table = Table::new();

/// Held while a place is taken or given up; not by the handler.
static CHANGING: Mutex<()> = Mutex::new(());

impl Table {
    const fn new() -> Table {
        Table { places: [const { Place::free() }; 512], more: AtomicPtr::new(null_mut()) }
    }

    fn next(&self) -> Option<&'static Table> {
        // SAFETY: null, or a table that was leaked.
        unsafe { self.more.load(Acquire).as_ref() }
    }

    fn all() -> impl Iterator<Item = &'static Place> {
        std::iter::successors(Some(&FIRST), |table| table.next()).flat_map(|table| &table.places)
    }
}

impl Place {
    const fn free() -> Place {
        Place {
            version: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
            lost: AtomicBool::new(false),
        }
    }

    fn take(start: usize, len: usize, page: usize) -> &'static Place {
        let _changing = CHANGING.lock();
        let place = match Table::all().find(|place| place.end.load(Relaxed) == 0) {
            Some(place) => place,
            None => {
                let more: &'static Table = Box::leak(Box::new(Table::new()));
                let last = std::iter::successors(Some(&FIRST), |table| table.next()).last();
                let last = last.unwrap_or(&FIRST);
                last.more.store(std::ptr::from_ref(more).cast_mut(), Release);
                &more.places[0]
            }
        };
        place.lost.store(false, Relaxed);
        place.set(start, start + len, page);
        place
    }

    fn give_up(&self) {
        let _changing = CHANGING.lock();
        self.set(0, 0, 0);
    }

    fn set(&self, start: usize, end: usize, page: usize) {
        let version = self.version.load(Relaxed);
        self.version.store(version.wrapping_add(1), Relaxed);
        fence(Release);
        self.start.store(start, Relaxed);
        self.end.store(end, Relaxed);
        self.page.store(page, Relaxed);
        self.version.store(version.wrapping_add(2), Release);
    }

    /// Start, end and page size, if `address` is inside. A place that changes hands is nobody's whose memory was just
    /// touched: that is in use.
    fn around(&self, address: usize) -> Option<(usize, usize, usize)> {
        let version = self.version.load(Acquire);
        let found = (self.start.load(Relaxed), self.end.load(Relaxed), self.page.load(Relaxed));
        fence(Acquire);
        let steady = version.is_multiple_of(2) && self.version.load(Relaxed) == version;
        (steady && found.0 <= address && address < found.1).then_some(found)
    }
}

/// Puts zeroes instead of what is broken around `address`. False if that is not ours.
fn replace(address: usize) -> bool {
    for place in Table::all() {
        let Some((start, end, page)) = place.around(address) else { continue };
        // First, so that a reader of a zero does not find the mapping intact.
        place.lost.store(true, Release);
        LOSSES.fetch_add(1, SeqCst);
        // A file is truncated from some page on; what is behind this one is gone, too. Failing that, all of it.
        let from = (address & !(page - 1)).max(start);
        return [from, start].into_iter().any(|from| {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags =
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
            let at = from as *mut libc::c_void;
            // SAFETY: it replaces a part of a mapping that is ours, is in use, since it was just touched, and other
            // processes may change it at any time.
            unsafe { libc::mmap(at, end - from, prot, flags, -1, 0) != libc::MAP_FAILED }
        });
    }
    false
}

/// What was done at a SIGBUS before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

fn install_handler() {
    BEFORE.get_or_init(|| {
        // SAFETY: all zeroes are a valid sigaction; the handler is one for SA_SIGINFO, keeps to what
        // a handler may do, and runs on the thread's own signal stack if it has one.
        unsafe {
            let mut before = std::mem::zeroed::<libc::sigaction>();
            libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut before);
            let mut action = std::mem::zeroed::<libc::sigaction>();
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                on_sigbus;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(libc::SIGBUS, &action, null_mut());
            before
        }
    });
}

extern "C" fn on_sigbus(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel hands a valid siginfo over; of a fault it has an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // SAFETY: the thread's own errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let kept = unsafe { *errno };
    // Of the others, the touch that raised the signal is not made again when we return: it was sent.
    let is_fault = (libc::BUS_ADRALN..=libc::BUS_MCEERR_AR).contains(&code);
    if is_fault && replace(address) {
        // SAFETY: as above.
        unsafe { *errno = kept };
        return;
    }
    // SAFETY: all zeroes are the default action.
    let mut action = unsafe { std::mem::zeroed::<libc::sigaction>() };
    if let (true, Some(before)) = (is_fault, BEFORE.get()) {
        action = *before;
    }
    // SAFETY: a valid action. A fault is raised again when this returns, a signal that was sent is
    // sent again.
    unsafe {
        libc::sigaction(libc::SIGBUS, &action, null_mut());
        if !is_fault {
            libc::raise(libc::SIGBUS);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::process::ExitStatusExt;

    const PAGE: usize = 4096;

    fn file(pages: usize) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; pages * PAGE]).unwrap();
        file
    }

    fn read(mapping: &SharedMapping, at: usize) -> u8 {
        // SAFETY: inside the mapping.
        unsafe { mapping.as_ptr().add(at).read_volatile() }
    }

    fn write(mapping: &SharedMapping, at: usize) {
        // SAFETY: inside the mapping.
        unsafe { mapping.as_ptr().add(at).write_volatile(9) };
    }

    #[test]
    fn what_a_truncated_file_has_lost_reads_as_zeroes_and_the_rest_stays() {
        let (broken, whole) = (file(8), file(8));
        let [a, b] = [&broken, &whole].map(|file| SharedMapping::map(file, 0, 8 * PAGE).unwrap());
        broken.set_len(3 * PAGE as u64).unwrap();
        assert_eq!(read(&a, 3 * PAGE - 1), 7);
        assert!(!a.is_lost());
        let before = losses();
        assert_eq!(read(&a, 5 * PAGE + 100), 0);
        assert!(a.is_lost() && losses() > before);
        // In front of what was touched first, behind it, and by a write.
        assert_eq!((read(&a, 4 * PAGE), read(&a, 8 * PAGE - 1)), (0, 0));
        write(&a, 3 * PAGE);
        assert_eq!((read(&a, 3 * PAGE), read(&a, 3 * PAGE - 1)), (9, 7));
        assert!(!b.is_lost());
        assert_eq!(read(&b, 5 * PAGE), 7);
        // A new mapping of a file that is whole again has lost nothing.
        drop(a);
        broken.set_len(8 * PAGE as u64).unwrap();
        let a = SharedMapping::map(&broken, 0, 8 * PAGE).unwrap();
        assert!((read(&a, 0), read(&a, 7 * PAGE)) == (7, 0) && !a.is_lost());
    }

    #[test]
    fn threads_that_find_it_at_the_same_time_all_go_on() {
        for _ in 0..50 {
            let file = file(16);
            let mapping = SharedMapping::map(&file, 0, 16 * PAGE).unwrap();
            file.set_len(0).unwrap();
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let mapping = &mapping;
                    scope.spawn(move || (0..16).for_each(|i| write(mapping, (i ^ thread) * PAGE)));
                }
            });
            assert!(mapping.is_lost());
        }
    }

    #[test]
    fn more_mappings_than_a_table_has_places_are_all_guarded() {
        let (broken, whole) = (file(1), file(1));
        let file_of = |number| if number % 99 == 0 { &broken } else { &whole };
        let mut mappings: Vec<_> =
            (0..700).map(|i| SharedMapping::map(file_of(i), 0, PAGE).unwrap()).collect();
        broken.set_len(0).unwrap();
        assert!((0..700).all(|i| read(&mappings[i], 0) == if i % 99 == 0 { 0 } else { 7 }));
        let lost: Vec<usize> = (0..700).filter(|&i| mappings[i].is_lost()).collect();
        assert_eq!(lost, (0..700).step_by(99).collect::<Vec<_>>());
        // A place that is taken again does not remember.
        mappings.clear();
        let again: Vec<_> =
            (0..700).map(|_| SharedMapping::map(&whole, 0, PAGE).unwrap()).collect();
        assert!(again.iter().all(|mapping| !mapping.is_lost() && read(mapping, 0) == 7));
    }

    #[test]
    fn the_kernel_is_refused_what_is_lost_without_a_signal() {
        let file = file(2);
        let mapping = SharedMapping::map(&file, 0, 2 * PAGE).unwrap();
        file.set_len(0).unwrap();
        let random = File::open("/dev/urandom").unwrap();
        // SAFETY: inside the mapping.
        let read = unsafe { libc::read(random.as_raw_fd(), mapping.as_ptr().cast(), PAGE) };
        assert_eq!((read, io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EFAULT)));
        assert!(!mapping.is_lost());
    }

    #[test]
    fn a_sigbus_elsewhere_ends_the_process() {
        const CHILD: &str = "VUBLK_TEST_SIGBUS";
        let name = "io::shared_mapping::tests::a_sigbus_elsewhere_ends_the_process";
        if let Ok(kind) = std::env::var(CHILD) {
            let file = file(1);
            let _guarded = SharedMapping::map(&file, 0, PAGE).unwrap();
            if kind == "sent" {
                // SAFETY: a signal to this process.
                unsafe { libc::kill(libc::getpid(), libc::SIGBUS) };
            }
            // SAFETY: a new mapping, of a file that has nothing there.
            unsafe {
                let flags = libc::MAP_SHARED;
                let fd = file.as_raw_fd();
                let at = libc::mmap(null_mut(), 2 * PAGE, libc::PROT_READ, flags, fd, 0);
                at.cast::<u8>().add(PAGE).read_volatile();
            }
            std::process::exit(0);
        }
        for kind in ["touched", "sent"] {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            let ended = child.args(["--exact", name]).env(CHILD, kind).output().unwrap();
            assert_eq!(ended.status.signal(), Some(libc::SIGBUS), "{kind}: {ended:?}");
        }
    }
}
