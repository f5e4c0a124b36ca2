//! Changing from root to another user, once everything that needs root is open.

use crate::io::Errno;
use std::ffi::CString;
use std::os::unix::fs::lchown;
use std::path::Path;
use std::str::FromStr;

/// A user, and its groups. From the command line: `NAME`, or `UID`, with the groups of the user
/// database, or either of them and `:GID`, with this group alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    id: libc::uid_t,
    group: libc::gid_t,
    /// All that it is in.
    groups: Vec<libc::gid_t>,
}

impl FromStr for User {
    type Err = String;

    fn from_str(text: &str) -> Result<User, String> {
        let (name, group) = match text.split_once(':') {
            Some((name, group)) => (name, Some(group)),
            None => (text, None),
        };
        let group: Option<libc::gid_t> = match group.map(str::parse) {
            None => None,
            Some(Ok(group)) => Some(group),
            Some(Err(_)) => return Err(format!("'{text}': the group is not a numeric ID")),
        };
        let number: Option<libc::uid_t> = name.parse().ok();
        match (number, group, look_up(name, number)) {
            (Some(id), Some(group), _) | (None, Some(group), Some(User { id, .. })) => {
                Ok(User { id, group, groups: vec![group] })
            }
            (_, None, Some(user)) => Ok(user),
            (Some(_), None, None) => {
                Err(format!("there is no user '{name}': give its group too, {name}:GID"))
            }
            (None, _, None) => Err(format!("there is no user '{name}'")),
        }
    }
}

/// A user of the system's database, by name or number.
fn look_up(name: &str, number: Option<libc::uid_t>) -> Option<User> {
    let name = CString::new(name).ok()?;
    let mut buffer = vec![0; 16 << 10];
    // SAFETY: all zeroes is a valid value of the structure.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    let (text, len) = (buffer.as_mut_ptr(), buffer.len());
    // SAFETY: the buffer is as long as is said, and it and the others outlive the use of `entry`.
    unsafe {
        match number {
            Some(id) => libc::getpwuid_r(id, &mut entry, text, len, &mut found),
            None => libc::getpwnam_r(name.as_ptr(), &mut entry, text, len, &mut found),
        };
    }
    if found.is_null() {
        return None;
    }
    let mut groups = vec![0; 1 << 10];
    let mut count = groups.len() as libc::c_int;
    // SAFETY: the entry's name is in the buffer; the list has room for `count` groups.
    let all =
        unsafe { libc::getgrouplist(entry.pw_name, entry.pw_gid, groups.as_mut_ptr(), &mut count) };
    // Of a user in more groups than that, those that there was room for.
    groups.truncate(if all < 0 { groups.len() } else { count.max(0) as usize });
    Some(User { id: entry.pw_uid, group: entry.pw_gid, groups })
}

impl User {
    /// Gives it a file that this process has made.
    pub fn take(&self, file: &Path) -> Result<(), String> {
        lchown(file, Some(self.id), Some(self.group))
            .map_err(|e| format!("cannot give '{}' to user {}: {e}", file.display(), self.id))
    }

    /// Switches all threads of the process to this user, for good.
    ///
    /// # Errors
    /// The process may not switch to the user. It must exit then.
    pub fn drop_privileges(&self) -> Result<(), String> {
        let (id, group) = (self.id, self.group);
        let failed = || Err(format!("cannot become user {id}, group {group}: {}", Errno::last()));
        // The C library does each for all threads. Groups first: later it may not be done.
        // SAFETY: the list is as long as is said.
        if unsafe { libc::setgroups(self.groups.len(), self.groups.as_ptr()) } != 0 {
            return failed();
        }
        // SAFETY: names no memory.
        if unsafe { libc::setresgid(group, group, group) } != 0 {
            return failed();
        }
        // SAFETY: names no memory.
        if unsafe { libc::setresuid(id, id, id) } != 0 {
            return failed();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_names_or_numbers_and_bring_their_groups_unless_one_is_given() {
        let root: User = "root".parse().unwrap();
        assert_eq!((root.id, root.group), (0, 0));
        assert!(root.groups.contains(&0));
        assert_eq!("0".parse(), Ok(root));
        let (id, group) = (4_000_000_001, 4_000_000_002);
        let given = User { id, group, groups: vec![group] };
        assert_eq!("4000000001:4000000002".parse(), Ok(given));
        assert_eq!("root:7".parse(), Ok(User { id: 0, group: 7, groups: vec![7] }));
        for (text, words) in [
            ("no such user", "there is no user 'no such user'"),
            ("4000000001", "give its group too, 4000000001:GID"),
            ("root:wheels", "'root:wheels': the group is not a numeric ID"),
            ("", "there is no user ''"),
        ] {
            let error = text.parse::<User>().unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
