//! The serialised form of a layout. Decoding goes through [`LayoutBuilder`], so it cannot skip a check.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use alloc::string::String;
use alloc::vec::Vec;

use crate::{
    Band, Dtype, ElementMap, FillBox, LayoutBuilder, LayoutError, Param, RankLayout, TensorId,
};

#[derive(serde::Serialize, serde::Deserialize)]
pub(crate) struct RawLayout {
    rank: u32,
    tensors: Vec<RawTensor>,
    params: Vec<RawParam>,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct RawTensor {
    name: String,
    rows: u64,
    cols: u64,
}

#[derive(serde::Serialize, serde::Deserialize)]
struct RawParam {
    name: String,
    dtype: Dtype,
    rows: u64,
    cols: u64,
    #[serde(default)]
    map: ElementMap,
    bands: Vec<Band>,
    fills: Vec<FillBox>,
}

impl From<RankLayout> for RawLayout {
    fn from(layout: RankLayout) -> Self {
        let tensors = layout.tensors.iter();
        let params = layout.params.into_iter();
        Self {
            rank: layout.rank,
            tensors: tensors
                .map(|tensor| RawTensor {
                    name: tensor.name.as_ref().into(),
                    rows: tensor.rows,
                    cols: tensor.cols,
                })
                .collect(),
            params: params
                .map(|param| RawParam {
                    name: param.name.as_ref().into(),
                    dtype: param.dtype,
                    rows: param.rows,
                    cols: param.cols,
                    map: param.map,
                    bands: param.bands,
                    fills: param.fills,
                })
                .collect(),
        }
    }
}

impl TryFrom<RawLayout> for RankLayout {
    type Error = LayoutError;

    fn try_from(raw: RawLayout) -> Result<Self, LayoutError> {
        let rank = raw.rank;
        let mut builder = LayoutBuilder::new(rank);
        let ids = raw
            .tensors
            .iter()
            .map(|tensor| builder.tensor(&tensor.name, tensor.rows, tensor.cols))
            .collect::<Result<Vec<TensorId>, _>>()?;
        for mut param in raw.params {
            for band in &mut param.bands {
                let Some(&id) = ids.get(band.tensor.0 as usize) else {
                    let tensor = band.tensor.0;
                    return Err(LayoutError::UnknownTensor {
                        rank,
                        param: param.name.into(),
                        tensor,
                    });
                };
                band.tensor = id;
            }
            let mut decoded = Param::new(param.name, param.dtype, param.rows, param.cols)
                .map(param.map)
                .bands(param.bands);
            decoded.fills = param.fills;
            builder.param(decoded)?;
        }
        Ok(builder.build())
    }
}
