//! Whether, and how, the memory of another agent can be mapped: a function of facts, so that a table can test it.

use crate::Cause;

/// What decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) same_host: bool,
    /// Two agents of one process, on one host by that.
    pub(super) same_process: bool,
    pub(super) access: Access,
}

/// Whether our device reads the memory of theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// They are one device.
    Same,
    /// It does.
    Granted(Path),
    /// It cannot.
    Denied,
    /// This process does not see their device. The driver maps its memory all the same, or says that it cannot.
    Unseen,
}

/// What the bytes go over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    /// Links between devices.
    NvLink,
    /// The host's bus.
    Bus,
}

/// How memory is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// By the addresses it has: both agents live in this process.
    Direct,
    /// By handles that the driver makes for other processes.
    Ipc,
}

/// The way to an agent's memory, or why there is none.
pub(super) fn way(facts: Facts) -> Result<Way, Cause> {
    if !facts.same_process && !facts.same_host {
        return Err(Cause::OtherHost);
    }
    if facts.access == Access::Denied {
        return Err(Cause::NoAccess);
    }
    Ok(if facts.same_process { Way::Direct } else { Way::Ipc })
}

/// The way in words: `same host, CUDA IPC, device 1 <- device 0 (NVLink)`.
pub(super) fn describe(way: Way, access: Access, ours: u32, theirs: u32) -> String {
    let how = match way {
        Way::Direct => "same process, direct access",
        Way::Ipc => "same host, CUDA IPC",
    };
    let path = match access {
        Access::Same => "the same device",
        Access::Granted(Path::NvLink) => "NVLink",
        Access::Granted(Path::Bus) => "no NVLink",
        // Their number for it: there is none of ours.
        Access::Unseen => "as that process counts; not visible here",
        Access::Denied => "no access",
    };
    format!("{how}, device {ours} <- device {theirs} ({path})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_of_facts_has_one_answer() {
        let nvlink = Access::Granted(Path::NvLink);
        let bus = Access::Granted(Path::Bus);
        let table = [
            // same host, same process, access -> the way
            (true, true, Access::Same, Ok(Way::Direct)),
            (true, true, nvlink, Ok(Way::Direct)),
            (true, true, bus, Ok(Way::Direct)),
            (true, true, Access::Denied, Err(Cause::NoAccess)),
            (true, true, Access::Unseen, Ok(Way::Direct)),
            (true, false, Access::Same, Ok(Way::Ipc)),
            (true, false, nvlink, Ok(Way::Ipc)),
            (true, false, bus, Ok(Way::Ipc)),
            (true, false, Access::Denied, Err(Cause::NoAccess)),
            (true, false, Access::Unseen, Ok(Way::Ipc)),
            // On another host nothing else matters: a device of that name is a mistake.
            (false, false, Access::Same, Err(Cause::OtherHost)),
            (false, false, nvlink, Err(Cause::OtherHost)),
            (false, false, bus, Err(Cause::OtherHost)),
            (false, false, Access::Denied, Err(Cause::OtherHost)),
            (false, false, Access::Unseen, Err(Cause::OtherHost)),
        ];
        for (same_host, same_process, access, expected) in table {
            let facts = Facts { same_host, same_process, access };
            assert_eq!(way(facts), expected, "{facts:?}");
        }
    }

    #[test]
    fn ways_are_described_by_what_decided_them() {
        assert_eq!(
            describe(Way::Ipc, Access::Granted(Path::NvLink), 1, 0),
            "same host, CUDA IPC, device 1 <- device 0 (NVLink)"
        );
        assert_eq!(
            describe(Way::Direct, Access::Same, 2, 2),
            "same process, direct access, device 2 <- device 2 (the same device)"
        );
    }
}
