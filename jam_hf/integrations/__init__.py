"""How a JAM fits into other libraries where their public interfaces do not reach."""
