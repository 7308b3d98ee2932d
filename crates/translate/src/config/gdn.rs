use super::{MAX_HEADS, MAX_SIZE, check_sizes};
use crate::TranslateError;

/// Gated delta net layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Gdn {
    /// `linear_num_key_heads`: heads of queries and of keys.
    pub key_heads: u64,
    /// `linear_num_value_heads`: heads of values, `value_heads / key_heads` for every key head.
    pub value_heads: u64,
    /// `linear_key_head_dim`: elements of a query's or a key's head.
    pub key_head_dim: u64,
    /// `linear_value_head_dim`: elements of a value's head.
    pub value_head_dim: u64,
    /// `linear_conv_kernel_dim`: width of the convolution.
    pub conv_kernel: u64,
}

impl Gdn {
    /// These numbers of heads of keys and of values, and elements of one.
    #[must_use]
    pub fn new(
        (key_heads, value_heads): (u64, u64),
        (key_head_dim, value_head_dim): (u64, u64),
        conv_kernel: u64,
    ) -> Self {
        Self { key_heads, value_heads, key_head_dim, value_head_dim, conv_kernel }
    }

    /// Elements of all value heads.
    pub(crate) fn values(&self) -> u64 {
        self.value_heads.saturating_mul(self.value_head_dim)
    }

    /// Checks that the sizes are possible.
    ///
    /// # Errors
    /// [`TranslateError::Zero`], [`TranslateError::TooLarge`] and [`TranslateError::Indivisible`] for value heads that
    /// the key heads do not divide.
    pub fn validate(&self) -> Result<(), TranslateError> {
        let keys = self.key_heads.saturating_mul(self.key_head_dim);
        check_sizes(&[
            ("linear_num_key_heads", self.key_heads, MAX_HEADS.into()),
            ("linear_num_value_heads", self.value_heads, MAX_HEADS.into()),
            ("linear_key_head_dim", self.key_head_dim, MAX_HEADS.into()),
            ("linear_value_head_dim", self.value_head_dim, MAX_HEADS.into()),
            ("linear_conv_kernel_dim", self.conv_kernel, MAX_HEADS.into()),
            ("linear_num_key_heads * linear_key_head_dim", keys, MAX_SIZE),
            ("linear_num_value_heads * linear_value_head_dim", self.values(), MAX_SIZE),
        ])?;
        if !self.value_heads.is_multiple_of(self.key_heads) {
            return Err(TranslateError::Indivisible {
                what: "linear_num_value_heads",
                size: self.value_heads,
                by_what: "linear_num_key_heads",
                by: self.key_heads,
            });
        }
        Ok(())
    }
}

#[cfg(feature = "serde")]
mod json {
    use serde::Deserialize;

    use super::Gdn;
    use crate::TranslateError;
    use crate::config::json::{Json, required};

    #[derive(Deserialize)]
    struct Keys {
        linear_num_key_heads: Option<u64>,
        linear_num_value_heads: Option<u64>,
        linear_key_head_dim: Option<u64>,
        linear_value_head_dim: Option<u64>,
        linear_conv_kernel_dim: Option<u64>,
    }

    impl Gdn {
        /// Reads what `config.json` says of gated delta net layers.
        pub(crate) fn read(json: &Json<'_>) -> Result<Self, TranslateError> {
            let keys: Keys = json.keys()?;
            let gdn = Self {
                key_heads: required(keys.linear_num_key_heads, "linear_num_key_heads")?,
                value_heads: required(keys.linear_num_value_heads, "linear_num_value_heads")?,
                key_head_dim: required(keys.linear_key_head_dim, "linear_key_head_dim")?,
                value_head_dim: required(keys.linear_value_head_dim, "linear_value_head_dim")?,
                conv_kernel: required(keys.linear_conv_kernel_dim, "linear_conv_kernel_dim")?,
            };
            gdn.validate()?;
            Ok(gdn)
        }
    }
}
