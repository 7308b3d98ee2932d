use refit_service::rendezvous::{InProcess, JobKey, Key, Life, Rendezvous, Sealed, Writer};

/// Puts bytes where sealed values are expected, and lists them with the job's key and without one: none of them is a
/// value, and the value beside them is still there.
pub fn seal(data: &[u8]) {
    let store = InProcess::new();
    let (honest, forged) = (key("honest"), key("forged"));
    for secret in [Some(&[7_u8; 32][..]), None] {
        let job_key = secret.map(|secret| JobKey::from_secret(secret).unwrap());
        let writer = Writer::new("job", "rank-0", 1).unwrap();
        let sealed = Sealed::new(store.clone(), writer, job_key).unwrap();
        sealed.put(&honest, b"value", Life::Kept).unwrap();
        store.put(&forged, data, Life::Kept).unwrap();
        let listed = sealed.list(&key("m")).unwrap();
        assert_eq!(listed.entries.get(&honest).map(Vec::as_slice), Some(&b"value"[..]));
        assert!(!listed.entries.contains_key(&forged), "what nobody sealed is a value");
        assert!(listed.refused.contains_key(&forged), "what was refused is named");
    }
}

fn key(name: &str) -> Key {
    if name == "m" { Key::new(["m"]) } else { Key::new(["m", name]) }.unwrap()
}
