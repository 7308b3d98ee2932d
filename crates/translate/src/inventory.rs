//! The tensors a rank reports, each to be claimed by exactly one slot.

use alloc::collections::BTreeMap;

use refit_planner::{Dtype, Transform};

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

    /// Refuses a tensor whose shape or element type the model does not give.
    pub(crate) fn check(
        &self,
        spec: &TensorSpec,
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
            Side::Megatron => Transform::between(spec.dtype, model),
            Side::Vllm => Transform::between(model, spec.dtype),
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
