//! Mixtures of experts: router, routed experts, experts that every token visits.

use alloc::format;
use alloc::string::String;

use refit_planner::Dtype;

use super::norm;
use crate::roles::{GatedMlp, Over, Placement, Replicated, Row, SourceRole, Stack, TargetRole};
use crate::slots::{Place, Slots, te};
use crate::{ModelConfig, Moe, TranslateError};

/// The intermediate size of routed experts in errors.
pub(crate) const ROUTED: &str = "moe_intermediate_size";

/// A mixture of gated experts in place of a layer's dense MLP: what families call its parts, and which it has.
///
/// Megatron-Core calls everything `mlp.`. Start from [`Experts::MLP`]. Sizes are those of [`crate::Moe`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Experts {
    /// What stands before the logical and the engine's names.
    pub(crate) module: &'static str,
    /// The router's module.
    pub(crate) router: &'static str,
    /// Logical names of a routed expert's gate, up and down projection.
    pub(crate) projections: [&'static str; 3],
    /// Whether the router corrects its scores by a bias that it learns apart: in f32 whatever the model is in, a
    /// persistent buffer of the trainer's that is in no list of parameters.
    pub(crate) score_bias: bool,
    /// Experts that every token visits.
    pub(crate) shared: Option<Shared>,
}

/// Experts that every token visits, as one gated MLP.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shared {
    /// Their module, logical and the engine's.
    pub(crate) module: &'static str,
    /// The engine's and the logical module that weighs them, a row of `hidden_size`, where they are weighed.
    pub(crate) gate: Option<&'static str>,
}

impl Experts {
    /// The commonest names; routed experts only, scores as they are.
    pub(crate) const MLP: Self = Self {
        module: "mlp.",
        router: "gate",
        projections: ["gate_proj", "up_proj", "down_proj"],
        score_bias: false,
        shared: None,
    };

    /// All of it, and the norm before it.
    pub(crate) fn slots(
        &self,
        config: &ModelConfig,
        slots: &mut Slots,
    ) -> Result<(), TranslateError> {
        self.router(config, slots)?;
        self.routed(config, slots)?;
        self.shared(config, slots)
    }

    /// The norm and the router, `[experts, hidden_size]`: whole on every rank of both sides.
    pub(crate) fn router(
        &self,
        config: &ModelConfig,
        slots: &mut Slots,
    ) -> Result<(), TranslateError> {
        slots.pair(
            norm(config.hidden_size),
            ["post_attention_layernorm.weight"],
            "pre_mlp_layernorm.weight",
            "post_attention_layernorm.weight",
        );
        let (Self { module, router, .. }, experts) = (self, config.moe()?.experts);
        let name = format!("{module}{router}.weight");
        let role = Replicated { rows: experts, cols: Some(config.hidden_size) };
        slots.pair(role, [name.clone()], "mlp.router.weight", name);
        if !self.score_bias {
            slots.source(norm(experts), [format!("{module}{router}.bias")], "mlp.router.expert_bias").unwanted(
                "the engine of this model corrects no scores, so it would choose other experts than the trainer; \
                 where the checkpoint has this bias, set topk_method to noaux_tc in config.json on both sides",
            );
        } else {
            let name = format!("{module}{router}.e_score_correction_bias");
            slots
                .pair(norm(experts), [name.clone()], "mlp.router.expert_bias", name)
                .dtype(Dtype::F32);
        }
        Ok(())
    }

    fn routed(&self, config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
        let (moe, hidden) = (config.moe()?, config.hidden_size);
        let intermediate = moe.intermediate_size;
        let [gate, up, down] = self.projections;
        let of =
            |expert, projection| format!("{}experts.{expert}.{projection}.weight", self.module);
        let fc1 = GatedMlp { what: ROUTED, intermediate, cols: Some(hidden) };
        let w13 = PerExpert { linear: "linear_fc1.weight", fused: "w13_weight" };
        w13.slots(moe, self.module, fc1, fc1, |expert| [of(expert, gate), of(expert, up)], slots)?;
        let fc2 = Row { rows: hidden, what: ROUTED, cols: intermediate };
        let w2 = PerExpert { linear: "linear_fc2.weight", fused: "w2_weight" };
        w2.slots(moe, self.module, fc2, fc2, |expert| [of(expert, down)], slots)
    }

    /// In the dense layers' tensor-parallel group, on the trainer's side too: not that of routed experts.
    fn shared(&self, config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
        let Some(Shared { module, gate }) = self.shared else { return Ok(()) };
        let hidden = config.hidden_size;
        let what = "shared_intermediate_size";
        let intermediate = config.moe()?.shared_intermediate_size;
        let intermediate = intermediate.ok_or(TranslateError::Zero { what })?;
        let of = |projection| format!("{}{module}.{projection}.weight", self.module);
        slots.pair(
            Over::shared_experts(GatedMlp { what, intermediate, cols: Some(hidden) }),
            [of("gate_proj"), of("up_proj")],
            "mlp.shared_experts.linear_fc1.weight",
            of("gate_up_proj"),
        );
        slots.pair(
            Over::shared_experts(Row { rows: hidden, what, cols: intermediate }),
            [of("down_proj")],
            "mlp.shared_experts.linear_fc2.weight",
            of("down_proj"),
        );
        if let Some(gate) = gate {
            let name = format!("{}{gate}.weight", self.module);
            let role = Replicated { rows: 1, cols: Some(hidden) };
            slots.pair(role, [name.clone()], "mlp.shared_experts.gate_weight", name);
        }
        Ok(())
    }
}

/// The experts of a family that has nothing but routed ones in every layer.
///
/// # Errors
/// [`TranslateError::MissingGroup`], [`TranslateError::Combination`].
pub(crate) fn routed_in_every_layer(config: &ModelConfig) -> Result<&Moe, TranslateError> {
    let moe = routed_only(config)?;
    if !moe.dense_layers.is_empty() {
        let why = "this family has experts in every layer";
        return Err(TranslateError::Combination { what: "dense_layers", why });
    }
    Ok(moe)
}

/// The experts of a family that has nothing but routed ones in its layers with experts.
///
/// # Errors
/// [`TranslateError::MissingGroup`], [`TranslateError::Combination`].
pub(crate) fn routed_only(config: &ModelConfig) -> Result<&Moe, TranslateError> {
    let moe = config.moe()?;
    if moe.shared_intermediate_size.is_some() {
        let why = "this family has routed experts only";
        return Err(TranslateError::Combination { what: "shared experts", why });
    }
    Ok(moe)
}

/// Refuses engines that have more tensor-parallel ranks than experts, for families whose class in vLLM does.
///
/// # Errors
/// [`TranslateError::Combination`].
pub(crate) fn fewer_ranks(moe: &Moe, slots: &Slots) -> Result<(), TranslateError> {
    if let Place::Target(at) = slots.place()
        && at.tp.size() > moe.experts
    {
        let what = "vllm tp_size beyond the number of experts";
        let why = "vLLM's class of this family refuses it";
        return Err(TranslateError::Combination { what, why });
    }
    Ok(())
}

/// A parameter that every routed expert has: on the trainer's side one per local expert, on the engine's one of all
/// local experts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PerExpert {
    /// The trainer's linear layer and its parameter, as in `linear_fc1.weight`.
    pub(crate) linear: &'static str,
    /// What the engine calls it, as in `w13_weight`.
    pub(crate) fused: &'static str,
}

impl PerExpert {
    /// The slots, in the engine's module `module`; `logical` names the logical tensors of an expert. Roles are those of
    /// one expert.
    pub(crate) fn slots<L: IntoIterator<Item = String>>(
        self,
        moe: &Moe,
        module: &str,
        source: impl SourceRole + Copy + 'static,
        target: impl TargetRole + 'static,
        logical: impl Fn(u64) -> L,
        slots: &mut Slots,
    ) -> Result<(), TranslateError> {
        let Self { linear, fused } = self;
        match slots.place() {
            Place::Source(at) => {
                for (local, expert) in at.experts(moe.experts)?.enumerate() {
                    let names = te(format!("mlp.experts.{linear}{local}"))
                        .local(format!("mlp.experts.local_experts.{local}.{linear}"));
                    slots.source(Over::routed_experts(source), logical(expert), names);
                }
            }
            Place::Target(at) => {
                if at.placement == Some(Placement::RoundRobin) && moe.groups <= 1 {
                    return Err(TranslateError::Combination {
                        what: "round-robin placement of experts",
                        why: "vLLM places them in order where routing has no groups (n_group), whatever was \
                              asked for: say linear",
                    });
                }
                let local = at.experts(moe.experts)?;
                let count = local.len() as u64;
                let role = Stack { count, each: Over::routed_experts(target) };
                let name = format!("{module}{}{fused}", at.expert_names.prefix());
                slots.target(role, local.into_iter().flat_map(logical), name);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;
    use alloc::vec::Vec;

    use super::*;
    use crate::Family;
    use crate::roles::{SourceCoords, TargetCoords};

    const ALL: Experts = Experts {
        score_bias: true,
        shared: Some(Shared { module: "shared_expert", gate: Some("shared_expert_gate") }),
        ..Experts::MLP
    };

    fn config() -> ModelConfig {
        let mut config = ModelConfig::new(Family::Qwen3Moe);
        config.hidden_size = 8;
        let mut moe = Moe::new(5, 12);
        moe.shared_intermediate_size = Some(6);
        config.moe = Some(moe);
        config
    }

    /// Names, element types and shapes of an engine rank.
    fn engine(at: TargetCoords) -> Vec<(String, Option<Dtype>, Vec<u64>)> {
        let mut slots = Slots::new(Place::Target(at));
        ALL.slots(&config(), &mut slots).unwrap();
        let shape = |role: &dyn TargetRole| role.vllm(&at).unwrap().shape;
        let slots = slots.into_target().into_iter();
        slots.map(|it| (it.name, it.facts.dtype, shape(it.role.as_ref()))).collect()
    }

    #[test]
    fn every_part_has_its_group() {
        let at = TargetCoords::new(1, 2).unwrap().with_flat(3, 4).unwrap();
        let slot = |name: &str, shape: Vec<u64>| (name.into(), None, shape);
        let mut expected = vec![
            slot("post_attention_layernorm.weight", vec![8]),
            slot("mlp.gate.weight", vec![5, 8]),
            ("mlp.gate.e_score_correction_bias".into(), Some(Dtype::F32), vec![5]),
            slot("mlp.experts.routed_experts.w13_weight", vec![5, 6, 8]),
            slot("mlp.experts.routed_experts.w2_weight", vec![5, 8, 3]),
            slot("mlp.shared_expert.gate_up_proj.weight", vec![6, 8]),
            slot("mlp.shared_expert.down_proj.weight", vec![8, 3]),
            slot("mlp.shared_expert_gate.weight", vec![1, 8]),
        ];
        assert_eq!(engine(at), expected);
        // Whole experts, of which the last ranks get fewer; whole shared experts where MoE is sequence-parallel.
        let mut at = at.with_expert_parallel(Placement::Linear);
        (at.whole_shared_experts, expected[3].2) = (true, vec![1, 24, 8]);
        expected[4].2 = vec![1, 8, 12];
        (expected[5].2, expected[6].2) = (vec![12, 8], vec![8, 6]);
        assert_eq!(engine(at), expected);

        let at = SourceCoords::new(1, 2).unwrap().with_ep(4, 5).unwrap().with_etp(2, 3).unwrap();
        let mut slots = Slots::new(Place::Source(at));
        ALL.slots(&config(), &mut slots).unwrap();
        let shape = |role: &dyn SourceRole| role.megatron(&at, None).unwrap().shape;
        let slots = slots.into_source().into_iter();
        let held: Vec<_> =
            slots.map(|it| (it.names.te.into_owned(), shape(it.role.as_ref()))).collect();
        let slot = |name: &str, shape: Vec<u64>| (String::from(name), shape);
        let expected = [
            slot("pre_mlp_layernorm.weight", vec![8]),
            slot("mlp.router.weight", vec![5, 8]),
            slot("mlp.router.expert_bias", vec![5]),
            slot("mlp.experts.linear_fc1.weight0", vec![8, 8]),
            slot("mlp.experts.linear_fc2.weight0", vec![8, 4]),
            slot("mlp.shared_experts.linear_fc1.weight", vec![6, 8]),
            slot("mlp.shared_experts.linear_fc2.weight", vec![8, 3]),
            slot("mlp.shared_experts.gate_weight", vec![1, 8]),
        ];
        assert_eq!(held, expected);
    }

    #[test]
    fn shared_experts_need_a_size() {
        let at = TargetCoords::new(0, 1).unwrap();
        let mut none = config();
        none.moe = Some(Moe::new(5, 12));
        let error = ALL.slots(&none, &mut Slots::new(Place::Target(at))).unwrap_err();
        assert_eq!(error, TranslateError::Zero { what: "shared_intermediate_size" });
    }
}
