//! Where everything stands in the rendezvous.

#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

use crate::rendezvous::{Key, RendezvousError};

/// The entries of one model. Models share nothing, so processes of one never see another's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Model(Key);

impl Model {
    /// The model of this name, under a prefix of the job's if there is one.
    #[must_use]
    pub fn new(key: Key) -> Self {
        Self(key)
    }

    /// Its key.
    #[must_use]
    pub fn key(&self) -> &Key {
        &self.0
    }

    fn at<const N: usize>(&self, parts: [&str; N]) -> Result<Key, RendezvousError> {
        Key::new(self.0.parts().chain(parts))
    }

    /// All groups.
    ///
    /// # Errors
    /// [`RendezvousError::Key`], here and below, for names that are none and keys that become too long.
    pub fn groups(&self) -> Result<Key, RendezvousError> {
        self.at(["group"])
    }

    /// One group.
    ///
    /// # Errors
    /// See [`groups`](Self::groups).
    pub fn group(&self, group: &str) -> Result<Key, RendezvousError> {
        self.at(["group", group])
    }

    /// A [`Member`](crate::message::Member).
    ///
    /// # Errors
    /// See [`groups`](Self::groups).
    pub fn member(&self, group: &str, rank: u32) -> Result<Key, RendezvousError> {
        self.at(["group", group, "member", &rank.to_string()])
    }

    /// The [`Publication`](refit::Publication) of a member. It stands apart from the groups, because it may be large: who
    /// follows the groups does not follow it.
    ///
    /// # Errors
    /// See [`groups`](Self::groups).
    pub fn publication(&self, group: &str, rank: u32) -> Result<Key, RendezvousError> {
        self.at(["publication", group, &rank.to_string()])
    }

    /// An [`Announcement`](crate::message::Announcement).
    ///
    /// # Errors
    /// See [`groups`](Self::groups).
    pub fn version(&self, group: &str, rank: u32) -> Result<Key, RendezvousError> {
        self.at(["group", group, "version", &rank.to_string()])
    }

    /// All leases of a group.
    ///
    /// # Errors
    /// See [`groups`](Self::groups).
    pub fn readers(&self, group: &str) -> Result<Key, RendezvousError> {
        self.at(["group", group, "reader"])
    }

    /// A [`ReaderLease`](crate::message::ReaderLease).
    ///
    /// # Errors
    /// See [`groups`](Self::groups).
    pub fn reader(&self, group: &str, lease: &str) -> Result<Key, RendezvousError> {
        self.at(["group", group, "reader", lease])
    }

    /// All answers of a group. They stand apart from the groups, because they may be large.
    ///
    /// # Errors
    /// See [`groups`](Self::groups).
    pub fn digests_of(&self, group: &str) -> Result<Key, RendezvousError> {
        self.at(["digests", group])
    }

    /// An [`Answer`](crate::message::Answer) of this rank of a group to this target.
    ///
    /// # Errors
    /// See [`groups`](Self::groups).
    pub fn digests(&self, group: &str, rank: u32, target: &str) -> Result<Key, RendezvousError> {
        self.at(["digests", group, &rank.to_string(), target])
    }

    /// All wishes.
    ///
    /// # Errors
    /// See [`groups`](Self::groups).
    pub fn wishes(&self) -> Result<Key, RendezvousError> {
        self.at(["wish"])
    }

    /// A [`Wish`](crate::message::Wish).
    ///
    /// # Errors
    /// See [`groups`](Self::groups).
    pub fn wish(&self, target: &str) -> Result<Key, RendezvousError> {
        self.at(["wish", target])
    }

    /// One replica.
    ///
    /// # Errors
    /// See [`groups`](Self::groups).
    pub fn replica(&self, replica: &str) -> Result<Key, RendezvousError> {
        self.at(["replica", replica])
    }

    /// A [`RankState`](crate::message::RankState).
    ///
    /// # Errors
    /// See [`groups`](Self::groups).
    pub fn rank_state(&self, replica: &str, rank: u32) -> Result<Key, RendezvousError> {
        self.at(["replica", replica, "rank", &rank.to_string()])
    }

    /// A [`Decision`](crate::message::Decision).
    ///
    /// # Errors
    /// See [`groups`](Self::groups).
    pub fn decision(&self, replica: &str, round: u64) -> Result<Key, RendezvousError> {
        self.at(["replica", replica, "decision", &round.to_string()])
    }
}

/// A number in the one way in which keys spell it.
pub(crate) fn number<N: std::str::FromStr + ToString>(part: &str) -> Option<N> {
    part.parse().ok().filter(|number: &N| number.to_string() == part)
}
