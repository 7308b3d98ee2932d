use super::{MAX_HEADS, MAX_SIZE, check_sizes};
use crate::TranslateError;

/// Mamba-2 layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mamba {
    /// `mamba_num_heads`.
    pub heads: u64,
    /// `mamba_head_dim`: elements of a head.
    pub head_dim: u64,
    /// `n_groups`: groups of heads that share `B` and `C`.
    pub groups: u64,
    /// `ssm_state_size`: elements of a group's state.
    pub state: u64,
    /// `conv_kernel`: width of the convolution.
    pub conv_kernel: u64,
    /// `use_conv_bias`: whether the convolution has a bias.
    pub conv_bias: bool,
}

impl Mamba {
    /// This many heads of this size, this many groups of this state, a convolution of this width with a bias.
    #[must_use]
    pub fn new(
        (heads, head_dim): (u64, u64),
        (groups, state): (u64, u64),
        conv_kernel: u64,
    ) -> Self {
        Self { heads, head_dim, groups, state, conv_kernel, conv_bias: true }
    }

    /// Elements of all heads.
    pub(crate) fn inner(&self) -> u64 {
        self.heads.saturating_mul(self.head_dim)
    }

    /// Checks that the sizes are possible.
    ///
    /// # Errors
    /// [`TranslateError::Zero`], [`TranslateError::TooLarge`] and [`TranslateError::Indivisible`] for heads that the
    /// groups do not divide.
    pub fn validate(&self) -> Result<(), TranslateError> {
        check_sizes(&[
            ("mamba_num_heads", self.heads, MAX_HEADS.into()),
            ("mamba_head_dim", self.head_dim, MAX_HEADS.into()),
            ("n_groups", self.groups, MAX_HEADS.into()),
            ("ssm_state_size", self.state, MAX_HEADS.into()),
            ("conv_kernel", self.conv_kernel, MAX_HEADS.into()),
            ("mamba_num_heads * mamba_head_dim", self.inner(), MAX_SIZE),
        ])?;
        if !self.heads.is_multiple_of(self.groups) {
            return Err(TranslateError::Indivisible {
                what: "mamba_num_heads",
                size: self.heads,
                by_what: "n_groups",
                by: self.groups,
            });
        }
        Ok(())
    }
}

#[cfg(feature = "serde")]
mod json {
    use serde::Deserialize;

    use super::Mamba;
    use crate::TranslateError;
    use crate::config::json::{Json, refusal, required};

    #[derive(Deserialize)]
    struct Keys {
        mamba_num_heads: Option<u64>,
        mamba_head_dim: Option<u64>,
        n_groups: Option<u64>,
        ssm_state_size: Option<u64>,
        conv_kernel: Option<u64>,
        use_conv_bias: Option<bool>,
        /// A bias on the input and the output projection.
        use_bias: Option<bool>,
        mamba_proj_bias: Option<bool>,
    }

    impl Mamba {
        /// Reads what `config.json` says of Mamba layers.
        pub(crate) fn read(json: &Json<'_>) -> Result<Self, TranslateError> {
            let keys: Keys = json.keys()?;
            for (key, value) in
                [("use_bias", keys.use_bias), ("mamba_proj_bias", keys.mamba_proj_bias)]
            {
                if value == Some(true) {
                    return Err(refusal(key, true, "Mamba projections are known without biases"));
                }
            }
            let mamba = Self {
                heads: required(keys.mamba_num_heads, "mamba_num_heads")?,
                head_dim: required(keys.mamba_head_dim, "mamba_head_dim")?,
                groups: required(keys.n_groups, "n_groups")?,
                state: required(keys.ssm_state_size, "ssm_state_size")?,
                conv_kernel: required(keys.conv_kernel, "conv_kernel")?,
                conv_bias: required(keys.use_conv_bias, "use_conv_bias")?,
            };
            mamba.validate()?;
            Ok(mamba)
        }
    }
}
