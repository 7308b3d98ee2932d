use std::sync::OnceLock;

use refit::planner::{Band, Dtype, LayoutBuilder, Param, RankLayout};
use refit::transport::local::{LocalTransport, Network};
use refit::{DigestRequest, DigestRequestError, Source};

use crate::ranks;

/// Decodes a request for digests: as the bytes are, and as the body of one whose magic and checksum are right. What
/// decodes is put to a source.
pub fn digests(data: &[u8]) {
    decode(data).ok();
    let sealed = [magic(), blake3::hash(data).as_bytes(), data].concat();
    let sealed = decode(&sealed);
    let broken = matches!(sealed, Err(DigestRequestError::Magic | DigestRequestError::Damaged));
    assert!(!broken, "the seal is not right");
}

/// The first bytes of every request.
fn magic() -> &'static [u8] {
    static MAGIC: OnceLock<Vec<u8>> = OnceLock::new();
    MAGIC.get_or_init(|| {
        let layout = layout();
        let source = refit::planner::SourceLayout::new([layout.clone()]).unwrap();
        let plan = refit::planner::plan(&source, &layout, &refit::planner::PlanOptions::default());
        DigestRequest::new(&plan.unwrap()).encode()[..8].to_vec()
    })
}

fn layout() -> RankLayout {
    let mut layout = LayoutBuilder::new(0);
    let tensor = layout.tensor("t", 16, 4).unwrap();
    layout.param(Param::new("w", Dtype::F32, 16, 4).band(Band::new(tensor, 0..16, 0..4))).unwrap();
    layout.build()
}

thread_local! {
    /// A rank that is asked, which holds `w` of 256 bytes.
    static SOURCE: Source<LocalTransport> =
        ranks::source(&ranks::agent(&Network::new(), "fuzzed"), &layout());
}

fn decode(bytes: &[u8]) -> Result<(), DigestRequestError> {
    let request = DigestRequest::decode(bytes)?;
    assert_eq!(request.encode(), bytes, "there is one way to write it");
    let asked = request.ranks().find(|(rank, _)| *rank == 0).map_or(0, |(_, pieces)| pieces);
    if let Ok(answer) = SOURCE.with(|source| source.digests(&request)) {
        assert_eq!(answer.values.len(), asked);
    }
    Ok(())
}
