"""The commands, one file each. Only this package imports all others: it resolves names and passes callables down."""
