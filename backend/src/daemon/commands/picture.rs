//! The running graph as a whole: `query-block-graph`. What it tells is the graph's.

use graph::query::BlockGraph;
use qmp::Commands;

use super::State;

pub fn register(commands: &mut Commands<State>) {
    commands
        .register_query(
            "query-block-graph",
            "Tells of all nodes, users and edges: roles, permissions, who keeps an edge from changing, what is drained, and \
             counters that show rates over two answers. For drawing the graph. QEMU has no such command.",
            |daemon: State| async move {
                let graph: BlockGraph = daemon.graph.query_graph();
                Ok(graph)
            },
        )
        .concurrent();
}
