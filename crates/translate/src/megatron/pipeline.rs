//! How Megatron-Core splits decoder layers over pipeline stages.

use alloc::vec::Vec;

use crate::TranslateError;
use crate::config::{MAX_LAYERS, MAX_RANKS};

const LAYERS: &str = "num_hidden_layers";
const STAGES: &str = "megatron pp_size";
const CHUNKS: &str = "virtual pipeline chunks";

/// Global layer numbers, by stage and model chunk.
pub type Stages = Vec<Vec<Vec<u32>>>;

/// The arguments that Megatron-Core splits layers by, for planning without a trainer.
///
/// Where there is one, read its table instead (`layer_number - 1` of every layer of every chunk): it may follow
/// `pipeline_model_parallel_layout`, which is not described here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pipeline {
    /// Pipeline stages.
    pub pp_size: u32,
    /// Model chunks of a stage (`virtual_pipeline_model_parallel_size`); 1 without virtual stages.
    pub chunks: u32,
    /// `num_layers_in_first_pipeline_stage`.
    pub first: Option<u32>,
    /// `num_layers_in_last_pipeline_stage`.
    pub last: Option<u32>,
    /// `account_for_embedding_in_pipeline_split`: the embedding counts as a layer.
    pub embedding: bool,
    /// `account_for_loss_in_pipeline_split`: the head counts as a layer.
    pub loss: bool,
}

impl Pipeline {
    /// An even split over this many stages.
    #[must_use]
    pub fn new(pp_size: u32) -> Self {
        Self { pp_size, chunks: 1, first: None, last: None, embedding: false, loss: false }
    }

    /// This split with several model chunks a stage.
    #[must_use]
    pub fn with_chunks(mut self, chunks: u32) -> Self {
        self.chunks = chunks;
        self
    }

    /// This split with another number of layers on the first stage.
    #[must_use]
    pub fn with_first(mut self, layers: u32) -> Self {
        self.first = Some(layers);
        self
    }

    /// This split with another number of layers on the last stage.
    #[must_use]
    pub fn with_last(mut self, layers: u32) -> Self {
        self.last = Some(layers);
        self
    }

    /// This split with the embedding counted as a layer.
    #[must_use]
    pub fn with_embedding(mut self) -> Self {
        self.embedding = true;
        self
    }

    /// This split with the head counted as a layer.
    #[must_use]
    pub fn with_loss(mut self) -> Self {
        self.loss = true;
        self
    }

    /// The layers of every chunk of every stage.
    ///
    /// Layers are numbered through all stages' first chunks, then through their second ones, and so on. What counts
    /// as a layer without being one takes its place on the first chunk of the first stage or the last of the last.
    ///
    /// # Errors
    /// [`TranslateError::Zero`], [`TranslateError::TooLarge`], [`TranslateError::Indivisible`] where Megatron-Core
    /// refuses too, [`TranslateError::Combination`].
    pub fn stages(&self, num_layers: u32) -> Result<Stages, TranslateError> {
        let Self { pp_size, chunks, .. } = *self;
        let limits = [
            (LAYERS, num_layers, MAX_LAYERS),
            (STAGES, pp_size, MAX_RANKS),
            (CHUNKS, chunks, MAX_LAYERS),
        ];
        for (what, size, limit) in limits {
            if size == 0 {
                return Err(TranslateError::Zero { what });
            }
            if size > limit {
                return Err(TranslateError::TooLarge { what, limit: limit.into() });
            }
        }
        let counts = self.counts(num_layers)?;
        let mut stages: Stages = counts.iter().map(|_| Vec::new()).collect();
        let mut next = 0;
        for chunk in 0..chunks {
            for (number, (stage, &count)) in (0..).zip(stages.iter_mut().zip(&counts)) {
                let embedding = self.embedding && (number, chunk) == (0, 0);
                let loss = self.loss && (number + 1, chunk + 1) == (pp_size, chunks);
                let pseudo = u32::from(embedding) + u32::from(loss);
                let Some(layers) = (count / chunks).checked_sub(pseudo) else {
                    let why =
                        "a chunk must have room for the embedding or the head it counts as a layer";
                    return Err(TranslateError::Combination { what: STAGES, why });
                };
                stage.push((next..next + layers).collect());
                next += layers;
            }
        }
        Ok(stages)
    }

    /// Layers of every stage, the embedding and the head included where they count; multiples of the chunks.
    fn counts(&self, num_layers: u32) -> Result<Vec<u32>, TranslateError> {
        let Self { pp_size, chunks, first, last, .. } = *self;
        let given = u32::from(first.is_some()) + u32::from(last.is_some());
        if given > 0 && (self.embedding || self.loss) {
            let why = "it cannot be combined with accounting for the embedding or the loss";
            return Err(TranslateError::Combination { what: "an uneven first or last stage", why });
        }
        let pseudo = u32::from(self.embedding) + u32::from(self.loss);
        let ends = first.unwrap_or(0).checked_add(last.unwrap_or(0));
        let middle = ends.and_then(|ends| (num_layers + pseudo).checked_sub(ends));
        let (Some(middle), Some(between)) = (middle, pp_size.checked_sub(given)) else {
            let why = "they must be two stages and have no more layers than there are";
            return Err(TranslateError::Combination { what: "uneven first and last stages", why });
        };
        let each = match between {
            0 if middle == 0 => 0,
            0 => {
                let why = "without stages between them they must have all layers";
                return Err(TranslateError::Combination {
                    what: "uneven first and last stages",
                    why,
                });
            }
            _ => even(LAYERS, middle, STAGES, between)?,
        };
        let stage = |number: u32| match (first, last) {
            (Some(layers), _) if number == 0 => layers,
            (_, Some(layers)) if number + 1 == pp_size => layers,
            _ => each,
        };
        let counts: Vec<u32> = (0..pp_size).map(stage).collect();
        for &count in &counts {
            even("layers of a stage", count, CHUNKS, chunks)?;
        }
        Ok(counts)
    }
}

/// An even split of the layers over pipeline stages: Megatron's default, without virtual stages.
///
/// # Errors
/// Those of [`Pipeline::stages`].
pub fn stages(num_layers: u32, pp_size: u32) -> Result<Vec<Vec<u32>>, TranslateError> {
    let stages = Pipeline::new(pp_size).stages(num_layers)?;
    Ok(stages.into_iter().map(|chunks| chunks.into_iter().flatten().collect()).collect())
}

fn even(
    what: &'static str,
    size: u32,
    by_what: &'static str,
    by: u32,
) -> Result<u32, TranslateError> {
    if size.is_multiple_of(by) {
        return Ok(size / by);
    }
    Err(TranslateError::Indivisible { what, size: size.into(), by_what, by: by.into() })
}
