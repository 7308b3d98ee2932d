//! Mixtures of experts: router, routed experts, experts that every token visits.

use alloc::format;
use alloc::string::String;

use refit_planner::Dtype;

use super::norm;
use crate::roles::{GatedMlp, Over, Replicated, Row, SourceRole, Stack, TargetRole};
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
        slots.pair(
            norm(config.hidden_size),
            ["post_attention_layernorm.weight"],
            "pre_mlp_layernorm.weight",
            "post_attention_layernorm.weight",
        );
        self.router(config, slots)?;
        self.routed(config, slots)?;
        self.shared(config, slots)
    }

    /// `[experts, hidden_size]` on every rank of both sides.
    fn router(&self, config: &ModelConfig, slots: &mut Slots) -> Result<(), TranslateError> {
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
