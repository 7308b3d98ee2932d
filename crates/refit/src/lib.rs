//! placeholder
pub use refit_planner as planner;
