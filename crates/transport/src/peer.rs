//! GPUs that can map one another's memory.

mod blob;
mod pieces;
mod process;
mod reach;
mod view;
