//! The slots of one rank: which parameters it has on its side, how each is laid out, what it is called.
//!
//! The trainer's slots and the engine's are separate lists that meet only in logical (Hugging Face) names: experts are
//! many trainer parameters and one engine parameter, other projections the other way round. A family fills in both
//! from one table; [`Slots`] keeps what its rank's side needs.

#[cfg(test)]
mod tests;

use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use refit_planner::{Dtype, ElementMap};

use crate::roles::{SourceCoords, SourceRole, TargetCoords, TargetRole};

/// A name relative to a scope.
type Name = Cow<'static, str>;

/// A decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    /// Its number among the layers of the trainer's model chunk; on the engine's side the global one.
    pub(crate) local: u32,
    /// Its number in the whole model.
    pub(crate) global: u32,
}

/// Whose slots are filled in, and where that rank stands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// A trainer rank.
    Source(SourceCoords),
    /// An engine rank.
    Target(TargetCoords),
}

/// The names that a trainer parameter may have, of which a rank has exactly one.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    /// With Transformer Engine's layers.
    pub(crate) te: Name,
    /// With Megatron's local spec, where that is another.
    pub(crate) local: Option<Name>,
    /// In other releases.
    pub(crate) also: Vec<Name>,
}

/// The name with Transformer Engine's layers, and with any others unless said otherwise.
pub(crate) fn te(name: impl Into<Name>) -> Names {
    Names { te: name.into(), local: None, also: Vec::new() }
}

impl<N: Into<Name>> From<N> for Names {
    fn from(name: N) -> Self {
        te(name)
    }
}

impl Names {
    /// These names with another one for Megatron's local spec.
    pub(crate) fn local(mut self, name: impl Into<Name>) -> Self {
        self.local = Some(name.into());
        self
    }

    /// These names with one that other releases use: taken where it is found, never expected.
    pub(crate) fn also(mut self, name: impl Into<Name>) -> Self {
        self.also.push(name.into());
        self
    }

    /// All of them, those of [`Names::te`] and [`Names::local`] first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &str> {
        core::iter::once(&self.te).chain(&self.local).chain(&self.also).map(AsRef::as_ref)
    }
}

/// What the slots of both sides have.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Facts {
    /// Element type, where it is not the model's.
    pub(crate) dtype: Option<Dtype>,
    /// How to get from what the trainer stores to the logical value, or from that to what the engine stores.
    pub(crate) map: ElementMap,
    /// Whether this is a second name for a tensor that another slot provides, and either side may lack it: a tied
    /// head. A trainer's copy is accounted for but never read; an engine that has untied its head is served.
    pub(crate) copy: bool,
}

impl Facts {
    /// Makes the slot a second name for a tensor that another slot provides.
    pub(crate) fn copy(&mut self) -> &mut Self {
        self.copy = true;
        self
    }

    /// Gives the parameter an element type of its own.
    pub(crate) fn dtype(&mut self, dtype: Dtype) -> &mut Self {
        self.dtype = Some(dtype);
        self
    }

    /// Maps the parameter's elements.
    pub(crate) fn map(&mut self, map: ElementMap) -> &mut Self {
        self.map = map;
        self
    }
}

/// A parameter of a trainer rank.
#[derive(Debug)]
pub(crate) struct SourceSlot {
    /// How it is laid out.
    pub(crate) role: Box<dyn SourceRole>,
    /// Hugging Face names of the role's logical tensors, in its order.
    pub(crate) logical: Vec<String>,
    /// Megatron-Core names.
    pub(crate) names: Names,
    pub(crate) facts: Facts,
    /// The set it belongs to, where a rank holds one of several.
    pub(crate) alternative: Option<Alternative>,
}

/// One of several sets of trainer slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alternative {
    /// Which choice.
    pub(crate) choice: u32,
    /// Which of its sets, from 0.
    pub(crate) set: u32,
}

/// A parameter of an engine rank.
#[derive(Debug)]
pub(crate) struct TargetSlot {
    /// How it is laid out.
    pub(crate) role: Box<dyn TargetRole>,
    /// Hugging Face names of the role's logical tensors, in its order.
    pub(crate) logical: Vec<String>,
    /// The vLLM name.
    pub(crate) name: String,
    pub(crate) facts: Facts,
}

/// What stands before names.
#[derive(Clone, Debug, Default)]
struct Scope {
    megatron: String,
    logical: String,
    vllm: String,
}

/// The slots of one rank, as a family fills them in.
#[derive(Debug)]
pub(crate) struct Slots {
    place: Place,
    /// What stands before every trainer name: the model chunk, where a rank has several.
    chunk: String,
    scope: Scope,
    source: Vec<SourceSlot>,
    target: Vec<TargetSlot>,
    /// The set that trainer slots are being added to.
    alternative: Option<Alternative>,
    /// How many choices between sets there are.
    choices: u32,
    /// Where facts of slots go that the other side has.
    aside: Facts,
}

impl Slots {
    /// No slots yet, of this rank.
    pub(crate) fn new(place: Place) -> Self {
        Self {
            place,
            chunk: String::new(),
            scope: Scope::default(),
            source: Vec::new(),
            target: Vec::new(),
            alternative: None,
            choices: 0,
            aside: Facts::default(),
        }
    }

    /// Whose slots these are. Families ask where one table cannot say both sides: experts, say.
    pub(crate) fn place(&self) -> Place {
        self.place
    }

    /// Begins a model chunk; its parameters' names begin with `chunk`.
    pub(crate) fn begin_chunk(&mut self, chunk: String) {
        self.chunk = chunk;
    }

    /// Puts these before all names that follow, in place of what stood there: of the trainer's, the logical and the
    /// engine's ones. Every call of a family's functions begins with a scope: nothing, or that of the layer.
    pub(crate) fn scope(
        &mut self,
        megatron: impl AsRef<str>,
        logical: impl Into<String>,
        vllm: impl Into<String>,
    ) {
        let megatron = format!("{}{}", self.chunk, megatron.as_ref());
        self.scope = Scope { megatron, logical: logical.into(), vllm: vllm.into() };
    }

    /// The scope of most models' layers.
    pub(crate) fn layer_scope(&mut self, layer: Layer) {
        let global = format!("model.layers.{}.", layer.global);
        self.scope(format!("decoder.layers.{}.", layer.local), global.clone(), global);
    }

    /// Adds a parameter that both sides have, with the same logical tensors in it.
    pub(crate) fn pair<L: Into<Name>>(
        &mut self,
        role: impl SourceRole + TargetRole + 'static,
        logical: impl IntoIterator<Item = L>,
        megatron: impl Into<Names>,
        vllm: impl Into<Name>,
    ) -> &mut Facts {
        match self.place {
            Place::Source(_) => self.source(role, logical, megatron),
            Place::Target(_) => self.target(role, logical, vllm),
        }
    }

    /// Adds a parameter of the trainer's; on the engine's side nothing.
    pub(crate) fn source<L: Into<Name>>(
        &mut self,
        role: impl SourceRole + 'static,
        logical: impl IntoIterator<Item = L>,
        megatron: impl Into<Names>,
    ) -> &mut Facts {
        let Self { place: Place::Source(_), scope, source, alternative, .. } = self else {
            return self.aside();
        };
        let logical = logical.into_iter().map(|name| join(&scope.logical, &name.into())).collect();
        let Names { te, local, also } = megatron.into();
        let full = |name: Name| Name::Owned(join(&scope.megatron, &name));
        source.push(SourceSlot {
            role: Box::new(role),
            logical,
            names: Names {
                te: full(te),
                local: local.map(full),
                also: also.into_iter().map(full).collect(),
            },
            facts: Facts::default(),
            alternative: *alternative,
        });
        source.last_mut().map_or(&mut self.aside, |slot| &mut slot.facts)
    }

    /// Adds a parameter of the engine's; on the trainer's side nothing.
    pub(crate) fn target<L: Into<Name>>(
        &mut self,
        role: impl TargetRole + 'static,
        logical: impl IntoIterator<Item = L>,
        vllm: impl Into<Name>,
    ) -> &mut Facts {
        let Self { place: Place::Target(_), scope, target, .. } = self else {
            return self.aside();
        };
        let logical = logical.into_iter().map(|name| join(&scope.logical, &name.into())).collect();
        target.push(TargetSlot {
            role: Box::new(role),
            logical,
            name: join(&scope.vllm, &vllm.into()),
            facts: Facts::default(),
        });
        target.last_mut().map_or(&mut self.aside, |slot| &mut slot.facts)
    }

    /// Adds parameters of the trainer's that come in one of several sets: one fused parameter or two, say. The set of
    /// which a rank holds something is the one it must hold; none of a set's names may be in another. The first is
    /// what is expected of a trainer that nobody has asked.
    #[allow(dead_code, reason = "no family described so far comes in sets")]
    pub(crate) fn either(&mut self, sets: &[&dyn Fn(&mut Self)]) {
        let choice = self.choices;
        self.choices += 1;
        for (set, fill) in (0..).zip(sets) {
            self.alternative = Some(Alternative { choice, set });
            fill(self);
        }
        self.alternative = None;
    }

    /// The trainer's slots.
    pub(crate) fn into_source(self) -> Vec<SourceSlot> {
        self.source
    }

    /// The engine's slots.
    pub(crate) fn into_target(self) -> Vec<TargetSlot> {
        self.target
    }

    /// Facts of a slot that this side does not have.
    fn aside(&mut self) -> &mut Facts {
        self.aside = Facts::default();
        &mut self.aside
    }
}

fn join(scope: &str, name: &str) -> String {
    let mut joined = String::with_capacity(scope.len() + name.len());
    joined.push_str(scope);
    joined.push_str(name);
    joined
}
