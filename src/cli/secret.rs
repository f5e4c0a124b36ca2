//! The passphrase of `--secret-file`: a file of the user's, or one of systemd's credentials.

use crate::crypto::object;
use crate::options::bytes;
use std::path::{Path, PathBuf};

/// Makes the file's bytes a secret of this name.
///
/// # Errors
/// One line: it cannot be read.
pub fn add(id: &str, file: &Path) -> Result<(), String> {
    let path = place(file, std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from));
    let name = bytes::text_of_name(path.as_os_str());
    object::add_file(id, &name).map_err(|error| format!("--secret-file: {error}"))
}

/// A name alone is that of a credential, if there is one.
fn place(file: &Path, credentials: Option<PathBuf>) -> PathBuf {
    let is_name = file.components().count() == 1;
    match credentials.map(|folder| folder.join(file)) {
        Some(credential) if is_name && credential.is_file() => credential,
        _ => file.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_alone_is_a_credential_if_there_is_one() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("disk"), "abc").unwrap();
        let found = |name: &str| place(Path::new(name), Some(folder.path().to_owned()));
        assert_eq!(found("disk"), folder.path().join("disk"));
        assert_eq!(found("other"), Path::new("other"));
        assert_eq!(found("./disk"), Path::new("./disk"));
        assert_eq!(place(Path::new("disk"), None), Path::new("disk"));
    }
}
