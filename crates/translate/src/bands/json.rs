//! The format as serde sees it: strict about keys, bounded in every list and name, names borrowed from the text.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use alloc::borrow::Cow;
use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::fmt;
use core::marker::PhantomData;

use refit_planner::ElementMap;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::{
    BandsError, MAX_BANDS, MAX_DIMS, MAX_NAME_BYTES, MAX_PARAMS, MAX_RANKS, MAX_TENSORS,
    MAX_TEXT_BYTES, SCHEMA, Side,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Document<'a> {
    #[serde(rename = "schema")]
    _schema: u64,
    /// For people.
    #[serde(rename = "about", borrow, default)]
    _about: Option<Cow<'a, str>>,
    pub(super) side: Side,
    #[serde(borrow)]
    pub(super) tensors: Entries<'a, RawTensor, MAX_TENSORS>,
    #[serde(borrow)]
    pub(super) ranks: List<RawRank<'a>, MAX_RANKS>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRank<'a> {
    pub(super) rank: u32,
    #[serde(borrow)]
    pub(super) params: Entries<'a, RawParam<'a>, MAX_PARAMS>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawParam<'a> {
    #[serde(borrow)]
    pub(super) dtype: Name<'a>,
    pub(super) shape: Extents,
    #[serde(default)]
    pub(super) view: Option<[u64; 2]>,
    #[serde(default)]
    pub(super) map: ElementMap,
    #[serde(borrow, default)]
    pub(super) bands: Option<List<RawBand<'a>, MAX_BANDS>>,
    #[serde(borrow, default)]
    pub(super) copies: Option<List<RawCopy<'a>, MAX_BANDS>>,
    #[serde(default)]
    pub(super) fill: List<RawFill, MAX_BANDS>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawBand<'a> {
    #[serde(borrow)]
    pub(super) tensor: Name<'a>,
    #[serde(default)]
    pub(super) rows: Option<[u64; 2]>,
    #[serde(default)]
    pub(super) cols: Option<[u64; 2]>,
    #[serde(default)]
    pub(super) at: [u64; 2],
    #[serde(default = "one")]
    pub(super) row_step: u64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCopy<'a> {
    #[serde(borrow)]
    pub(super) tensor: Name<'a>,
    #[serde(default)]
    pub(super) from: Option<RawFrom>,
    pub(super) to: RawStrided,
}

/// Where a copy reads: a slice per dimension, or any strided pattern.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawFrom {
    #[serde(default)]
    pub(super) slice: Option<List<[u64; 2], MAX_DIMS>>,
    #[serde(default)]
    pub(super) offset: Option<u64>,
    #[serde(default)]
    pub(super) shape: Option<Extents>,
    #[serde(default)]
    pub(super) stride: Option<Extents>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawStrided {
    pub(super) offset: u64,
    pub(super) shape: Extents,
    pub(super) stride: Extents,
}

/// Zeros: a box beside `bands`, a strided pattern beside `copies`.
pub(super) enum RawFill {
    Box { rows: [u64; 2], cols: Option<[u64; 2]> },
    Strided(RawStrided),
}

impl<'de> Deserialize<'de> for RawFill {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Either {
            rows: Option<[u64; 2]>,
            cols: Option<[u64; 2]>,
            offset: Option<u64>,
            shape: Option<Extents>,
            stride: Option<Extents>,
        }
        match Either::deserialize(from)? {
            Either { rows: Some(rows), cols, offset: None, shape: None, stride: None } => {
                Ok(Self::Box { rows, cols })
            }
            Either {
                rows: None,
                cols: None,
                offset: Some(offset),
                shape: Some(shape),
                stride: Some(stride),
            } => Ok(Self::Strided(RawStrided { offset, shape, stride })),
            _ => Err(D::Error::custom(
                "a fill has either `rows` and maybe `cols`, or `offset`, `shape` and `stride`",
            )),
        }
    }
}

pub(super) type Extents = List<u64, MAX_DIMS>;

fn one() -> u64 {
    1
}

impl<'a> Document<'a> {
    /// The version first: the rest of another version may look different.
    pub(super) fn read(text: &'a str) -> Result<Self, BandsError> {
        #[derive(Deserialize)]
        struct Version {
            schema: u64,
        }
        if text.len() > MAX_TEXT_BYTES {
            return Err(BandsError::TooLong { bytes: text.len() });
        }
        let Version { schema } = serde_json::from_str(text).map_err(malformed)?;
        if schema != SCHEMA {
            return Err(BandsError::Schema { found: schema });
        }
        serde_json::from_str(text).map_err(malformed)
    }
}

fn malformed(error: serde_json::Error) -> BandsError {
    let (line, column) = (error.line(), error.column());
    let message = error.to_string();
    // The parser ends with the place, which the error has by itself.
    let place = format!(" at line {line} column {column}");
    let message = message.strip_suffix(&place).unwrap_or(&message).to_string();
    BandsError::Json { line, column, message }
}

/// A tensor's shape, alone or with a view.
pub(super) struct RawTensor {
    pub(super) shape: Extents,
    pub(super) view: Option<[u64; 2]>,
}

impl<'de> Deserialize<'de> for RawTensor {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Viewed {
            shape: Extents,
            view: Option<[u64; 2]>,
        }
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = RawTensor;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a shape, or an object with a shape and a view")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<RawTensor, A::Error> {
                Ok(RawTensor { shape: Bounded::new().visit_seq(list)?, view: None })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawTensor, A::Error> {
                let Viewed { shape, view } = Viewed::deserialize(MapAccessDeserializer::new(map))?;
                Ok(RawTensor { shape, view })
            }
        }
        from.deserialize_any(Either)
    }
}

/// A name of at most [`MAX_NAME_BYTES`].
pub(super) struct Name<'a>(Cow<'a, str>);

impl Name<'_> {
    pub(super) fn get(&self) -> &str {
        &self.0
    }

    fn check<E: Error>(text: &str) -> Result<(), E> {
        match text.len() {
            0 => Err(E::custom("a name must not be empty")),
            len if len > MAX_NAME_BYTES => {
                Err(E::custom(format_args!("a name of {len} bytes; {MAX_NAME_BYTES} are the most")))
            }
            _ => Ok(()),
        }
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Name<'a> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Text<'a>(PhantomData<&'a ()>);

        impl<'de: 'a, 'a> Visitor<'de> for Text<'a> {
            type Value = Name<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }

            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Name<'a>, E> {
                Name::check(text)?;
                Ok(Name(Cow::Borrowed(text)))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Name<'a>, E> {
                Name::check(text)?;
                Ok(Name(Cow::Owned(text.into())))
            }
        }
        from.deserialize_str(Text(PhantomData))
    }
}

/// A list of at most `MAX` entries.
pub(super) struct List<T, const MAX: usize>(pub(super) Vec<T>);

impl<T, const MAX: usize> Default for List<T, MAX> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_seq(Bounded::new())
    }
}

/// An object of at most `MAX` entries, in order. Keys that occur twice are kept, so that they can be refused by name.
pub(super) struct Entries<'a, T, const MAX: usize>(pub(super) Vec<(Name<'a>, T)>);

impl<'de: 'a, 'a, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for Entries<'a, T, MAX> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Object<'a, T, const MAX: usize>(PhantomData<(&'a (), T)>);

        impl<'de: 'a, 'a, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Object<'a, T, MAX> {
            type Value = Entries<'a, T, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "an object of at most {MAX} entries by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    if entries.len() == MAX {
                        return Err(too_many(MAX));
                    }
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        from.deserialize_map(Object(PhantomData))
    }
}

fn too_many<E: Error>(max: usize) -> E {
    E::custom(format_args!("more than {max} entries, which is the most here"))
}

struct Bounded<T, const MAX: usize>(PhantomData<T>);

impl<T, const MAX: usize> Bounded<T, MAX> {
    fn new() -> Self {
        Self(PhantomData)
    }
}

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Bounded<T, MAX> {
    type Value = List<T, MAX>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX} entries")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = list.next_element()? {
            if entries.len() == MAX {
                return Err(too_many(MAX));
            }
            entries.push(entry);
        }
        Ok(List(entries))
    }
}
