//! Changes of key slots: `amend` with QEMU's options and rules.

use super::header::{Header, SLOTS};
use super::options;
use super::slots::{self, Place};
use crate::block::Error;
use crate::block::create::{CreateOption, ValueType};
use crate::crypto::{Hidden, secrets};
use crate::options::{Map, Value};

pub const OPTIONS: &[CreateOption] = &[
    CreateOption::new(
        "state",
        ValueType::Str,
        "Select new state of affected keyslots (active/inactive)",
    ),
    CreateOption::new("new-secret", ValueType::Str, "New secret to set in the matching keyslots"),
    CreateOption::new("old-secret", ValueType::Str, "Select all keyslots that match this password"),
    CreateOption::new("keyslot", ValueType::Number, "Select a single keyslot to modify explicitly"),
    CreateOption::new("iter-time", ValueType::Number, "Time to spend in PBKDF in milliseconds"),
    CreateOption {
        is_newer: true,
        ..CreateOption::new("force", ValueType::Bool, "Allow what destroys the disk (as --force)")
    },
];

/// What is to become of the slots.
struct Change {
    new_secret: Option<String>,
    old_secret: Option<String>,
    slot: Option<usize>,
}

impl Change {
    fn slot(&self, header: &Header) -> Result<Option<usize>, Error> {
        let wrong = |n| {
            Error::new(format!(
                "Invalid keyslot {n} specified, must be between 0 and {}",
                SLOTS - 1
            ))
        };
        match self.slot {
            Some(n) if n >= header.slots.len() => Err(wrong(n)),
            slot => Ok(slot),
        }
    }
}

/// Changes the slots. `opened` is the name of the secret that the image was opened with.
///
/// # Errors
/// In QEMU's words, before anything has changed; or I/O failed.
pub async fn amend(
    place: Place<'_>,
    header: &mut Header,
    opened: Option<&str>,
    changes: &Map,
) -> Result<(), Error> {
    let text = |name: &str| changes.get(name).and_then(Value::as_str).map(str::to_owned);
    let is_active = match text("state").as_deref() {
        Some("active") => true,
        Some("inactive") => false,
        Some(other) => {
            return Err(Error::new(format!("Parameter 'state' does not accept value '{other}'")));
        }
        None => return Err(Error::new("Parameter 'state' is missing")),
    };
    let force = matches!(changes.get("force"), Some(Value::Bool(true)));
    let slot = match changes.get("keyslot") {
        Some(Value::Int(n)) => Some(usize::try_from(*n).unwrap_or(usize::MAX)),
        _ => None,
    };
    let change = Change { new_secret: text("new-secret"), old_secret: text("old-secret"), slot };
    if is_active {
        let time = options::time(changes, "iter-time")?;
        activate(place, header, opened, &change, (time, force)).await
    } else {
        if changes.contains("iter-time") {
            return Err(Error::new("'iter-time' must not be given when erasing keyslots"));
        }
        deactivate(place, header, &change, force).await
    }
}

async fn activate(
    place: Place<'_>,
    header: &mut Header,
    opened: Option<&str>,
    change: &Change,
    (time, force): (std::time::Duration, bool),
) -> Result<(), Error> {
    let new = change.new_secret.as_deref();
    let new = new.ok_or_else(|| Error::new("'new-secret' is required to activate a keyslot"))?;
    if change.old_secret.is_some() {
        return Err(Error::new("'old-secret' must not be given when activating keyslots"));
    }
    let slot = change.slot(header)?;
    if let Some(n) = slot
        && header.slots[n].is_active
        && !force
    {
        return Err(Error::new(format!(
            "Refusing to overwrite active keyslot {n} - please erase it first"
        )));
    }
    let free = || header.slots.iter().position(|slot| !slot.is_active);
    let n = slot
        .or_else(free)
        .ok_or_else(|| Error::new("Can't add a keyslot - all keyslots are in use"))?;
    let old = opened.ok_or_else(|| Error::new("Parameter 'key-secret' is required for cipher"))?;
    let old = secrets::passphrase(old).map_err(Error::new)?;
    let new = secrets::passphrase(new).map_err(Error::new)?;
    let found = slots::unlock(place, header, &old).await?;
    let (key, _) = found.ok_or_else(|| Error::new("Failed to retrieve the master key"))?;
    if header.slots[n].is_active {
        slots::erase(place, header, n).await?;
    }
    slots::fill(place, header, n, (&key, &new), time).await
}

async fn deactivate(
    place: Place<'_>,
    header: &mut Header,
    change: &Change,
    force: bool,
) -> Result<(), Error> {
    if change.new_secret.is_some() {
        return Err(Error::new("'new-secret' must not be given when erasing keyslots"));
    }
    let slot = change.slot(header)?;
    let old = change.old_secret.as_deref().map(secrets::passphrase).transpose();
    let old = old.map_err(Error::new)?;
    let active = header.slots.iter().filter(|slot| slot.is_active).count();
    let last = |n| {
        Error::new(format!(
            "Attempt to erase the only active keyslot {n} which will erase all the data in the image irreversibly - \
             refusing operation"
        ))
    };
    match (slot, old) {
        (Some(n), old) => {
            if let Some(old) = old
                && !opens(place, header, n, &old).await?
            {
                return Err(Error::new(format!(
                    "Given keyslot {n} doesn't contain the given old password for erase operation"
                )));
            }
            if !force && !header.slots[n].is_active {
                // QEMU's sentence ends with a blank.
                return Err(Error::new(format!("Given keyslot {n} is already erased (inactive) ")));
            }
            if !force && active == 1 {
                return Err(last(n));
            }
            slots::erase(place, header, n).await
        }
        (None, Some(old)) => {
            let mut matching = Vec::new();
            for n in 0..header.slots.len() {
                if opens(place, header, n, &old).await? {
                    matching.push(n);
                }
            }
            if matching.is_empty() {
                return Err(Error::new(
                    "No keyslots match given (old) password for erase operation",
                ));
            }
            if !force && matching.len() == active {
                return Err(Error::new(
                    "All the active keyslots match the (old) password that was given and erasing \
                     them will erase all the data in the image irreversibly - refusing operation",
                ));
            }
            for n in matching {
                slots::erase(place, header, n).await?;
            }
            Ok(())
        }
        (None, None) => Err(Error::new(
            "To erase keyslot(s), either explicit keyslot index or the password \
                            currently contained in them must be given",
        )),
    }
}

async fn opens(
    place: Place<'_>,
    header: &Header,
    n: usize,
    passphrase: &Hidden,
) -> Result<bool, Error> {
    if !header.slots[n].is_active {
        return Ok(false);
    }
    Ok(slots::unlock_slot(place, header, n, passphrase).await?.is_some())
}
