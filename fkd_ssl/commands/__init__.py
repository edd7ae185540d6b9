"""One file a verb; the only room that knows all others: it resolves names and hands callables down."""
