//! The tensors a rank reports, each to be claimed by exactly one slot.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use refit_planner::{Dtype, Transform};

use crate::blockwise::{self, Holder};
use crate::roles::View;
use crate::{Side, TensorSpec, TranslateError};

#[derive(Debug)]
pub(crate) struct Inventory<'a> {
    side: Side,
    rank: u32,
    unclaimed: BTreeMap<&'a str, &'a TensorSpec>,
}

impl<'a> Inventory<'a> {
    pub(crate) fn new(
        side: Side,
        rank: u32,
        held: &'a [TensorSpec],
    ) -> Result<Self, TranslateError> {
        if held.is_empty() {
            return Err(TranslateError::NoParams { side, rank });
        }
        let mut unclaimed = BTreeMap::new();
        for spec in held {
            if unclaimed.insert(spec.name.as_ref(), spec).is_some() {
                return Err(TranslateError::DuplicateParam {
                    side,
                    rank,
                    param: spec.name.clone(),
                });
            }
        }
        Ok(Self { side, rank, unclaimed })
    }

    /// Takes the tensor of this name out, if it is there.
    pub(crate) fn claim(&mut self, name: &str) -> Option<&'a TensorSpec> {
        self.unclaimed.remove(name)
    }

    /// Whether a tensor of this name is there and unclaimed.
    pub(crate) fn holds(&self, name: &str) -> bool {
        self.unclaimed.contains_key(name)
    }

    /// Takes out the scales of a quantised weight.
    pub(crate) fn scales(&mut self, weight: &str) -> Result<&'a TensorSpec, TranslateError> {
        let name = blockwise::name(weight);
        self.claim(&name).ok_or_else(|| TranslateError::MissingParam {
            side: self.side,
            rank: self.rank,
            param: name.into(),
            alternatives: Vec::new(),
        })
    }

    /// The holder of a weight with these logical tensors.
    pub(crate) fn holder<'b>(&self, weight: &'b TensorSpec, logical: &'b [String]) -> Holder<'b> {
        Holder::new(self.side, self.rank, weight, logical)
    }

    /// Refuses a tensor whose shape or element type, as it is understood, the model does not give.
    pub(crate) fn check(
        &self,
        spec: &TensorSpec,
        dtype: Dtype,
        view: &View,
        model: Dtype,
    ) -> Result<(), TranslateError> {
        let Self { side, rank, .. } = *self;
        let param = || spec.name.clone();
        if spec.shape != view.shape {
            return Err(TranslateError::Shape {
                side,
                rank,
                param: param(),
                expected: view.shape.clone(),
                got: spec.shape.clone(),
                why: view.formula,
            });
        }
        let transform = match side {
            Side::Megatron => Transform::between(dtype, model),
            Side::Vllm => Transform::between(model, dtype),
        };
        match transform {
            Some(_) => Ok(()),
            None => {
                Err(TranslateError::Dtype { side, rank, param: param(), got: spec.dtype, model })
            }
        }
    }

    /// Refuses tensors that no slot has claimed, `ignored` ones apart.
    pub(crate) fn finish(self, ignored: impl Fn(&str) -> bool) -> Result<(), TranslateError> {
        let mut unknown = self.unclaimed.into_values().filter(|spec| !ignored(&spec.name));
        match unknown.next() {
            None => Ok(()),
            Some(first) => Err(TranslateError::UnknownParam {
                side: self.side,
                rank: self.rank,
                param: first.name.clone(),
                others: unknown.count(),
            }),
        }
    }
}
