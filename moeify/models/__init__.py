"""Networks: those that recipes build, and adapters that say where the units of a network lie."""
