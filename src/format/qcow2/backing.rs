//! The backing file that the header names.

use super::Qcow2;
use super::extensions::Extension;
use crate::block::Error;
use crate::cow::check_sound;
use crate::io::Errno;
use crate::options::bytes;

impl Qcow2 {
    pub(super) async fn change_backing(
        &self,
        name: Option<&str>,
        format: Option<&str>,
    ) -> Result<(), Error> {
        let refused = |text: &str, errno| Err(Error::new(text).with_errno(errno));
        if !self.settings.is_writable {
            return refused("Image is read-only", Errno::EPERM);
        }
        if name.is_some() && self.settings.raw_data {
            return refused("A raw data file cannot have a backing file", Errno::EINVAL);
        }
        let failed = |errno: Errno| Error::os("Could not write the header", errno);
        check_sound(self).await.map_err(failed)?;
        let mut header = self.metadata().lock_header().await;
        let mut new = header.clone();
        new.backing_file = name.map(|name| bytes::bytes_of(name).into_owned());
        new.extensions.retain(|extension| !matches!(extension, Extension::BackingFormat(_)));
        if let (Some(_), Some(format)) = (name, format) {
            new.extensions.push(Extension::BackingFormat(format.as_bytes().to_vec()));
        }
        header.write_cluster(new).await
    }
}
