//! Layouts of mixture-of-experts models as Megatron-Core would hold them, written down obviously: one loop over the
//! layers, one line per parameter. It is what plans are measured on, not what a trainer is read by.

use std::ops::Range;

use refit::planner::{Band, Dtype, LayoutBuilder, LayoutError, Param, RankLayout, TensorId};

/// A decoder with multi-head latent attention and routed experts: DeepSeek-V3 and what is built like it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moe {
    /// Decoder layers.
    pub layers: u64,
    /// How many of them, from the first, have no experts.
    pub dense_layers: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Attention heads.
    pub heads: u64,
    /// Rank of the compressed queries.
    pub q_rank: u64,
    /// Rank of the compressed keys and values.
    pub kv_rank: u64,
    /// Per head: query and key dimensions without position.
    pub nope: u64,
    /// Per head: query dimensions with position; one such key is shared by all heads.
    pub rope: u64,
    /// Per head: value dimensions.
    pub value: u64,
    /// Inner width of a dense layer.
    pub dense_inner: u64,
    /// Inner width of one expert, and of the shared expert.
    pub expert_inner: u64,
    /// Routed experts of a layer.
    pub experts: u64,
    /// Tokens that can be embedded.
    pub vocab: u64,
}

/// How one side shares a model out. Experts are not sharded over tensor-parallel ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sharding {
    /// All ranks; whatever the other two do not divide are copies.
    pub ranks: u32,
    /// Tensor-parallel size of everything but routed experts.
    pub tp: u32,
    /// Expert-parallel size.
    pub ep: u32,
}

impl Sharding {
    /// Ranks until layouts repeat: the least common multiple of the parallel sizes.
    #[must_use]
    pub fn distinct(&self) -> u32 {
        let (mut a, mut b) = (self.tp.max(1), self.ep.max(1));
        while b != 0 {
            (a, b) = (b, a % b);
        }
        (self.tp.max(1) / a).saturating_mul(self.ep.max(1)).min(self.ranks)
    }
}

/// DeepSeek-V3 without its multi-token prediction layer.
pub const DEEPSEEK_V3: Moe = Moe {
    layers: 61,
    dense_layers: 3,
    hidden: 7168,
    heads: 128,
    q_rank: 1536,
    kv_rank: 512,
    nope: 128,
    rope: 64,
    value: 128,
    dense_inner: 18_432,
    expert_inner: 2048,
    experts: 256,
    vocab: 129_280,
};

/// Kimi-K2.
pub const KIMI_K2: Moe =
    Moe { dense_layers: 1, heads: 64, experts: 384, vocab: 163_840, ..DEEPSEEK_V3 };

/// The layout of one rank, bf16 but for the experts' routing bias.
///
/// # Errors
/// [`LayoutError`] for sizes that make no layout: experts that the expert-parallel size does not divide, say.
pub fn layout(model: &Moe, sharding: Sharding, rank: u32) -> Result<RankLayout, LayoutError> {
    let Moe { hidden, heads, q_rank, kv_rank, nope, rope, value, .. } = *model;
    let tp = Share::new(rank, sharding.tp);
    let mut held = Held::new(rank);

    held.column("embedding.word_embeddings", "model.embed_tokens", tp, model.vocab, hidden)?;
    held.column("output_layer", "lm_head", tp, model.vocab, hidden)?;
    held.whole("decoder.final_layernorm", "model.norm", hidden, 1)?;
    for layer in 0..model.layers {
        held.below(format!("decoder.layers.{layer}."), format!("model.layers.{layer}."));
        held.whole("input_layernorm", "input_layernorm", hidden, 1)?;
        held.whole("self_attention.linear_q_down_proj", "self_attn.q_a_proj", q_rank, hidden)?;
        held.whole("self_attention.q_layernorm", "self_attn.q_a_layernorm", q_rank, 1)?;
        let queries = heads * (nope + rope);
        held.column("self_attention.linear_q_up_proj", "self_attn.q_b_proj", tp, queries, q_rank)?;
        let compressed = kv_rank + rope;
        held.whole(
            "self_attention.linear_kv_down_proj",
            "self_attn.kv_a_proj_with_mqa",
            compressed,
            hidden,
        )?;
        held.whole("self_attention.kv_layernorm", "self_attn.kv_a_layernorm", kv_rank, 1)?;
        let keys_values = heads * (nope + value);
        held.column(
            "self_attention.linear_kv_up_proj",
            "self_attn.kv_b_proj",
            tp,
            keys_values,
            kv_rank,
        )?;
        held.row("self_attention.linear_proj", "self_attn.o_proj", tp, hidden, heads * value)?;
        held.whole("pre_mlp_layernorm", "post_attention_layernorm", hidden, 1)?;
        if layer < model.dense_layers {
            held.gated("mlp.linear_fc1", "mlp", tp, model.dense_inner, hidden)?;
            held.row("mlp.linear_fc2", "mlp.down_proj", tp, hidden, model.dense_inner)?;
        } else {
            experts(&mut held, model, sharding, rank)?;
        }
    }
    Ok(held.builder.build())
}

fn experts(held: &mut Held, model: &Moe, sharding: Sharding, rank: u32) -> Result<(), LayoutError> {
    let Moe { hidden, expert_inner: inner, experts, .. } = *model;
    let tp = Share::new(rank, sharding.tp);
    held.whole("mlp.router", "mlp.gate", experts, hidden)?;
    held.routing_bias("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", experts)?;
    held.gated("mlp.shared_experts.linear_fc1", "mlp.shared_experts", tp, inner, hidden)?;
    held.row("mlp.shared_experts.linear_fc2", "mlp.shared_experts.down_proj", tp, hidden, inner)?;
    for (local, expert) in Share::new(rank, sharding.ep).of(experts).enumerate() {
        let ours = format!("mlp.experts.linear_fc1.weight{local}");
        let theirs = format!("mlp.experts.{expert}");
        held.gated(&ours, &theirs, Share::new(0, 1), inner, hidden)?;
        let ours = format!("mlp.experts.linear_fc2.weight{local}");
        held.whole(&ours, &format!("{theirs}.down_proj"), hidden, inner)?;
    }
    Ok(())
}

/// A place in a group that shares something out evenly. Ranks are dealt to the groups' places in turn.
#[derive(Clone, Copy)]
struct Share {
    place: u64,
    places: u64,
}

impl Share {
    fn new(rank: u32, places: u32) -> Self {
        let places = places.max(1);
        Self { place: u64::from(rank % places), places: u64::from(places) }
    }

    /// This place's part of `len`.
    fn of(self, len: u64) -> Range<u64> {
        let part = len / self.places;
        self.place * part..(self.place + 1) * part
    }
}

/// What a rank holds so far. Names are given below a prefix of either side and without their `.weight`.
struct Held {
    builder: LayoutBuilder,
    ours: String,
    theirs: String,
}

impl Held {
    fn new(rank: u32) -> Self {
        Self { builder: LayoutBuilder::new(rank), ours: String::new(), theirs: String::new() }
    }

    fn below(&mut self, ours: String, theirs: String) {
        (self.ours, self.theirs) = (ours, theirs);
    }

    fn tensor(&mut self, name: &str, rows: u64, cols: u64) -> Result<TensorId, LayoutError> {
        self.builder.tensor(&format!("{}{name}.weight", self.theirs), rows, cols)
    }

    fn param(
        &mut self,
        name: &str,
        rows: u64,
        cols: u64,
        bands: Vec<Band>,
    ) -> Result<(), LayoutError> {
        // A grouped linear layer counts its weights itself.
        let weight = if name.starts_with("mlp.experts.") { "" } else { ".weight" };
        let name = format!("{}{name}{weight}", self.ours);
        self.builder.param(Param::new(name, Dtype::Bf16, rows, cols).bands(bands))?;
        Ok(())
    }

    /// Every rank has all of it.
    fn whole(&mut self, ours: &str, theirs: &str, rows: u64, cols: u64) -> Result<(), LayoutError> {
        let tensor = self.tensor(theirs, rows, cols)?;
        self.param(ours, rows, cols, vec![Band::new(tensor, 0..rows, 0..cols)])
    }

    /// Every rank has some of its rows.
    fn column(
        &mut self,
        ours: &str,
        theirs: &str,
        share: Share,
        rows: u64,
        cols: u64,
    ) -> Result<(), LayoutError> {
        let tensor = self.tensor(theirs, rows, cols)?;
        let held = share.of(rows);
        let height = held.end - held.start;
        self.param(ours, height, cols, vec![Band::new(tensor, held, 0..cols)])
    }

    /// Every rank has some of its columns.
    fn row(
        &mut self,
        ours: &str,
        theirs: &str,
        share: Share,
        rows: u64,
        cols: u64,
    ) -> Result<(), LayoutError> {
        let tensor = self.tensor(theirs, rows, cols)?;
        let held = share.of(cols);
        let width = held.end - held.start;
        self.param(ours, rows, width, vec![Band::new(tensor, 0..rows, held)])
    }

    /// Every rank has some rows of a gate and, below them, the same rows of an up projection.
    fn gated(
        &mut self,
        ours: &str,
        theirs: &str,
        share: Share,
        rows: u64,
        cols: u64,
    ) -> Result<(), LayoutError> {
        let gate = self.tensor(&format!("{theirs}.gate_proj"), rows, cols)?;
        let up = self.tensor(&format!("{theirs}.up_proj"), rows, cols)?;
        let held = share.of(rows);
        let height = held.end - held.start;
        let bands = vec![
            Band::new(gate, held.clone(), 0..cols),
            Band::new(up, held, 0..cols).at(height, 0),
        ];
        self.param(ours, 2 * height, cols, bands)
    }

    /// A vector in f32 that every rank has all of; its name is complete.
    fn routing_bias(&mut self, ours: &str, theirs: &str, rows: u64) -> Result<(), LayoutError> {
        let tensor = self.builder.tensor(&format!("{}{theirs}", self.theirs), rows, 1)?;
        let name = format!("{}{ours}", self.ours);
        let band = Band::new(tensor, 0..rows, 0..1);
        self.builder.param(Param::new(name, Dtype::F32, rows, 1).band(band))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_holds_what_megatron_would() {
        let sharding = Sharding { ranks: 256, tp: 8, ep: 32 };
        let kimi = layout(&KIMI_K2, sharding, 0).unwrap();
        // 61 times attention and two norms, one dense layer, 60 layers of 12 experts, three tensors of the whole.
        assert_eq!(kimi.params().len(), 61 * 9 + 2 + 60 * (4 + 12 * 2) + 3);
        // All ranks together hold the 1.03 trillion parameters once, besides what is replicated.
        let experts: u64 = (0..32)
            .flat_map(|rank| layout(&KIMI_K2, sharding, rank).unwrap().params().to_vec())
            .filter(|param| param.name().contains(".experts."))
            .map(|param| param.rows() * param.cols())
            .sum();
        assert_eq!(experts, 60 * 384 * 3 * 7168 * 2048);
        assert_eq!(
            (sharding.distinct(), Sharding { tp: 6, ep: 4, ..sharding }.distinct()),
            (32, 12)
        );
        // Copies differ in nothing but their number.
        let copy = layout(&KIMI_K2, sharding, 32).unwrap();
        assert_eq!((copy.params(), copy.tensors()), (kimi.params(), kimi.tensors()));
        assert_eq!(
            layout(&DEEPSEEK_V3, sharding, 0).unwrap().params().len(),
            61 * 9 + 6 + 58 * (4 + 8 * 2) + 3
        );
    }
}
