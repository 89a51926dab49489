//! What the queries of the control channel answer, in the shapes of QEMU's QAPI.
//!
//! Called by `query-named-block-nodes`, `x-debug-query-block-graph` and `query-blockstats`. Reads the graph, changes nothing.
