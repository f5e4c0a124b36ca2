//! The namespaces of a controller, and the limits of their requests.

use super::*;

impl Inner {
    pub(super) fn active_namespaces(&self) -> Result<Vec<u32>, Failure> {
        let list = self.identify(0, cns::ACTIVE_NAMESPACES, 0, false)?;
        let ids = list.chunks_exact(4).map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]]));
        Ok(ids.take_while(|&id| id != 0).collect())
    }

    pub(super) fn namespace(&self, id: u32) -> Result<Namespace, Error> {
        if id == 0 || id == u32::MAX {
            let text = format!("there is no namespace {id}: they are numbered from 1");
            return Err(Error::new(text).with_errno(libc::EINVAL));
        }
        let absent = || {
            let known = self.active_namespaces().unwrap_or_default();
            let known: Vec<_> = known.iter().take(16).map(u32::to_string).collect();
            let text = match known.is_empty() {
                true => format!("there is no namespace {id}: the controller has none"),
                false => format!("there is no namespace {id}: there are {}", known.join(", ")),
            };
            Error::new(text).with_errno(libc::ENOENT)
        };
        if id > self.identity().namespaces {
            return Err(absent());
        }
        self.check_command_set(id)?;
        let what = format!("asking for namespace {id}");
        let data = self.identify(id, cns::NAMESPACE, 0, false).map_err(|f| match f {
            Failure::Status(status) if status.code() == Status::INVALID_NAMESPACE.code() => {
                absent()
            }
            other => other.error(&what),
        })?;
        let identity = NamespaceIdentity::parse(&data);
        if identity.blocks == 0 {
            return Err(absent());
        }
        check_format(id, &identity)?;
        let mut open = lock(&self.namespaces);
        let entry = open.entry(id).or_insert_with(|| Open { identity, blocks: Arc::default() });
        entry.identity = identity;
        entry.blocks.store(identity.blocks, Ordering::Release);
        Ok(Namespace::new(id, identity, self.limits_of(&identity), entry.blocks.clone()))
    }

    /// Refuses what is no plain disk.
    fn check_command_set(&self, id: u32) -> Result<(), Error> {
        // Descriptors came with version 1.3; a controller without them has one command set.
        let Ok(data) = self.identify(id, cns::NAMESPACE_DESCRIPTORS, 0, false) else {
            return Ok(());
        };
        let kind = match identify::command_set(&data) {
            csi::NVM => return Ok(()),
            csi::ZONED => "is zoned (ZNS)".to_owned(),
            csi::KEY_VALUE => "is a key value store".to_owned(),
            other => format!("has command set {other}"),
        };
        let text =
            format!("namespace {id} {kind}: only namespaces of the NVM command set can be used");
        Err(Error::new(text).with_errno(libc::ENOTSUP))
    }

    fn limits_of(&self, identity: &NamespaceIdentity) -> Limits {
        let shift = identity.block_shift;
        let (smallest, _) = self.capabilities.page_shifts();
        let power = |exponent: u8| 1u64.checked_shl(smallest + u32::from(exponent));
        let blocks = BLOCKS << shift;
        let controller = self.identity();
        let mdts = Some(controller.mdts).filter(|&mdts| mdts > 0).and_then(power);
        let transfer = mdts.unwrap_or(TRANSFER).min(TRANSFER).min(blocks).max(1 << shift);
        let limits = self.limits.get().copied().flatten();
        let zero = match limits {
            _ if !controller.has_write_zeroes => 0,
            // Unknown: what every command can do.
            None => transfer,
            Some(CommandLimits { write_zeroes: 0, .. }) => blocks,
            Some(CommandLimits { write_zeroes, .. }) => {
                power(write_zeroes).unwrap_or(blocks).min(blocks).max(1 << shift)
            }
        };
        let discard = match (controller.has_dataset_management, limits.unwrap_or_default()) {
            (false, _) => 0,
            (true, CommandLimits { range_blocks, all_blocks, .. }) => {
                let most = [u64::from(range_blocks), all_blocks];
                let most = most.into_iter().filter(|&most| most > 0).min();
                most.unwrap_or(u64::MAX).min(u64::from(u32::MAX)) << shift
            }
        };
        Limits { transfer: transfer as u32, zero, discard }
    }
}

fn check_format(id: u32, identity: &NamespaceIdentity) -> Result<(), Error> {
    if identity.metadata != 0 {
        return Err(Error::new(format!(
            "namespace {id} has {} bytes of metadata with each block, which is not supported: choose \
             a format without (nvme format --lbaf)",
            identity.metadata
        ))
        .with_errno(libc::ENOTSUP));
    }
    if !matches!(identity.block_shift, 9 | 12) {
        return Err(Error::new(format!(
            "namespace {id} has blocks of 2^{} bytes; 512 and 4096 bytes are supported",
            identity.block_shift
        ))
        .with_errno(libc::ENOTSUP));
    }
    Ok(())
}
