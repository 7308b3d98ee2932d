/// What a worker's thread owns: a transport with its pool, and the target or source on top of them.
pub trait Agent: Send + 'static {
    /// The agent's name, incarnation included, for errors and logs.
    fn name(&self) -> String;

    /// Moves on what is under way and nobody waits for, such as parked pulls, and says how the agent stands. Called after
    /// every command, and again and again while the agent is [restless](Standing::Restless). Waits for no peer.
    fn poll(&mut self) -> Standing;

    /// Bytes that would stay away if the agent were retired now: of its pool, and of parameters that reads may write.
    fn bytes(&self) -> u64;

    /// How many peers it has joined so far, each incarnation counted. Agents that joined many are recycled.
    fn joins(&self) -> u64 {
        0
    }
}

/// Whether an agent may be destroyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// Every read that it posted has settled.
    Quiet,
    /// Reads are under way.
    Restless,
    /// Reads can no longer be watched, and may write for ever: it must never be destroyed.
    Lost,
}
