use std::sync::OnceLock;

use refit::planner::{LayoutBuilder, SourceLayout};
use refit::{Place, Publication, PublicationError, PublishedHeader, PublishedRegion};

/// Decodes a publication: as the bytes are, and as the body of one whose magic and checksum are right.
pub fn publication(data: &[u8]) {
    decode(data).ok();
    let sealed = [magic(), blake3::hash(data).as_bytes(), data].concat();
    let sealed = decode(&sealed);
    let broken = matches!(sealed, Err(PublicationError::Magic | PublicationError::Damaged));
    assert!(!broken, "the seal is not right");
}

/// The first bytes of every publication.
fn magic() -> &'static [u8] {
    static MAGIC: OnceLock<Vec<u8>> = OnceLock::new();
    MAGIC.get_or_init(|| {
        let empty = LayoutBuilder::new(0).build();
        let header = PublishedHeader { incarnation: 0, place: Place { address: 0, cuda: None } };
        let region = PublishedRegion { address: 0, len: 64, cuda: None };
        let publication =
            Publication::new(String::new(), vec![], empty, header, vec![], vec![region]).unwrap();
        publication.encode()[..8].to_vec()
    })
}

fn decode(bytes: &[u8]) -> Result<(), PublicationError> {
    let publication = Publication::decode(bytes)?;
    let layout = publication.layout();
    assert_eq!(layout.rank(), publication.rank());
    for param in layout.params() {
        assert!(publication.place(param.name()).is_some());
    }
    let again = Publication::decode(&publication.encode()).unwrap();
    assert_eq!(again.digest(), publication.digest());
    assert_eq!(again.layout(), layout);
    assert_eq!(again.regions(), publication.regions());
    assert_eq!(again.header(), publication.header());
    SourceLayout::new(vec![layout.clone()]).unwrap();
    Ok(())
}
