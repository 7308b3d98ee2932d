use alloc::vec::Vec;

use super::{Group, Role, SourceCoords, SourceRole, TargetCoords, TargetRole, View};
use crate::TranslateError;

/// A role whose parameter another group shares out than tensor parallelism: what belongs to experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Over<R> {
    /// Who shares it out.
    pub group: Group,
    /// How it is shared out.
    pub role: R,
}

impl<R> Over<R> {
    /// Of one routed expert.
    #[must_use]
    pub fn routed_experts(role: R) -> Self {
        Self { group: Group::RoutedExperts, role }
    }

    /// Of the shared experts.
    #[must_use]
    pub fn shared_experts(role: R) -> Self {
        Self { group: Group::SharedExperts, role }
    }
}

impl<R: Role> Role for Over<R> {
    fn logical(&self) -> Result<Vec<(u64, u64)>, TranslateError> {
        self.role.logical()
    }
}

impl<R: SourceRole> SourceRole for Over<R> {
    fn megatron(&self, at: &SourceCoords, held: Option<&[u64]>) -> Result<View, TranslateError> {
        self.role.megatron(&at.over(self.group), held)
    }
}

impl<R: TargetRole> TargetRole for Over<R> {
    fn vllm(&self, at: &TargetCoords) -> Result<View, TranslateError> {
        self.role.vllm(&at.over(self.group))
    }
}
