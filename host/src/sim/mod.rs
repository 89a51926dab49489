//! Simulated host (under construction).
