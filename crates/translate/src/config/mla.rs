use super::{MAX_HEADS, MAX_SIZE, check_sizes};
use crate::TranslateError;

/// Multi-head latent attention: queries, keys and values come from low-rank projections. The heads' number is
/// [`ModelConfig::num_heads`](crate::ModelConfig::num_heads).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mla {
    /// Rank of the queries' projection; `None` where they are projected in one step.
    pub q_lora_rank: Option<u64>,
    /// Rank of the projection that keys and values share.
    pub kv_lora_rank: u64,
    /// Elements of a head of queries and keys without position.
    pub qk_nope_head_dim: u64,
    /// Elements of a head of queries and keys with rotary position.
    pub qk_rope_head_dim: u64,
    /// Elements of a head of values.
    pub v_head_dim: u64,
}

impl Mla {
    /// These sizes.
    #[must_use]
    pub fn new(
        q_lora_rank: Option<u64>,
        kv_lora_rank: u64,
        [qk_nope_head_dim, qk_rope_head_dim, v_head_dim]: [u64; 3],
    ) -> Self {
        Self { q_lora_rank, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim }
    }

    /// Rows of the projection that keys and values share, their rotary part included.
    pub(crate) fn kv_a_rows(&self) -> u64 {
        self.kv_lora_rank.saturating_add(self.qk_rope_head_dim)
    }

    /// Rows of the projections of all these heads: queries; keys without position and values; values.
    ///
    /// # Errors
    /// [`TranslateError::Zero`] and [`TranslateError::TooLarge`].
    pub(crate) fn widths(&self, heads: u64) -> Result<(u64, u64, u64), TranslateError> {
        check_sizes(&[("num_attention_heads", heads, MAX_HEADS.into())])?;
        let width = |what, dim: u64| {
            let width = heads.checked_mul(dim).filter(|width| *width <= MAX_SIZE);
            width.ok_or(TranslateError::TooLarge { what, limit: MAX_SIZE })
        };
        let nope = self.qk_nope_head_dim;
        let queries = width(
            "num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)",
            nope.saturating_add(self.qk_rope_head_dim),
        )?;
        let keys_values = width(
            "num_attention_heads * (qk_nope_head_dim + v_head_dim)",
            nope.saturating_add(self.v_head_dim),
        )?;
        // Less than keys and values together.
        Ok((queries, keys_values, heads.saturating_mul(self.v_head_dim)))
    }

    /// Checks that the sizes are possible.
    ///
    /// # Errors
    /// [`TranslateError::Zero`] and [`TranslateError::TooLarge`].
    pub fn validate(&self) -> Result<(), TranslateError> {
        check_sizes(&[
            ("q_lora_rank", self.q_lora_rank.unwrap_or(1), MAX_SIZE),
            ("kv_lora_rank", self.kv_lora_rank, MAX_SIZE),
            ("qk_nope_head_dim", self.qk_nope_head_dim, MAX_HEADS.into()),
            ("qk_rope_head_dim", self.qk_rope_head_dim, MAX_HEADS.into()),
            ("v_head_dim", self.v_head_dim, MAX_HEADS.into()),
        ])
    }
}

#[cfg(feature = "serde")]
mod json {
    use serde::Deserialize;

    use super::Mla;
    use crate::TranslateError;
    use crate::config::json::{Json, required};

    #[derive(Deserialize)]
    struct Keys {
        q_lora_rank: Option<u64>,
        kv_lora_rank: Option<u64>,
        qk_nope_head_dim: Option<u64>,
        qk_rope_head_dim: Option<u64>,
        v_head_dim: Option<u64>,
    }

    impl Mla {
        /// Reads what `config.json` says of latent attention.
        pub(crate) fn read(json: &Json<'_>) -> Result<Self, TranslateError> {
            let keys: Keys = json.keys()?;
            let mla = Self {
                q_lora_rank: keys.q_lora_rank,
                kv_lora_rank: required(keys.kv_lora_rank, "kv_lora_rank")?,
                qk_nope_head_dim: required(keys.qk_nope_head_dim, "qk_nope_head_dim")?,
                qk_rope_head_dim: required(keys.qk_rope_head_dim, "qk_rope_head_dim")?,
                v_head_dim: required(keys.v_head_dim, "v_head_dim")?,
            };
            mla.validate()?;
            Ok(mla)
        }
    }
}

#[cfg(all(test, feature = "serde"))]
mod tests {
    use super::Mla;
    use crate::TranslateError;
    use crate::config::json::Json;

    #[test]
    fn sizes_are_read_and_checked() {
        let text = r#"{"q_lora_rank": null, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128}"#;
        assert_eq!(Mla::read(&Json::new(text)).unwrap(), Mla::new(None, 512, [128, 64, 128]));
        let missing = Mla::read(&Json::new(&text.replace("v_head_dim", "x"))).unwrap_err();
        assert_eq!(missing, TranslateError::MissingKey { key: "v_head_dim" });
        let zero = Mla::read(&Json::new(&text.replace("null", "0"))).unwrap_err();
        assert_eq!(zero, TranslateError::Zero { what: "q_lora_rank" });
        assert!(Mla::new(Some(1), 512, [128, u64::MAX, 128]).validate().is_err());
    }
}
