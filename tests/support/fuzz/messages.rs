use refit_service::message::{Kind, MessageError};

/// Reads a message as every kind: as the bytes are, and behind the first bytes of that kind. What is read is written again
/// in the same way.
pub fn messages(data: &[u8]) {
    for kind in Kind::ALL {
        recode(kind, data).ok();
        let named = [kind.magic(), data].concat();
        let named = recode(kind, &named);
        let unnamed = matches!(named, Err(MessageError::Magic { .. }));
        assert!(!unnamed, "the first bytes of a {kind} are not its own");
    }
}

fn recode(kind: Kind, bytes: &[u8]) -> Result<(), MessageError> {
    let again = kind.recode(bytes)?;
    assert_eq!(again, bytes, "there is one way to write a {kind}");
    Ok(())
}
